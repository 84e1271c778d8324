"""Which token belongs to which sentence of an answer, and how near sentences are to the prompt."""

from types import SimpleNamespace

import pytest
import torch
from tiny import policy, with_context

from spo_lightning.data.batch import Pair, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.policy import byte_tokenizer

pytest.importorskip("pysbd")

from spo_lightning.models.sentences import Sentences  # noqa: E402 (it needs pysbd)

PAD_ID = 257
CPU = torch.device("cpu")
TEXT = "Dr. Smith paid $3.50. Why? He liked it!  "
PARTS = ["Dr. Smith paid $3.50.", " Why?", " He liked it!  "]


def keys(similarity=None, language="en"):
    return SimpleNamespace(similarity=similarity, language=language)


def words_tokenizer():
    """Words with the space before them, as many byte-level tokenizers have them."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    some = ["Dr.", "Smith", "paid", "$3.50.", "Why?", "He", "liked", "it!"]
    marked = [some[0], *(f"\u0120{word}" for word in some[1:]), "\u0120", "</s>"]
    raw = Tokenizer(WordLevel({word: n for n, word in enumerate(marked)}, unk_token="</s>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="</s>"), [*range(len(marked))]


def split(ids, tokenizer, how=None, prompt=(65,)):
    given = Pairs([Pair(tuple(prompt), tuple(ids), (1, 2))], None, PAD_ID)
    return Sentences.of(how or keys(), CPU)(given, tokenizer).pairs[0]


def test_bytes_of_a_text():
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(TEXT, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    pair = split(ids, tokenizer)
    ends = [0, *pair.sentences]
    assert [tokenizer.decode(ids[a:b]) for a, b in zip(ends, ends[1:])] == [
        *PARTS[:2],
        PARTS[2] + "</s>",
    ]
    assert pair.similarities == ()


def test_letters_of_several_bytes():
    tokenizer = byte_tokenizer()
    ids = tokenizer("Größe zählt. Ça va? Ja 😀!", add_special_tokens=False).input_ids
    ends = [0, *split(ids, tokenizer).sentences]
    found = [tokenizer.decode(ids[a:b]) for a, b in zip(ends, ends[1:])]
    assert "".join(found) == "Größe zählt. Ça va? Ja 😀!" and found[0] == "Größe zählt."


def test_words_with_their_spaces():
    tokenizer, ids = words_tokenizer()
    assert split(ids, tokenizer).sentences == (4, 5, 10)  # the end mark is of the last


@pytest.mark.parametrize("text", ["", "   ", "one"])
def test_an_answer_without_an_end_is_one_sentence(text):
    tokenizer = byte_tokenizer()
    ids = [*tokenizer(text, add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert split(ids, tokenizer).sentences == (len(ids),)


def test_a_batch_knows_its_tokens_sentences():
    first = Pair((1,), (2, 3, 4, 5), (6, 7), sentences=(1, 3, 4), similarities=(0.5, 0.1, 0.2))
    second = with_context(Pair((1,), (2, 3, 4), (8,), sentences=(2, 3)), chosen=(0, 1))
    batch = collate([first, second, Pair((1,), (2,), (3,))], PAD_ID)
    assert batch.sentences.tolist() == [0, 1, 1, 2, 0, 0, 0, 1, 0, 0, 0]
    near = [0.5, 0.1, 0.1, 0.2, *[0.0] * 7]
    assert batch.similarities.tolist() == pytest.approx(near)
    (_, part) = batch.split(2)
    assert part.sentences.tolist() == [0, 0]
    assert batch.chosen_only.sentences.tolist() == [0, 1, 1, 2, 0, 1, 0]
    assert collate([Pair((1,), (2,), (3,))], PAD_ID).sentences is None


def test_a_function_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "near_of_mine.py").write_text(
        "def shared(prompt, sentence):\n"
        "    return len(set(prompt.split()) & set(sentence.split()))\n"
        "def strange(prompt, sentence):\n"
        "    return None\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    tokenizer = byte_tokenizer()
    prompt, ids = (
        tokenizer(t, add_special_tokens=False).input_ids for t in ("Why did Smith? He", TEXT)
    )
    found = split(ids, tokenizer, keys("near_of_mine.shared"), prompt)
    assert found.similarities == (0.0, 0.0, 1.0)  # Smith? is not Smith, Why? is not Why
    with pytest.raises(UserError, match="near_of_mine.strange returned None, not a finite"):
        split(ids, tokenizer, keys("near_of_mine.strange"), prompt)


def test_an_embedding_model(tmp_path):
    made = policy("llama", dtype="float32")
    made.save(tmp_path / "model", merge=False, card="")
    ids = made.tokenizer(TEXT, add_special_tokens=False).input_ids
    prompt = made.tokenizer("Why?", add_special_tokens=False).input_ids
    pair = split(ids, made.tokenizer, keys(str(tmp_path / "model")), prompt)

    def mean(text):
        words = made.tokenizer(text, return_tensors="pt", add_special_tokens=False)
        with torch.no_grad():
            return made.lm.model(words.input_ids).last_hidden_state[0].mean(0)

    expected = [torch.cosine_similarity(mean("Why?"), mean(p.strip()), 0).item() for p in PARTS]
    assert pair.similarities == pytest.approx(expected, abs=1e-4)
    assert pair.similarities[1] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (keys(language="xx"), "loss.language=xx"),
        (keys("nowhere.at_all"), "loss.similarity=nowhere.at_all: no such directory, nor"),
        (keys("name"), "loss.similarity=name: no such directory, nor"),
    ],
)
def test_what_is_not_there_is_refused(how, says):
    with pytest.raises(UserError, match=says):
        Sentences.of(how, CPU)


def test_a_directory_without_a_model_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no embedding model"):
        Sentences.of(keys(str(tmp_path)), CPU)
