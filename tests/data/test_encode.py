"""Tokens of pairs: equal to TRL's where we promise it, counted where they are dropped or cut."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trl_tokens import peer
from written import placed

from spo_lightning.data import layouts
from spo_lightning.data.batch import CHOSEN, PROMPT, REJECTED, Pair, collate
from spo_lightning.data.encode import COUNTS, encode_pairs, encode_texts, prompt_ids
from spo_lightning.errors import UserError

SHARED = Path(__file__).parents[3] / "shared"
STORIES, GSM8K = SHARED / "models/stories260k", SHARED / "data/gsm8k"

CHAT = (
    "{{ bos_token }}{% if tools %}[{{ tools | tojson }}]{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{{ '(think)' if thinking }}{% endif %}"
)


def byte_tokenizer(*, before="", after="", eos="</s>"):
    """One token per byte; ``before`` and ``after`` are what it puts around every text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: n for n, token in enumerate(["<s>", "</s>", "<pad>", *letters])}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    special = [("<s>", 0), ("</s>", 1)]
    inner.post_processor = processors.TemplateProcessing(
        single=f"{before} $A {after}".strip(), special_tokens=special
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token="<pad>"
    )
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="module")
def bytes_():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def stories():
    if not STORIES.exists():
        pytest.skip("needs the stories260k model")
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(STORIES)


def encoded(rows, tokenizer, **changed):
    knobs = {"max_length": 512, "on_mismatch": "split", "strict": False, "where": "a.jsonl"}
    knobs |= {"scored": "assistant"}
    return encode_pairs(rows, tokenizer, **(knobs | changed))


def row(prompt, chosen, rejected, **extra):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **extra}


def turn(content, role="assistant"):
    return {"role": role, "content": content}


def ids(text):
    return tuple(byte_tokenizer().encode(text, add_special_tokens=False))


def counted(result):
    return {key: count for key, count in result.counts.items() if count}


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_text_by_hand(bytes_):
    result = encoded([row("ab", "c", "de</s>")], bytes_)
    assert result.pairs == [Pair(ids("ab"), (*ids("c"), 1), (*ids("de"), 1), row=0)]
    assert list(result.counts) == list(COUNTS) and counted(result) == {"kept": 1}


def test_messages_by_hand(bytes_):
    asked = row([turn("hi", "user")], [turn("a")], [turn("b")])
    prompt = (0, *ids("<user>hi"), 1, *ids("<assistant>"))
    result = encoded([asked], bytes_)
    assert result.pairs == [Pair(prompt, (*ids("a"), 1), (*ids("b"), 1), row=0)]
    assert prompt_ids(asked, bytes_) == list(prompt)


def test_one_beginning_and_one_end_of_sequence():
    tokenizer = byte_tokenizer(before="<s>", after="</s>")
    for pair in (row("ab", "c", "d"), row("<s>ab", "c</s>", "d")):
        result = encoded([pair], tokenizer)
        assert result.pairs == [Pair((0, *ids("ab")), (*ids("c"), 1), (*ids("d"), 1), row=0)]
        assert counted(result) == {"kept": 1}
        assert prompt_ids(pair, tokenizer) == [0, *ids("ab")]
    chat = encoded([row([turn("hi", "user")], [turn("a")], [turn("b")])], tokenizer)
    whole = chat.pairs[0].prompt + chat.pairs[0].chosen
    assert whole.count(0) == 1 and whole[-2:] == (*ids("a"), 1)


def test_a_row_says_which_answer_is_the_references(bytes_):
    sides = [{"reference_side": "rejected"}, {"reference_side": "chosen"}, {}]
    rows = [row("p", "a", "bc") | side for side in sides]
    pairs = encoded(rows, bytes_).pairs
    assert [pair.reference_side for pair in pairs] == [1.0, 0.0, None]
    batch = collate(pairs, 0)
    assert batch.reference_sides.tolist()[:2] == [1.0, 0.0] and batch.reference_sides[2].isnan()
    (one, two) = batch.split(2)
    assert one.reference_sides.tolist() == [1.0, 0.0] and two.reference_sides.isnan().all()
    assert collate(pairs[2:], 0).reference_sides is None


