"""Shares of answers that refuse, repeat, are empty or cut: counted by hand."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import yaml
from tiny import policy

from spo_lightning.command import CONF
from spo_lightning.evaluation.shares import items, repeats, shares
from spo_lightning.models.generate import Answer, Decoding, answered
from spo_lightning.records.progress import silent

ENGLISH = yaml.safe_load((Path(CONF) / "refusals/english.yaml").read_text("utf-8"))["refusals"]


def said(*texts, cut=False):
    return [Answer(text, len(text), cut) for text in texts]


@pytest.mark.parametrize(
    "text, refuses",
    [
        ("I'm sorry, but I can't help with that.", True),
        ("I\u2019m sorry, but no.", True),
        ("  **I cannot** do that.", True),
        ('"As an AI language model, I have no opinion."', True),
        ("SORRY!", True),
        ("Of course. I'm sorry it took so long.", False),
        ("I can do that.", False),
        ("", False),
    ],
)
def test_a_refusal_is_known_by_how_it_begins(text, refuses):
    assert items(said(text), ENGLISH)["answers/refused"] == [float(refuses)]


def test_the_openings_can_be_ones_own():
    answers = said("Nope.", "I'm sorry.")
    assert items(answers, ["nope"])["answers/refused"] == [1.0, 0.0]
    assert items(answers, [])["answers/refused"] == [0.0, 0.0]


@pytest.mark.parametrize(
    "text, circles",
    [
        ("I like trains. I like trains. I like trains.", True),
        ("I like trains.\nI like trains.\n I like trains. I li", True),  # cut within
        ("Well, it is so. And so on and so on and so on and so on and so on", True),
        ("\u6211\u5f88\u597d\u3002" * 6, True),
        ("a" * 20, True),
        ("a" * 19, False),  # too short to be one
        ("I like trains. I like trains.", False),  # twice
        ("12+7=19,19-5=14,14+9=23", False),
        ("The first half of this answer says something of its own, ha ha ha", False),
    ],
)
def test_an_answer_that_turns_in_a_circle(text, circles):
    assert repeats(text) == circles


def test_repetition_is_found_wherever_a_passage_of_any_length_comes_back():
    """Against all beginnings and lengths, tried one by one."""

    def slowly(text):
        size = len(text)
        return any(
            text[start:] == (text[start : start + period] * size)[: size - start]
            for start in range(size - 20 + 1)
            for period in range(1, (size - start + 1) // 3 + 1)
        )

    for text in ("".join(letters) for letters in product("ab", repeat=8)):
        longer = "".join(letter * 4 for letter in text)
        assert repeats(longer) == slowly(longer), longer


def test_shares_by_hand():
    answers = [
        Answer("a b a b", 4, cut=False),
        Answer("  ", 1, cut=False),
        Answer("I'm sorry", 3, cut=True),
        Answer("b a", 2, cut=True),
    ]
    found = shares(answers, ENGLISH)
    assert found == {
        "answers/refused": 0.25,
        "answers/repeated": 0.0,
        "answers/empty": 0.25,
        "answers/cut": 0.5,
        "answers/tokens": 2.5,
        "answers/distinct1": 4 / 8,  # a, b, I'm, sorry
        "answers/distinct2": 3 / 5,  # a b, b a, I'm sorry
    }
    assert shares([], ENGLISH) == {}
    assert not {name for name in shares(said(""), []) if "distinct" in name}


def test_a_text_that_ends_an_answer_is_looked_for_in_the_answer():
    made = policy("llama", dtype="float32")
    how = Decoding(max_new_tokens=4, batch_size=2, stop=())
    (free,) = answered(made, [{"prompt": "ab\n"}], how, silent(), "")
    (first, *_) = free.text or "?"
    stop = ("\n" + first,)  # begins with the prompt's last letter
    (found,) = answered(made, [{"prompt": "ab\n"}], replace(how, stop=stop), silent(), "")
    assert found == free and found.tokens == 4


def test_an_answer_knows_its_length_and_whether_the_limit_cut_it():
    made = policy("llama", dtype="float32")
    rows = [{"prompt": text} for text in ("ab", "a longer one", "c" * 20)]

    def told(limit):
        how = Decoding(max_new_tokens=limit, batch_size=2, stop=())
        return answered(made, rows, how, silent(), "")

    for one in told(6):
        assert one.cut and one.tokens == 6
    ends = Decoding(max_new_tokens=6, batch_size=2, stop=tuple(made.tokenizer.get_vocab()))
    ended = answered(made, rows, ends, silent(), "")
    assert ended == [Answer("", 0, cut=False)] * 3
    (last,) = [one for one, row in zip(told(300), rows) if len(row["prompt"]) == 20]
    assert last.cut and last.tokens == 256 - 20  # places hold prompt and answer
