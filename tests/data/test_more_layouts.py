"""Columns of more published sets, against pairs that were written by hand; files in which a column
says what no layout would read."""

import pytest
from test_encode import message
from test_layouts import CASES, chat, made, pair, said, system, turns_only, user

from spo_lightning.data import layouts
from spo_lightning.data.rows import Rows
from spo_lightning.errors import UserError

HUMAN = {"from": "human", "value": "q"}
BEFORE = [user("a"), said("b")]
MORE = {  # layout: [(a row as published, the pair it becomes)]
    "trl": [
        (pair(prompt="p", accepted="x"), pair()),
        ({"prompt": "p", "preferred": "c", "dispreferred": "r"}, pair()),
        ({"prompt": "p", "good_response": "c", "bad_response": "r"}, pair()),
        ({"prompt": "p", "response": "c", "rejected_response": "r"}, pair()),
        # the answers go on from steps that stand in a column of their own
        (
            {"prompt": "p", "initial_reason_steps": "s: ", "chosen": "c", "rejected": "r"},
            {"prompt": "p", "chosen": "s: c", "rejected": "s: r"},
        ),
    ],
    "question": [
        ({"question": "q", "accepted": "c", "rejected": "r"}, chat("q", "c", "r")),
        (
            {"query": "q", "history": [["a", "b"]], "system": "s", "response": "c",
             "rejected_response": "r"},
            chat([system("s"), *BEFORE, user("q")], "c", "r"),
        ),
        (
            {"instruction": "q", "history": [], "chosen": "c", "rejected": "r"},
            chat("q", "c", "r"),
        ),
    ],
    "turns_and_texts": [
        (
            {"prompt": [{"role": "prompter", "content": "q"}], "chosen": "c", "rejected": "r"},
            chat("q", "c", "r"),
        ),
    ],
    "sharegpt": [
        (
            {"conversation": [{"sender": "user", "message": "q"}], "better": "c", "worse": "r"},
            chat("q", "c", "r"),
        ),
        (
            {"trajectory": [{"from": "user", "value": "q"}], "chosen": "c", "rejected": "r"},
            chat("q", "c", "r"),
        ),
    ],
    "swift": [
        (
            {"messages": [system("s"), *BEFORE, user("q"), said("c")], "rejected_response": "r"},
            chat([system("s"), *BEFORE, user("q")], "c", "r"),
        ),
        (
            {"messages": [user("q"), said("c")], "rejected_messages": [user("q"), said("r")]},
            chat("q", "c", "r"),
        ),
        (
            {"conversations": [HUMAN, {"from": "gpt", "value": "c"}], "system": "s",
             "rejected_response": "r"},
            chat([system("s"), user("q")], "c", "r"),
        ),
    ],
    "ordered": [
        ({"instruction": "q", "input": "x", "output": ["c", "r"]}, chat("q\nx", "c", "r")),
        (
            {"instruction": "q", "output": ["c", "r"], "history": [["a", "b"]]},
            chat([*BEFORE, user("q")], "c", "r"),
        ),
    ],
    "several": [
        ({"prompt": "p", "chosen": ["c"], "rejected": ["r", "x"], "id": "1"}, pair()),
        (
            {"question": "q", "correct_answers": ["c", "x"], "incorrect_answers": ["r"]},
            chat("q", "c", "r"),
        ),
    ],
    "rated": [
        (
            {"question": "q", "answers": [
                {"text": "r", "pm_score": 1, "selected": False},
                {"text": "c", "pm_score": 5, "selected": True}]},
            chat("q", "c", "r", score_chosen=5.0, score_rejected=1.0, margin=4.0),
        ),
        (
            {"prompt": "p", "candidates": ["r", "c"], "rewards": [0, 2]},
            pair(score_chosen=2.0, score_rejected=0.0, margin=2.0),
        ),
    ],
    "ultrafeedback": [
        (
            {"prompt": "q", "chosen": [user("q"), said("c")], "rejected": [user("q"), said("r")],
             "all_generated_responses": ["c", "r"], "all_rm_scores": [2.0, 1.0]},
            chat("q", "c", "r"),
        ),
    ],
    "verdict": [
        ({"question": "q", "response_A": "c", "response_B": "r", "label": "A>B"},
         chat("q", "c", "r")),
        ({"question": "q", "response_A": "r", "response_B": "c", "label": "[[A<<B]]"},
         chat("q", "c", "r")),
        ({"prompt": "p", "response_0": "r", "response_1": "c", "chosen": "response_1",
          "rejected": "response_0"}, pair()),
        ({"prompt": "p", "generation_1": "c", "generation_2": "r", "preference": 1}, pair()),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", MORE)
def test_rows_of_more_sets(name):
    for raw, becomes in MORE[name]:
        found = made([raw])
        assert found.layout.name == name, raw
        assert turns_only(found.rows) == [becomes], raw


MARKED = [
    {"prompt": "p", "response": "r", "helpfulness": 1, "correctness": 4},
    {"prompt": "o", "response": "x", "helpfulness": 2, "correctness": 4},
    {"prompt": "p", "response": "c", "helpfulness": 4, "correctness": 0},
]


def test_every_layout_that_gives_pairs_has_rows():
    given = {name for name, one in layouts.known.layouts().items() if one.gives == "pairs"}
    assert given == {*CASES, *MORE, "marked"}


def test_marked_answers_to_one_prompt_make_pairs():
    found = made(MARKED)
    assert found.layout.name == "marked"
    assert found.rows == [pair(margin=3.0, score_chosen=4.0, score_rejected=1.0)]
    assert found.places == [0]
    why = "fewer than two answers have a rank or score"
    assert found.dropped[why].examples == [("a.jsonl, row 2", MARKED[1])]
    assert made(MARKED, "sft").rows[0] == {"prompt": "p", "completion": "r"}
    more = [*MARKED, {**MARKED[0], "response": "y", "helpfulness": 3}]
    pairs = made(more, pairing="adjacent").rows
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("c", "y"), ("y", "r")]


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("label", "desirable", "undesirable"),
        ("kto_tag", "true", "false"),
        ("label", 1, 0),
        ("is_safe", True, False),
    ],
)
def test_words_of_a_label(name, good, bad):
    raw = [
        {"prompt": "p", "completion": "c", name: good, "rating": 4},
        {"prompt": "p", "completion": "r", name: bad, "rating": 2},
    ]
    found = made(raw)
    assert found.layout.name == "kto" and found.rows == [pair()]