def test_every_reason_is_counted_and_rows_keep_their_index(bytes_):
    user = [turn("hi", "user")]
    rows = [
        row("p", "same", "same"),
        row("p", "same", "same</s>"),
        row("p", "", "x"),
        row("p", "</s>", "x"),
        row("p", "12345678a", "12345678b"),  # equal once cut to 8 tokens
        row("p" * 8, "a", "b"),
        row("", "a", "b"),  # nothing predicts the first token
        row(user, [], [turn("b")]),
        row([], [turn("a")], [turn("b")]),
        row(user, [turn("")], [turn("b")]),
        row("p", "1234567", "x"),
        row("p" * 7, "ab", "b"),
    ]
    result = encoded(rows, bytes_, max_length=8)
    assert counted(result) == {
        "kept": 2,
        "dropped/identical": 3,
        "dropped/empty": 6,
        "dropped/long": 1,
        "truncated": 2,
    }
    assert [pair.row for pair in result.pairs] == [10, 11]
    assert result.pairs[1] == Pair(ids("p" * 7), ids("a"), ids("b"), row=11)
    for bad, fragment in ((0, "the same"), (2, "is empty"), (5, "fills max_length")):
        told = message(encoded, [rows[10], rows[bad]], bytes_, max_length=8, strict=True)
        assert told.startswith("a.jsonl, row 2: ") and fragment in told


def test_none_left_says_why(bytes_):
    told = message(encoded, [row("p", "a", "a"), row("p", "", "b")], bytes_)
    assert "none of 2 pairs survives" in told
    assert "the same: 1" in told and "is empty: 1" in told
    assert encoded([], bytes_).pairs == []


def test_a_prompt_that_is_no_prefix_is_split_dropped_or_refused(bytes_):
    rows = [
        row([turn("hi", "user")], [turn("a")], [turn("b")], chat_template_kwargs={"thinking": 1}),
        row("p", "a", "b"),
    ]
    result = encoded(rows, bytes_)
    assert counted(result) == {"kept": 2, "split": 1}
    assert bytes_.decode(result.pairs[0].prompt) == "<s><user>hi</s><assistant>"
    assert result.pairs[0].chosen == (*ids("a"), 1)
    assert counted(encoded(rows, bytes_, on_mismatch="drop")) == {"kept": 1, "dropped/split": 1}
    assert "a.jsonl, row 1: the prompt's tokens" in message(
        encoded, rows, bytes_, on_mismatch="error"
    )
    assert "data.on_mismatch=keep" in message(encoded, rows, bytes_, on_mismatch="keep")


def test_tokenizers_that_cannot_do_it_are_named(bytes_):
    bare = byte_tokenizer()
    bare.chat_template, bare.name_or_path = None, "some/base-model"
    told = message(encoded, [row([turn("hi", "user")], [turn("a")], [turn("b")])], bare)
    assert "some/base-model: no chat template" in told and "a.jsonl, row 1" in told
    assert "no EOS token" in message(encoded, [row("p", "a", "b")], byte_tokenizer(eos=None))
    bare.chat_template = "{{ raise_exception('roles must alternate') }}"
    told = message(encoded, [row([turn("hi", "user")], [turn("a")], [turn("b")])], bare)
    assert "a.jsonl, row 1: the chat template refuses it (roles must alternate)" in told


def test_sft_rows_have_no_rejected_side(bytes_):
    rows = [
        {"prompt": "p", "completion": "abc"},
        {"prompt": "p", "completion": ""},
        {"prompt": "p" * 4, "completion": "a"},
        {"prompt": [turn("h", "user")], "completion": [turn("a")]},
    ]
    assert encode_texts(rows[:3], bytes_, max_length=4, scored="assistant") == [
        Pair(ids("p"), ids("abc"), (), row=0)
    ]
    chat = encode_texts(rows, bytes_, max_length=64, scored="assistant")[-1]
    assert chat.row == 3 and chat.chosen == (*ids("a"), 1) and chat.rejected == ()


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.text(st.characters(codec="utf-8"), max_size=6)] * 3), min_size=1),
    st.integers(2, 12),
)
def test_rows_are_kept_whole_or_counted(texts, max_length):
    tokenizer = byte_tokenizer(before="<s>")
    safe = row("safe", "a", "b")
    result = encoded([safe, *(row(*text) for text in texts)], tokenizer, max_length=max_length + 9)
    dropped = sum(n for key, n in result.counts.items() if key.startswith("dropped/"))
    assert dropped + result.counts["kept"] == 1 + len(texts) and not result.counts["split"]
    for pair in result.pairs:
        assert len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) <= max_length + 9
        assert pair.chosen != pair.rejected and pair.prompt and pair.chosen and pair.rejected


