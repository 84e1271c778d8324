"""Every layout as it is published, row by row, against pairs that were written by hand."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_encode import message
from written import placed

from spo_lightning.data import layouts
from spo_lightning.data.layouts.columns import kinds_of
from spo_lightning.data.reading import read
from spo_lightning.data.rows import Rows
from spo_lightning.errors import UserError

FILES = Path(__file__).parents[3] / "shared/data/layouts"
PANDALM = FILES.parent / "pandalm/testset-v1.json"
HH = FILES.parent / "hh/harmless_a.jsonl.gz"


def user(text):
    return {"role": "user", "content": text}


def said(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def pair(**changed):
    return {"prompt": "p", "chosen": "c", "rejected": "r", **changed}


def chat(prompt, chosen, rejected, **more):
    turns = [user(prompt)] if isinstance(prompt, str) else prompt
    return {"prompt": turns, "chosen": [said(chosen)], "rejected": [said(rejected)], **more}


def plain(row):
    """The text that a row keeps beside its turns."""
    return [row["plain"][name] for name in ("prompt", "chosen", "rejected")]


def made(raw, name=None, **asked):
    asked = layouts.Asked(**{"key": "data.columns", **asked})
    rows = raw if isinstance(raw, Rows) else placed(raw, "a.jsonl")
    file = layouts.file_of("a.jsonl", rows, asked)
    layout = layouts.recognised(file) if name is None else layouts.forced(file, name)
    return layouts.made(file, layout)


def turns_only(rows):
    return [{key: value for key, value in row.items() if key != "plain"} for row in rows]


# --- the files of ../shared/data/layouts -------------------------------------------------------

ASKED = [  # what all of them ask, with the better answer and the worse one
    (
        "How do I keep basil alive in winter?",
        "Put the pot on a bright sill and water it when the top is dry.",
        "Basil cannot live in winter.",
    ),
    (
        "Name two rivers that cross Vienna.",
        "The Danube and the Wien.",
        "The Rhine and the Elbe.",
    ),
    ("Is seven a prime number?", "Yes: only one and seven divide it.", "No, since 7 = 2 + 5."),
    (
        "What does a capo do on a guitar?",
        "It clamps all strings, so every open chord sounds higher.",
        "It cleans the strings.",
    ),
    (
        "Why is the sky dark at night?",
        "The air scatters sunlight, and at night there is none to scatter.",
        "Because the stars are far.",
    ),
]
TEXTS = [{"prompt": p, "chosen": c, "rejected": r} for p, c, r in ASKED]
CHATS = [chat(*asked) for asked in ASKED]
SHORT = system("You answer in one sentence.")
BRIEF = [chat([SHORT, user(p)], c, r) for p, c, r in ASKED]
BEFORE = [user(ASKED[0][0]), said(ASKED[0][1])]
KITCHEN = user("How do I keep basil alive in winter?\nIt stands in a kitchen, facing north.")
SCORES = [
    {"score_chosen": 8.5, "score_rejected": low, "margin": 8.5 - low}
    for low in (4.0, 5.0, 6.0, 7.0, 8.0)
]
PUBLISHED = {  # file: its layout, its line, its pairs
    "hh_multi_turn.jsonl.gz": (
        "Layout: hh (chosen, rejected as messages): 4 rows",
        [chat([*BEFORE, user(p)], c, r) for p, c, r in ASKED[1:]],
    ),
    "kto_rows.jsonl": (
        "Layout: kto (prompt, completion, label as text): 11 rows, 5 pairs",
        TEXTS,
    ),
    "nectar_ranked.jsonl": (
        "Layout: ranked (prompt, answers.*.answer, answers.*.rank as messages): 5 rows",
        [{**row, "margin": 2.0} for row in CHATS],
    ),
    "openai_preference.jsonl": (
        "Layout: openai (input.messages, preferred_output, non_preferred_output as messages; also "
        "input.tools): 5 rows",
        BRIEF,
    ),
    "orca_dpo_pairs.jsonl": (
        "Layout: question (question, chosen, rejected as messages; also system): 5 rows",
        [CHATS[0], *BRIEF[1:]],
    ),
    "question_columns.csv": (
        "Layout: question (instruction, chosen, rejected as messages; also input): 5 rows",
        [{**CHATS[0], "prompt": [KITCHEN]}, *CHATS[1:]],
    ),
    "safe_rlhf.jsonl": (
        "Layout: verdict (prompt, response_0, response_1, better_response_id as text): 5 rows",
        TEXTS,
    ),
    "sharegpt_ranking.jsonl": (
        "Layout: sharegpt (conversations, chosen, rejected as messages): 5 rows",
        CHATS,
    ),
    "ultrafeedback_binarized.jsonl": (
        "Layout: ultrafeedback (prompt, chosen, rejected as messages; also score_chosen, "
        "score_rejected): 5 rows",
        [{**row, **scores} for row, scores in zip(CHATS, SCORES)],
    ),
}


@pytest.mark.skipif(not FILES.is_dir(), reason="needs shared/data/layouts")
@pytest.mark.parametrize("name", PUBLISHED)
def test_published_files_become_the_pairs_written_by_hand(name):
    found = made(read(str(FILES / name), split="train", where="data.path"))
    line, pairs = PUBLISHED[name]
    assert found.notes[0] == line
    assert turns_only(found.rows) == pairs


@pytest.mark.skipif(not FILES.is_dir(), reason="needs shared/data/layouts")
def test_every_published_file_is_in_the_table():
    assert {path.name for path in FILES.iterdir()} == set(PUBLISHED)


@pytest.mark.skipif(not PANDALM.exists(), reason="needs shared/data/pandalm")
def test_the_majority_of_pandalm():
    """105 ties of 999, as its makers count them; six answers are booleans."""
    found = made(read(str(PANDALM), split="train", where="data.path"))
    assert found.notes[0].startswith("Layout: votes (instruction, response1, response2")
    assert found.notes[0].endswith("999 rows, 888 pairs")
    assert {why: one.count for why, one in found.dropped.items()} == {
        "tie": 105,
        "an answer is a boolean": 6,
    }


@pytest.mark.skipif(not HH.exists(), reason="needs shared/data/hh")
def test_the_whole_of_hh():
    raw = read(str(HH), split="train", where="data.path")
    found = made(raw)
    assert found.notes == (
        "Layout: hh (chosen, rejected as messages): 1,156 rows",
        "5 rows: several Assistant turns in a row, read as one",
    )
    for row, whole in zip(found.rows, raw):
        prompt, chosen, rejected = plain(row)
        assert prompt.endswith("\n\nAssistant:")
        assert (prompt + chosen, prompt + rejected) == (whole["chosen"], whole["rejected"])
        roles = [turn["role"] for turn in [*row["prompt"], *row["chosen"]]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert not any("\n\nHuman:" in turn["content"] for turn in row["prompt"])


# --- each layout, as published elsewhere -------------------------------------------------------

TALK = "\n\nHuman: hi\n\nAssistant:"
ARENA = {"model_a": "tall", "model_b": "wide", "judge": "j", "anony": True}
ONE = {"conversation_a": [user("q"), said("x")], "conversation_b": [user("q"), said("y")]}
CASES = {  # layout: [(a row as published, the pairs it becomes or why it is left out)]
    "trl": [
        (pair(other=1), [pair()]),
        (pair(margin=2, score_chosen=3), [pair(margin=2.0, score_chosen=3.0)]),
        (pair(reference_side="chosen"), [pair(reference_side="chosen")]),
        (
            pair(chosen_score=1.0, rejected_score=3.0),
            [pair(score_chosen=1.0, score_rejected=3.0, margin=0.0)],
        ),
        (pair(system="s"), [chat([system("s"), user("p")], "c", "r")]),
        (chat("p", "c", "r"), [chat("p", "c", "r")]),
        (
            chat([system("s"), user("p")], "c", "r", system="t"),
            [chat([system("s"), user("p")], "c", "r")],
        ),
        # the prompt once more in front of both
        (
            {
                "prompt": [user("p")],
                "chosen": [user("p"), said("c")],
                "rejected": [user("p"), said("r")],
            },
            [chat("p", "c", "r")],
        ),
    ],
    "implicit": [
        (
            {"chosen": [user("p"), said("c")], "rejected": [user("p"), said("r")]},
            [chat("p", "c", "r")],
        ),
        (
            {"chosen": "Q: is it?\nyes, yes", "rejected": "Q: is it?\nyes, no"},
            [{"prompt": "Q: is it?\n", "chosen": "yes, yes", "rejected": "yes, no"}],
        ),
        (
            {"chosen": "it is blue", "rejected": "it is black"},
            [{"prompt": "it is", "chosen": " blue", "rejected": " black"}],
        ),
        # equal pairs are left for the encoding to count
        (
            {"chosen": "a b", "rejected": "a b"},
            [{"prompt": "", "chosen": "a b", "rejected": "a b"}],
        ),
    ],
    "hh": [
        ({"chosen": TALK + " a", "rejected": TALK + " b"}, [chat("hi", "a", "b")]),
        (
            {"chosen": "Be kind." + TALK + " a", "rejected": "Be kind." + TALK + " b"},
            [chat([system("Be kind."), user("hi")], "a", "b")],
        ),
        # a Human turn after the last answer is no answer
        ({"chosen": TALK + " a\n\nHuman: and?", "rejected": TALK + " b"}, [chat("hi", "a", "b")]),
        # two answers in a row
        (
            {"chosen": TALK + " a\n\nAssistant: c", "rejected": TALK + " b"},
            [chat("hi", "a\n\nc", "b")],
        ),
        (
            {"chosen": TALK + " a\n\nAssistant: c", "rejected": TALK + " a\n\nAssistant: d"},
            [chat("hi", "a\n\nc", "a\n\nd")],
        ),
        # the talk goes on after the answers part
        (
            {"chosen": TALK + " a\n\nHuman: ok\n\nAssistant: c", "rejected": TALK + " b"},
            [
                {
                    "prompt": [user("hi")],
                    "chosen": [said("a"), user("ok"), said("c")],
                    "rejected": [said("b")],
                }
            ],
        ),
    ],
    "ultrafeedback": [
        (
            {"prompt": "p ", "chosen": [user("p"), said("c")], "rejected": [user("p"), said("r")]},
            [chat("p", "c", "r")],
        ),
        # the last of the user's turns, as Capybara has it
        (
            {
                "prompt": "q",
                "chosen": [user("p"), said("x"), user("q"), said("c")],
                "rejected": [user("p"), said("x"), user("q"), said("r")],
                "rating_chosen": 5,
                "rating_rejected": 2,
            },
            [
                chat(
                    [user("p"), said("x"), user("q")],
                    "c",
                    "r",
                    score_chosen=5.0,
                    score_rejected=2.0,
                    margin=3.0,
                )
            ],
        ),
        ({"prompt": "p", "chosen": [said("c")], "rejected": [said("r")]}, [chat("p", "c", "r")]),
    ],
    "question": [
        (
            {"query": "q", "system_prompt": "s", "chosen": "c", "rejected": "r"},
            [chat([system("s"), user("q")], "c", "r")],
        ),
        (
            {
                "system": "",
                "input": "q",
                "chosen": "c",
                "rejected": "r",
                "generations": ["c", "r"],
                "rating": [9, 8],
            },
            [chat("q", "c", "r")],
        ),
        ({"qid": 3, "question": "q", "response_j": "c", "response_k": "r"}, [chat("q", "c", "r")]),
    ],
    "sharegpt": [
        (
            {
                "conversations": [{"from": "human", "value": "q"}],
                "chosen": {"from": "gpt", "value": "c"},
                "rejected": {"from": "gpt", "value": "r"},
            },
            [chat("q", "c", "r")],
        ),
        (
            {
                "system": "s",
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                    {"from": "observation", "value": "3"},
                ],
                "chosen": [{"from": "gpt", "value": "c"}],
                "rejected": [{"from": "gpt", "value": "r"}],
            },
            [
                chat(
                    [
                        system("s"),
                        user("q"),
                        {
                            "role": "assistant",
                            "content": "",
                            "tool_calls": [
                                {
                                    "type": "function",
                                    "function": {"name": "f", "arguments": {"x": 1}},
                                }
                            ],
                        },
                        {"role": "tool", "content": "3"},
                    ],
                    "c",
                    "r",
                )
            ],
        ),
    ],
    "openai": [
        (
            {
                "input": {"messages": [user("q")], "tools": [{"type": "function"}]},
                "preferred_output": [said("c")],
                "non_preferred_output": [said("r")],
            },
            [chat("q", "c", "r", tools=[{"type": "function"}])],
        ),
        (
            {
                "input": {
                    "messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]
                },
                "preferred_output": [said("c")],
                "non_preferred_output": [said("r")],
            },
            [chat("q", "c", "r")],
        ),
    ],
    "messages": [
        (
            {"messages": [user("q")], "chosen": [said("c")], "rejected": [said("r")]},
            [chat("q", "c", "r")],
        ),
        (
            {"messages": [user("q")], "chosen": said("c"), "rejected": said("r")},
            [chat("q", "c", "r")],
        ),
        # the column of the prompt is the chosen conversation
        (
            {
                "messages": [user("q"), said("c")],
                "chosen": [user("q"), said("c")],
                "rejected": [user("q"), said("r")],
            },
            [chat("q", "c", "r")],
        ),
    ],
    "verdict": [
        ({"prompt": "p", "response_0": "r", "response_1": "c", "better_response_id": 1}, [pair()]),
        ({"prompt": "p", "response_1": "c", "response_2": "r", "preference": "1"}, [pair()]),
        ({"prompt": "p", "response_1": "c", "response_2": "r", "preference": 0}, "tie"),
        ({"prompt": "p", "response_a": "r", "response_b": "c", "winner": "model_b"}, [pair()]),
        ({"prompt": "p", "response_a": "c", "response_b": "r", "preferred": "A"}, [pair()]),
        ({"prompt": "p", "response_a": "c", "response_b": "r", "winner": "response_a"}, [pair()]),
        (
            {"prompt": "p", "response_a": "c", "response_b": "r", "winner": "tie (bothbad)"},
            "both answers are bad",
        ),
        ({"prompt": "p", "response_a": "c", "response_b": "r", "winner": "Tie"}, "tie"),
        ({"prompt": "p", "response_a": "c", "response_b": "r", "winner": None}, "no verdict"),
        ({"prompt": "p", "answer_a": "r", "answer_b": "c", "winner": "wide", **ARENA}, [pair()]),
        (
            {
                "instruction": "q",
                "input": "",
                "output_1": "r",
                "output_2": "c",
                "preference": 2,
                "strength": 3,
            },
            [chat("q", "c", "r", margin=3.0)],
        ),
    ],
    "shp": [
        (
            {
                "history": "post",
                "human_ref_A": "c",
                "human_ref_B": "r",
                "labels": 1,
                "score_A": 9,
                "score_B": 2,
                "score_ratio": 4.5,
            },
            [chat("post", "c", "r", score_chosen=9.0, score_rejected=2.0, margin=7.0)],
        ),
        (
            {"history": "post", "human_ref_A": "r", "human_ref_B": "c", "labels": 0},
            [chat("post", "c", "r")],
        ),
    ],
    "strength": [
        (
            {"prompt": "p", "response_1": "c", "response_2": "r", "preference_strength": -2},
            [pair(margin=2.0)],
        ),
        (
            {"prompt": "p", "response_1": "r", "response_2": "c", "preference_strength": 3},
            [pair(margin=3.0)],
        ),
        ({"prompt": "p", "response_1": "r", "response_2": "c", "preference_strength": 0}, "tie"),
        (
            {
                "context": [user("p"), said("x"), user("q")],
                "response1": "r",
                "response2": "c",
                "overall_preference": 1,
            },
            [chat([user("p"), said("x"), user("q")], "c", "r", margin=1.0)],
        ),
    ],
    "scores": [
        (
            {
                "question": {"id": "1", "full_text": "q"},
                "answer_0": "r",
                "answer_1": "c",
                "score_0": -0.5,
                "score_1": 0.5,
                "tokens_0": {"x": [1]},
            },
            [chat("q", "c", "r", score_chosen=0.5, score_rejected=-0.5, margin=1.0)],
        ),
        (
            {
                "question": {"id": "1", "full_text": "q"},
                "answer_0": "r",
                "answer_1": "c",
                "score_0": 0.0,
                "score_1": 0.0,
            },
            "tie",
        ),
        (
            {
                "prompt": "p",
                "response_a": "c",
                "response_b": "r",
                "score_a": "2",
                "score_b": "1.5",
            },
            [pair(score_chosen=2.0, score_rejected=1.5, margin=0.5)],
        ),
    ],
    "votes": [
        (
            {
                "instruction": "q",
                "input": "x",
                "response1": "c",
                "response2": "r",
                "annotator1": 1,
                "annotator2": 1,
                "annotator3": 2,
            },
            [chat("q\nx", "c", "r", margin=1.0)],
        ),
        (
            {
                "instruction": "q",
                "input": "",
                "response1": "c",
                "response2": "r",
                "annotator1": 0,
                "annotator2": 0,
                "annotator3": 2,
            },
            "tie",
        ),
    ],
    "flags": [
        (
            {
                "prompt": "p",
                "response_a": "r",
                "response_b": "c",
                "winner_model_a": 0,
                "winner_model_b": 1,
                "winner_tie": 0,
            },
            [pair()],
        ),
        (
            {
                "prompt": "p",
                "response_a": "r",
                "response_b": "c",
                "winner_model_a": 0,
                "winner_model_b": 0,
                "winner_tie": 1,
            },
            "tie",
        ),
        (
            {
                "prompt": '["q", "s"]',
                "response_a": '["c", null]',
                "response_b": '["r", "u"]',
                "winner_model_a": "1",
                "winner_model_b": "0",
                "winner_tie": "0",
            },
            [
                {
                    "prompt": [user("q")],
                    "chosen": [said("c"), user("s"), said("")],
                    "rejected": [said("r"), user("s"), said("u")],
                }
            ],
        ),
    ],
    "arena": [
        ({**ONE, **ARENA, "winner": "model_a", "turn": 1}, [chat("q", "x", "y")]),
        ({**ONE, **ARENA, "winner": "model_b"}, [chat("q", "y", "x")]),
        ({**ONE, **ARENA, "winner": "tie"}, "tie"),
        ({**ONE, **ARENA, "winner": "tie (bothbad)"}, "both answers are bad"),
        ({**ONE, **ARENA, "winner": "both_bad"}, "both answers are bad"),
        # MT-bench judges the first answer of two
        (
            {
                "conversation_a": [user("q"), said("x"), user("s"), said("t")],
                "turn": 1,
                "conversation_b": [user("q"), said("y"), user("s"), said("u")],
                "winner": "model_a",
            },
            [chat("q", "x", "y")],
        ),
        (
            {
                "conversation_a": [user("q"), said("x"), user("s"), said("t")],
                "turn": 2,
                "conversation_b": [user("q"), said("y"), user("s"), said("u")],
                "winner": "model_a",
            },
            [
                {
                    "prompt": [user("q")],
                    "chosen": [said("x"), user("s"), said("t")],
                    "rejected": [said("y"), user("s"), said("u")],
                }
            ],
        ),
    ],
    "choice": [
        (
            {
                "info": {"id": "i", "post": "post", "article": None},
                "choice": 1,
                "summaries": [{"text": "r", "note": None}, {"text": "c", "note": None}],
            },
            [chat("post", "c", "r")],
        ),
        (
            {
                "info": {"id": "i", "post": None, "article": "story"},
                "choice": 0,
                "summaries": [{"text": "c"}, {"text": "r"}],
            },
            [chat("story", "c", "r")],
        ),
    ],
    "ranked": [
        (
            {
                "prompt": "p",
                "answers": [{"answer": "r", "rank": 3.0}, {"answer": "c", "rank": 1.0}],
            },
            [pair(margin=2.0)],
        ),
        (
            {
                "prompt": "p",
                "answers": [{"answer": "r", "rank": 1.0}, {"answer": "c", "rank": 1.0}],
            },
            "tie",
        ),
        ({"prompt": "p", "responses": ["c", "x", "r"], "ranks": [1, 2, 3]}, [pair(margin=2.0)]),
    ],
    "rated": [
        (
            {
                "instruction": "q",
                "models": ["m", "n"],
                "completions": [
                    {"response": "r", "overall_score": 3.5, "model": "m"},
                    {"response": "c", "overall_score": 8, "model": "n"},
                ],
            },
            [chat("q", "c", "r", score_chosen=8.0, score_rejected=3.5, margin=4.5)],
        ),
        (
            {"prompt": "p", "generations": ["c", "r"], "ratings": [4, 1]},
            [pair(score_chosen=4.0, score_rejected=1.0, margin=3.0)],
        ),
        (
            {"prompt": "p", "generations": ["c", "r"], "ratings": [4, None]},
            "fewer than two answers have a rank or score",
        ),
    ],
}


@pytest.mark.parametrize("name", CASES)
def test_rows_of_a_layout(name):
    for raw, becomes in CASES[name]:
        # an arena row may be of fewer columns than others, so each is a file of its own
        found = made([raw])
        assert found.layout.name == name, raw
        if isinstance(becomes, str):
            assert found.rows == [] and found.dropped[becomes].count == 1, raw
            assert found.dropped[becomes].examples == [("a.jsonl, row 1", raw)]
        else:
            assert turns_only(found.rows) == becomes, raw


SINGLE = {
    "kto": [
        ({"prompt": "p", "completion": "c", "label": True}, {"prompt": "p", "completion": "c"}),
        ({"prompt": "p", "completion": "c", "label": "1"}, {"prompt": "p", "completion": "c"}),
        (
            {"prompt": [user("p")], "completion": [said("c")], "label": True},
            {"prompt": [user("p")], "completion": [said("c")]},
        ),
        (
            {"instruction": "p", "input": "x", "output": "c", "kto_tag": True},
            {"prompt": [user("p\nx")], "completion": [said("c")]},
        ),
    ],
    "kto_conversation": [
        (
            {"messages": [user("p"), said("x"), user("q"), said("c")], "label": True},
            {"prompt": [user("p"), said("x"), user("q")], "completion": [said("c")]},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}],
                "kto_tag": True,
            },
            {"prompt": [user("p")], "completion": [said("c")]},
        ),
    ],
    "sft": [
        ({"prompt": "p", "completion": "c", "x": 1}, {"prompt": "p", "completion": "c"}),
        (
            {"instruction": "p", "input": "x", "output": "c"},
            {"prompt": [user("p\nx")], "completion": [said("c")]},
        ),
    ],
    "sft_conversation": [
        (
            {"messages": [system("s"), user("p"), said("x"), user("q"), said("c")]},
            {"prompt": [system("s"), user("p")], "completion": [said("x"), user("q"), said("c")]},
        ),
        (
            {
                "conversations": [{"from": "human", "value": "p"}, {"from": "gpt", "value": "c"}],
                "system": "s",
            },
            {"prompt": [system("s"), user("p")], "completion": [said("c")]},
        ),
    ],
}


@pytest.mark.parametrize("name", SINGLE)
def test_rows_with_one_answer(name):
    for raw, becomes in SINGLE[name]:
        found = made([raw])
        assert found.layout.name == name, raw
        rows = turns_only(found.labelled or found.rows)
        label = {"label": True} if name.startswith("kto") else {}
        assert rows == [{**becomes, **label}], raw


def test_labelled_answers_to_one_prompt_are_paired_in_order_and_the_rest_is_counted():
    def row(prompt, completion, label):
        return {"prompt": prompt, "completion": completion, "label": label}

    raw = [
        *(row("p", "a", True), row("q", "b", False), row("p", "c", False), row("p", "d", False)),
        *(row("q", "e", True), row("p", "f", True), row("p", "g", True), row("s", "h", None)),
    ]
    found = made(raw)
    assert found.rows == [
        {"prompt": "p", "chosen": "a", "rejected": "c"},
        {"prompt": "q", "chosen": "e", "rejected": "b"},
        {"prompt": "p", "chosen": "f", "rejected": "d"},
    ]
    assert found.places == [0, 1, 3] and found.labelled == raw[:7]
    assert found.notes == (
        "Layout: kto (prompt, completion, label as text): 8 rows, 3 pairs",
        "Rows that become no pair: no label: 1, no answer with the other label to the same "
        "prompt: 1",
    )
    alone = found.dropped["no answer with the other label to the same prompt"]
    assert alone.examples == [("a.jsonl, row 7", raw[6])]


LIST = {"prompt": "p", "answers": ["a", "b", "c", "d"], "scores": [1.0, 5.0, 3.0, 3.0]}


@pytest.mark.parametrize(
    "pairing, becomes",
    [
        ("best_worst", [("b", "a")]),
        ("adjacent", [("b", "c"), ("d", "a")]),
        ("all", [("b", "c"), ("b", "d"), ("b", "a"), ("c", "a"), ("d", "a")]),
    ],
)
def test_pairs_of_a_list_of_answers(pairing, becomes):
    found = made([LIST], pairing=pairing)
    assert [(row["chosen"], row["rejected"]) for row in found.rows] == becomes
    assert found.places == [0] * len(becomes)
    score = dict(zip(LIST["answers"], LIST["scores"]))
    for row in found.rows:
        assert row["margin"] == score[row["chosen"]] - score[row["rejected"]] > 0


def test_a_random_worse_answer_is_the_seed_s_and_the_row_s_own():
    raw = [{**LIST, "prompt": f"p{n}"} for n in range(60)]
    some = made(raw, pairing="best_random", seed=1).rows
    assert {row["rejected"] for row in some} == {"a", "c", "d"}
    assert {row["chosen"] for row in some} == {"b"}
    assert made(raw[30:], pairing="best_random", seed=1).rows == some[30:]
    assert made(raw, pairing="best_random", seed=2).rows != some


# --- how they are recognised -------------------------------------------------------------------


def test_all_rows_are_looked_at_and_not_the_first():
    assert made([pair(), pair(score_chosen=1.0)]).layout.name == "trl"
    told = message(made, [pair(), pair(), {"prompt": "p", "completion": "c", "label": True}])
    assert told.startswith("a.jsonl, row 3: no field 'chosen' (found prompt, completion, label)")
    kto = {"prompt": "p", "completion": "c", "label": True}
    told = message(made, [{"prompt": "p", "completion": "c"}, kto, kto])
    assert told.startswith("a.jsonl, row 1: no field 'label' (found prompt, completion)")
    hh = {"chosen": TALK + " a", "rejected": TALK + " b"}
    told = message(made, [hh, hh, {"chosen": "it is", "rejected": "it was"}])
    assert told.startswith("a.jsonl, row 3: 'chosen' is text, and the layout hh has a transcript")


def test_two_that_fit_equally_well_are_both_named():
    both = {"prompt": "p", "question": "q", "chosen": "c", "rejected": "r"}
    told = message(made, [both])
    assert told == (
        "a.jsonl: its columns fit the layouts question and trl equally well: choose one, "
        "data.layout=question"
    )
    assert made([both], "trl").rows == [pair()]
    assert turns_only(made([both], "question").rows) == [chat("q", "c", "r")]


def test_the_narrower_kind_decides_between_two_that_read_as_much():
    raw = {"prompt": "p", "response_1": "r", "response_2": "c", "overall_preference": 2}
    assert made([raw]).rows == [pair(margin=2.0)]
    (row,) = made([{**raw, "overall_preference": "Response 2"}]).rows
    assert row == pair()


def test_a_forced_layout():
    hh = [{"chosen": TALK + " a", "rejected": TALK + " b"}]
    assert made(hh, "implicit").rows == [{"prompt": TALK, "chosen": " a", "rejected": " b"}]
    assert "data.layout=nectar: no such layout: choose one of arena, choice" in message(
        made, hh, "nectar"
    )
    told = message(made, hh, "trl")
    assert told.startswith("a.jsonl, row 1: no field 'prompt' (found chosen, rejected)")
    told = message(made, [pair()], "hh", columns={"system": "prompt"})
    assert told.startswith("data.columns.system: layout hh has no such role: it has chosen")


def test_an_unknown_file_is_told_what_it_lacks():
    raw = [{"ask": "one two three four five six seven", "good": "yes", "bad": None, "n": 3}] * 2
    assert message(made, raw) == (
        "a.jsonl: no layout fits its columns ask (one two three four five ...), good (yes), n "
        "(3); the nearest, trl, lacks prompt and rejected; say which is which: "
        "data.columns.prompt=ask data.columns.chosen=good data.columns.rejected=bad"
    )


def test_columns_of_the_user():
    raw = [{"q": "p", "best": {"text": "c"}, "all": [{"text": "x"}, {"text": "r"}], "sys": "s"}]
    columns = {"prompt": "q", "chosen": "best.text", "rejected": "all.1.text"}
    found = made(raw, columns=columns)
    assert found.rows == [pair()]
    assert found.notes == (
        "Layout: trl (prompt=q, chosen=best.text, rejected=all.1.text as text): 1 rows",
    )
    turned = made(raw, columns={**columns, "system": "sys"})
    assert turns_only(turned.rows) == [chat([system("s"), user("p")], "c", "r")]
    told = message(made, raw, columns={**columns, "chosen": "beste.text"})
    assert told.startswith("data.columns.chosen=beste.text: a.jsonl has no such column; it has q")
    safe = {"prompt": "p", "response_0": "c", "response_1": "r", "better_response_id": 1}
    safer = made([{**safe, "safer_response_id": 0}], columns={"label": "safer_response_id"})
    assert safer.rows == [pair()] and "label=safer_response_id" in safer.notes[0]


@pytest.mark.parametrize(
    "raw, fragment",
    [
        ({"prompt": "p", "response_0": "c", "response_1": "r", "better_response_id": 2},
         "the verdict is '2', and it can be 0 and 1"),
        ({"prompt": "p", "response_a": "c", "response_b": "r", "winner": 1},
         "the verdict is '1', and it can be a and b"),
        ({"prompt": "p", "response_0": "c", "response_1": "r", "better_response_id": -1},
         "the verdict is '-1'"),
        ({"history": "p", "human_ref_A": "c", "human_ref_B": "r", "labels": 2},
         "the verdict is '2', and it can be 1 and 0"),
        ({"prompt": "q", "chosen": [user("p"), said("c")], "rejected": [user("p"), said("r")]},
         "the prompt is none of the user's turns"),
        ({"prompt": "p", "completion": "c", "label": 3}, "the label is 3: make it true or false"),
        ({"messages": [user("p")], "label": True}, "no turn of the assistant's"),
        ({"conversations": [{"from": "elf", "value": "q"}],
          "chosen": {"from": "gpt", "value": "c"},
          "rejected": {"from": "gpt", "value": "r"}}, "a turn is from 'elf'"),
        ({"prompt": "p", "answers": ["a", "b"], "ranks": [1]}, "2 answers and 1 ranks"),
        ({"chosen": "yes", "rejected": "yesterday"}, "share no word to be the prompt"),
        ({"chosen": TALK + " a", "rejected": "\n\nHuman: ho\n\nAssistant: b"}, "share no turn"),
        (pair(margin=-1), "margin is -1.0: make it 0 or more"),
        ({**chat("p", "c", "r"), "prompt": [{"role": "user", "content": [{"type": "image"}]}]},
         "a part of 'content' is image"),
    ],
)  # fmt: skip
def test_rows_that_say_what_cannot_be_meant(raw, fragment):
    told = message(made, [raw])
    assert told.startswith("a.jsonl, row 1: ") and fragment in told


USER, GOOD, BAD = user("hi"), said("a"), said("b")


@pytest.mark.parametrize(
    "row, fragment",
    [
        ({"prompt": "p", "chosen": "c"}, "no field 'rejected' (found prompt, chosen)"),
        ({}, "no field 'prompt' (found nothing)"),
        ({"messages": []}, "no field 'prompt' (found messages)"),
        (pair(chosen=3), "'chosen' is a number"),
        (pair(chosen=None), "'chosen' is null"),
        (pair(prompt=None), "'prompt' is null"),
        (pair(rejected=True), "'rejected' is a boolean"),
        (pair(chosen=[GOOD]), "prompt is text, chosen is a list of messages, rejected is text"),
        (pair(chosen="\ud800"), "half a surrogate pair"),
        (pair(answer=["18"]), "'answer' is a list"),
        (pair(tools=3), "'tools' is a number"),
        (pair(tools="[{"), "broken JSON"),
        (pair(chat_template_kwargs=[]), "'chat_template_kwargs' is an empty list"),
        (
            {"prompt": [USER], "chosen": [{"role": "robot", "content": ""}], "rejected": [BAD]},
            "'chosen', turn 1 has the unknown role 'robot'",
        ),
        ({"prompt": [USER], "chosen": ["a"], "rejected": [BAD]}, "'chosen' is a list of texts"),
        (
            {"prompt": [USER], "chosen": [{"role": "user", "content": 3}], "rejected": [BAD]},
            "'content' is a number",
        ),
    ],
)
def test_rows_that_are_refused_wherever_they_stand(row, fragment):
    told = message(made, [pair(), pair(), row])
    assert told.startswith("a.jsonl, row 3: ") and fragment in told


def test_explicit_rows_keep_their_optional_columns():
    row = pair(answer=18, tools='[{"name": "f"}]', chat_template_kwargs={"x": 1}, other=1)
    (normal,) = made([row]).rows
    assert normal == pair(answer="18", tools=[{"name": "f"}], chat_template_kwargs={"x": 1})
    assert made([pair(answer=None, tools=None)]).rows == [pair()]


def test_messages_that_stand_in_a_cell_as_json():
    cells = {name: json.dumps(turns) for name, turns in chat("p", "c", "r").items()}
    assert made([cells]).rows == [chat("p", "c", "r")]
    assert made([pair(chosen='[{"x": 1}]')]).rows == [pair(chosen='[{"x": 1}]')]


def test_nulls_that_arrow_adds_to_messages_are_removed():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    row = {"prompt": [USER], "chosen": [called], "rejected": [{**BAD, "tool_calls": None}]}
    (normal,) = made([row]).rows
    assert normal["chosen"] == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert normal["rejected"] == [BAD]


# --- prompts that have to be found -------------------------------------------------------------


def test_implicit_text_is_split_after_the_last_declared_separator():
    shared = "\n\nHuman: hi\n\nAssistant: hm\n\nHuman: well\n\nAssistant:"
    row = {"chosen": shared + " yes\n\nAssistant: a", "rejected": shared + " yesterday"}
    found = made([row], separator="\n\nAssistant:")
    assert found.layout.name == "implicit"
    assert found.rows == [
        {"prompt": shared, "chosen": " yes\n\nAssistant: a", "rejected": " yesterday"}
    ]
    told = message(made, [{"chosen": "Q: a", "rejected": "P: b"}], separator="Q:")
    assert "row 1: no 'Q:' in the beginning" in told


@given(st.text("ab|", max_size=12), st.text("ab|", max_size=6), st.text("ab|", max_size=6))
def test_an_implicit_split_loses_nothing(shared, one, other):
    row = {"chosen": shared + "|" + one, "rejected": shared + "|" + other}
    (normal,) = made([row], separator="|").rows
    assert normal["prompt"] + normal["chosen"] == row["chosen"]
    assert normal["prompt"] + normal["rejected"] == row["rejected"]
    if one != other:
        assert normal["prompt"].endswith("|") and normal["prompt"].startswith(shared)


def test_where_a_prompt_ends_is_said_and_counted():
    raw = [
        {"chosen": "it is blue", "rejected": "it is black"},
        {"chosen": "so it is\nblue", "rejected": "so it is\nblack"},
        {"chosen": "it was blue", "rejected": "it was black"},
    ]
    assert made(raw).notes[1:] == (
        "2 rows: no prompt: it ends at the last word of what both answers begin with",
        "1 rows: no prompt: it ends at the last line break of what both answers begin with",
    )


def test_what_a_tokenizer_without_a_template_is_given():
    (row,) = made(
        [{"chosen": "Be kind." + TALK + " a", "rejected": "Be kind." + TALK + " b"}]
    ).rows
    assert plain(row) == ["Be kind." + TALK, " a", " b"]
    cut = {"chosen": TALK + " a\n\nHuman: and?", "rejected": TALK + " b"}
    found = made([cut])
    assert plain(found.rows[0]) == [TALK, " a", " b"]
    assert found.notes[1] == "1 rows: an answer ends in a Human turn, which is cut off"
    ranked = {"prompt": TALK + " ", "answers": ["c", "r"], "ranks": [1, 2]}
    assert plain(made([ranked]).rows[0]) == [TALK, " c", " r"]
    asked = {"system": "s", "question": "q", "chosen": "c", "rejected": "r"}
    assert plain(made([asked]).rows[0]) == ["s\n\nq\n\n", "c", "r"]
    assert "plain" not in made([chat("p", "c", "r")]).rows[0]


@given(st.lists(st.sampled_from(["Human", "Assistant"]), min_size=1, max_size=6), st.text("ab "))
def test_a_transcript_loses_no_word(speakers, text):
    talk = TALK + "".join(f" {text}x{n}\n\n{who}:" for n, who in enumerate(speakers)) + " e"
    (row,) = made(
        [{"chosen": talk + "\n\nAssistant: f", "rejected": talk + "\n\nAssistant: g"}]
    ).rows
    words = " ".join(turn["content"] for turn in [*row["prompt"], *row["chosen"]])
    assert words.split() == [w for w in talk.split() if not w.endswith(":")] + ["f"]
    roles = [turn["role"] for turn in [*row["prompt"], *row["chosen"]]]
    assert all(a != b for a, b in zip(roles, roles[1:])) and roles[-1] == "assistant"


@pytest.mark.parametrize(
    "value, kind",
    [
        (None, "null"),
        (float("nan"), "null"),
        (True, "bool"),
        (3, "number"),
        ("3.5", "numeral"),
        ("True", "truth"),
        ("x", "text"),
        ("say Human: and Assistant: hi", "text"),
        (TALK, "transcript"),
        ([], "empty"),
        ([None, "x"], "texts"),
        ([None, 2.0], "numbers"),
        ([USER], "messages"),
        ([{"from": "gpt", "value": "x"}], "turns"),
        ([{"x": 1}], "objects"),
        ([[1]], "list"),
        (b"x", "binary"),
    ],
)
def test_kinds(value, kind):
    assert kinds_of({"a": value})["a"] == kind


def test_a_layout_of_the_user_s(tmp_path, monkeypatch):
    """A function and a yaml; the yaml may also take the place of one of the package's."""
    (tmp_path / "mine.yaml").write_text(json.dumps({
        "_target_": "spo_lightning.data.layouts.given.answered", "gives": "pairs",
        "needs": {"question": {"text": ["ask"]}, "chosen": {"text": ["ok"]},
                  "rejected": {"text": ["ko"]}},
    }))  # fmt: skip
    monkeypatch.setattr(layouts.known, "_folders", [*layouts.known.folders(), tmp_path])
    raw = [{"ask": "q", "ok": "c", "ko": "r"}]
    assert turns_only(made(raw).rows) == [chat("q", "c", "r")]
    (tmp_path / "mine.yaml").write_text("gives: words\n")
    assert message(made, raw).startswith(f"{tmp_path}/mine.yaml: no layout: it needs _target_")


def test_labelled_answers_are_no_texts():
    raw = Rows([("kto.jsonl", 1, {"prompt": "a", "completion": "b", "label": False})])
    with pytest.raises(UserError, match="kto.jsonl: the layout kto says which answers are good"):
        layouts.normalised(raw, "kto.jsonl", (layouts.TEXTS,))