def test_a_text_prompt_beside_an_answer_in_turns():
    found = made([{"prompt": "p", "completion": [said("c")], "label": True}])
    assert found.labelled == [{"prompt": [user("p")], "completion": [said("c")], "label": True}]


@pytest.mark.parametrize(
    "raw, fragment",
    [
        ({"prompt": ["p"], "chosen": "so c", "rejected": "so r"},
         "layout implicit fits, and would leave 'prompt' unread: say which is which: "
         "data.columns.prompt=prompt data.columns.chosen=chosen data.columns.rejected=rejected; "),
        ({"context": "p", "chosen": "so c", "rejected": "so r"}, "leave 'context' unread"),
        ({"prompt": "p", "completion": "c", "label": "helpful"},
         "layout sft fits, and would leave 'label' unread"),
        ({"messages": [user("p"), said("c")], "rejected": 3}, "would leave 'rejected' unread"),
        ({"prompt": "p", "response_1": "c", "response_2": "r", "label": 3}, "the verdict is '3'"),
        ({"prompt": "p", "chosen": 1, "rejected": 2}, "'chosen' is a number, and the layout trl"),
        ({"messages": [user("p")], "rejected_response": "r"}, "ends in no answer"),
        ({"instruction": "p", "output": ["a", "b", "c"]}, "3 answers: give two"),
        ({"instruction": "p", "history": [["a"]], "chosen": "c", "rejected": "r"},
         "history: write it as lists of two texts"),
        ({"question": "q", "response_A": "c", "response_B": "r", "label": "A>C>B"},
         "the verdict is 'A>C>B'"),
    ],
)  # fmt: skip
def test_files_that_say_more_than_is_read(raw, fragment):
    assert fragment in message(made, [raw])


def test_messages_as_python_prints_them():
    turns = {"chosen": str([user("p"), said("c's")]), "rejected": str([user("p"), said("r")])}
    assert made([{"prompt": "p", **turns}]).rows == [chat("p", "c's", "r")]
    one = {"prompt": "p", "chosen": '{"role": "assistant", "content": "c"}'}
    assert made([{**one, "rejected": str(said("r"))}]).rows == [chat("p", "c", "r")]
    numpy = "[{'content': 'p', 'role': 'user'}\n {'content': 'c', 'role': 'assistant'}]"
    told = message(made, [{"prompt": "p", "chosen": numpy, "rejected": numpy}])
    assert told.startswith("a.jsonl, row 1: 'chosen' is messages as numpy prints them")
    code = pair(chosen="{'a': 1}", rejected="{x}")
    assert made([code]).rows == [code]


def test_a_verdict_of_equals():
    found = made([{"question": "q", "response_A": "c", "response_B": "r", "label": "A=B"}])
    assert found.rows == [] and set(found.dropped) == {"tie"}


def test_0_and_1_are_no_verdicts_on_the_answers_1_and_2():
    """PandaLM's 0 is a tie; others count from 0, and the pairs would be the other way round."""
    rows = [
        {"prompt": "p", "response_1": "r", "response_2": "c", "label": label} for label in (0, 1)
    ]
    assert message(made, rows).startswith(
        "a.jsonl: the verdicts on the answers 1 and 2 are 0 and 1 alone: write 1 and 2 where"
    )
    both = made([*rows, {**rows[0], "label": 2}])
    assert [(row["chosen"], row["rejected"]) for row in both.rows] == [("r", "c"), ("c", "r")]


def test_a_prompt_that_stands_in_the_answers_too_is_said():
    found = made([pair(chosen="p c", rejected="p r"), pair()])
    told = "1 rows: both answers begin with the whole prompt, which is read twice"
    assert found.notes[1:] == (told,) and found.rows[0] == pair(chosen="p c", rejected="p r")


def test_answers_beside_worse_ones_are_no_texts():
    raw = Rows([("a.jsonl", 1, {"prompt": "a", "completion": "b", "rejected_response": "c"})])
    with pytest.raises(UserError, match="would leave 'rejected_response' unread: leave out"):
        layouts.normalised(raw, "a.jsonl", (layouts.TEXTS,))
