"""Pairs become questions: which of two answers is better, in either order, by one token."""

from pathlib import Path

import pytest
from chats import KNOBS, says, tokenizer_of, user
from transformers import AutoTokenizer

from spo_lightning.data.encode import encode_pairs
from spo_lightning.data.ranking import check_letters, questions, to_letters
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.policy import byte_tokenizer

STORIES = Path(__file__).parents[3] / "shared/models/stories260k"
TEMPLATE = "{prompt} A: {first} B: {second} better:"
ROW = {"prompt": "2+2=", "chosen": " 4", "rejected": "{first}</s>", "subset": "sums"}


def letters(rows, tokenizer):
    """Tokenised questions, and what became of all."""
    asked = questions(rows, TEMPLATE, tokenizer)
    found = encode_pairs(asked, tokenizer, **KNOBS, where="rows")
    return to_letters(Pairs(found.pairs, None, 0)), found.counts


def test_both_orders_by_hand():
    """Words of an answer are no fields; an end mark that an answer brings along is taken off."""
    first, second = questions([ROW], TEMPLATE, byte_tokenizer())
    assert first["prompt"] == "2+2= A: 4 B: {first} better:"
    assert second["prompt"] == "2+2= A: {first} B: 4 better:"
    assert (first["chosen"], first["rejected"]) == (" A", " B")
    assert (second["chosen"], second["rejected"]) == (" B", " A")
    assert first["subset"] == second["subset"] == "sums"


def test_a_letter_is_one_token():
    """What both begin with is the prompt's: a tokenizer of bytes has the space apart."""
    tokenizer = byte_tokenizer()
    first, second = letters([ROW], tokenizer)[0].pairs
    assert first.chosen == second.rejected and first.rejected == second.chosen
    assert [tokenizer.decode(it) for it in (first.chosen, first.rejected)] == ["A", "B"]
    assert tokenizer.decode(first.prompt) == "2+2= A: 4 B: {first} better: "


@pytest.mark.skipif(not STORIES.exists(), reason="no stories260k beside the checkout")
def test_letters_of_a_real_tokenizer():
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    check_letters(tokenizer)
    pairs, counts = letters([{"prompt": "Who?", "chosen": "Tom.", "rejected": "Sue."}], tokenizer)
    assert counts["kept"] == 2
    for pair in pairs.pairs:
        assert len(pair.chosen) == len(pair.rejected) == 1 and pair.chosen != pair.rejected


@pytest.mark.parametrize("family", ["chatml", "gemma", "qwen3"])
def test_of_a_chat_a_question_is_a_user_turn(family):
    """After the header that the template gives an assistant."""
    tokenizer = tokenizer_of(family)
    turns = {"prompt": [user("Hi"), says("Yes?"), user("2+2")], "chosen": [says("4")]}
    first, _ = letters([{**turns, "rejected": [says("5")]}], tokenizer)[0].pairs
    assert [tokenizer.decode(it) for it in (first.chosen, first.rejected)] == ["A", "B"]
    text = tokenizer.decode(first.prompt)
    assert "user: Hi\nassistant: Yes?\nuser: 2+2 A: 4 B: 5 better:" in text
    assert text == tokenizer.apply_chat_template(
        [user("user: Hi\nassistant: Yes?\nuser: 2+2 A: 4 B: 5 better:")],
        tokenize=False,
        add_generation_prompt=True,
    )


def test_messages_are_text_where_there_is_no_template():
    row = {"prompt": [user("2+2")], "chosen": [says("4")], "rejected": [says("5")]}
    first, _ = questions([row], TEMPLATE, byte_tokenizer())
    assert first["prompt"] == "2+2 A: 4 B: 5 better:" and first["chosen"] == " A"


def test_what_tells_nothing_apart_is_counted():
    rows = [ROW, {**ROW, "rejected": "4 "}, {**ROW, "chosen": " "}]
    counts = letters(rows, byte_tokenizer())[1]
    assert (counts["kept"], counts["dropped/identical"], counts["dropped/empty"]) == (2, 2, 2)


def test_letters_that_are_the_same_token_are_refused():
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")
    with pytest.raises(UserError, match="it writes A and B with the same tokens"):
        check_letters(tokenizer)