def test_the_exact_collator_case():
    batch = collate([Pair((1, 2, 3), (4, 5), (6,)), Pair((7, 8), (9,), (10, 11))], pad_id=0)
    width, rows, masks = 5, [], []
    for side in (CHOSEN, REJECTED):
        for tokens, segment in zip(batch.input_ids, batch.segment):
            kept = (segment == PROMPT) | (segment == side)
            rest = [0] * (width - int(kept.sum()))
            rows.append(tokens[kept].tolist() + rest)
            masks.append((segment[kept] == side).int().tolist() + rest)
    assert rows == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0], [1, 2, 3, 6, 0], [7, 8, 10, 11, 0]]
    assert masks == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 1, 1, 0]]


def same_as_peer(rows, tokenizer, max_length):
    pytest.importorskip("trl")
    ours = encoded(rows, tokenizer, max_length=max_length, scored="all")
    theirs = list(peer(rows, tokenizer, max_length))
    # ours alone drops pairs that truncation makes identical, and first tokens nothing predicts
    theirs = [trio for trio in theirs if trio[0] and trio[1] != trio[2]]
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in ours.pairs] == theirs
    return counted(ours)


def gsm8k_rows(count):
    with open(GSM8K / "example_model_solutions.jsonl") as file:
        solved = [json.loads(line) for line in file][:count]
    return [
        row(s["question"] + "\n", s["ground_truth"], s["6b_finetuning"]["solution"])
        for s in solved
    ]


@pytest.mark.parametrize("max_length", [120, 512])
def test_equal_to_trl_on_gsm8k(stories, max_length):
    counts = same_as_peer(gsm8k_rows(300), stories, max_length)
    assert counts["kept"] > 30
    if max_length == 120:
        assert counts["dropped/long"] > 30 and counts["truncated"] > 30


EDGES = [
    row("tail ", "a", "b"),
    row("yes", "terday", " yes"),
    row("ab", "\n\n c ", "  c"),
    row("x</s>", "a</s>", "b"),
    row("é\u2028€ 👍🏽", "\u200dz", "á"),
    row("<s", ">a", ">b"),
    row("a\r\n", "\tb" * 40, "c" * 90),
    row("q" * 63, "a", "b"),
    row("q" * 64, "a", "b"),
]


@pytest.mark.parametrize("max_length", [16, 64])
@pytest.mark.parametrize("make", [byte_tokenizer, lambda: byte_tokenizer(before="<s>")])
def test_equal_to_trl_on_edges(make, max_length):
    assert same_as_peer(EDGES, make(), max_length)["kept"] >= 5


def test_equal_to_trl_on_edges_with_a_merging_tokenizer(stories):
    counts = same_as_peer([*EDGES, row("The ca", "t ran", "r ran")], stories, 64)
    assert counts["kept"] >= 8 and counts["split"] >= 1


def test_equal_to_trl_on_messages(bytes_):
    system = turn("be brief", "system")
    for extra in ({}, {"chat_template_kwargs": {"thinking": True}}, {"tools": '[{"name": "f"}]'}):
        rows = [
            row([system, turn("hi", "user")], [turn("a")], [turn("bb")], **extra),
            row([turn("hi", "user")], [turn("c")], [turn("d"), turn("?", "user")], **extra),
        ]
        counts = same_as_peer(
            layouts.normalised(placed(rows), "a", layouts.COMPARED).rows, bytes_, 200
        )
        assert counts["kept"] == 2 and counts.get("split", 0) == 2 * ("thinking" in str(extra))


def test_a_template_alone_decides_the_special_tokens_of_messages():
    tokenizer = byte_tokenizer(before="<s>", after="</s>")
    tokenizer.chat_template = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    rows = [row([turn("hi", "user")], [turn("a")], [turn("b")])]
    assert same_as_peer(rows, tokenizer, 64) == {"kept": 1}
    assert encoded(rows, tokenizer).pairs == [Pair(ids("[hi]"), ids("[a]"), ids("[b]"), row=0)]


def test_equal_to_trl_on_implicit_messages(bytes_):
    pytest.importorskip("trl")
    from trl.data_utils import extract_prompt

    asked = [turn("hi", "user"), turn("yes?"), turn("go", "user")]
    raw = {"chosen": [*asked, turn("a")], "rejected": [*asked, turn("b")]}
    assert layouts.normalised(placed([raw]), "a", layouts.COMPARED).rows == [extract_prompt(raw)]
