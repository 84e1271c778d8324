"""Every row that is refused, and the split by prompt."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from written import placed

from spo_lightning.data.rows import (
    completion_rows,
    held_out,
    limit,
    preference_rows,
    split,
    without,
)
from spo_lightning.errors import UserError

USER, OTHER = {"role": "user", "content": "hi"}, {"role": "user", "content": "ho"}
GOOD, BAD = {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}


def message(call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_validation_imports_nothing_heavy():
    code = (
        "import sys, spo_lightning.data.rows, spo_lightning.data.pairs, spo_lightning.data.load\n"
        "print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ran.stdout.strip() == "[]", ran


def pair(**changed):
    return {"prompt": "p", "chosen": "c", "rejected": "r", **changed}


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
        (pair(rejected={"role": "user"}), "'rejected' is an object"),
        (pair(chosen=[GOOD]), "prompt is text, chosen is a list, rejected is text"),
        (pair(chosen="\ud800"), "half a surrogate pair"),
        (pair(answer=["18"]), "'answer' is a list"),
        (pair(tools=3), "'tools' is a number"),
        (pair(tools="[{"), "broken JSON"),
        (pair(chat_template_kwargs=[]), "'chat_template_kwargs' is a list"),
        (
            {"prompt": [USER], "chosen": [{"role": "robot", "content": ""}], "rejected": [BAD]},
            "'chosen', turn 1 has the unknown role 'robot'",
        ),
        ({"prompt": [USER], "chosen": ["a"], "rejected": [BAD]}, "turn 1 is not a message"),
        (
            {"prompt": [USER], "chosen": [{"role": "user", "content": 3}], "rejected": [BAD]},
            "'content' is a number",
        ),
        ({"prompt": "p", "completion": "c", "label": True}, "KTO rows"),
        ({"chosen": "xa", "rejected": "xb"}, "set data.separator"),
        ({"chosen": [USER, GOOD], "rejected": [OTHER, BAD]}, "share no turn"),
    ],
)
def test_rows_that_are_refused_wherever_they_stand(row, fragment):
    told = message(preference_rows, placed([pair(), pair(), row], "a.jsonl"), None)
    assert told.startswith("a.jsonl, row 3: ") and fragment in told


def test_explicit_rows_keep_their_optional_columns():
    row = pair(answer=18, tools='[{"name": "f"}]', chat_template_kwargs={"x": 1}, other=1)
    (normal,) = preference_rows(placed([row]), None)
    assert normal == pair(answer="18", tools=[{"name": "f"}], chat_template_kwargs={"x": 1})
    assert preference_rows(placed([pair(answer=None, tools=None)]), None) == [pair()]


def test_implicit_text_is_split_after_the_last_declared_separator():
    shared = "\n\nHuman: hi\n\nAssistant: hm\n\nHuman: well\n\nAssistant:"
    row = {"chosen": shared + " yes\n\nAssistant: a", "rejected": shared + " yesterday"}
    (normal,) = preference_rows(placed([row]), "\n\nAssistant:")
    assert normal == {
        "prompt": shared,
        "chosen": " yes\n\nAssistant: a",
        "rejected": " yesterday",
    }
    told = message(preference_rows, placed([{"chosen": "Q: a", "rejected": "P: b"}]), "Q:")
    assert "row 1: no 'Q:' in the beginning" in told


@given(st.text("ab|", max_size=12), st.text("ab|", max_size=6), st.text("ab|", max_size=6))
def test_an_implicit_split_loses_nothing(shared, one, other):
    row = {"chosen": shared + "|" + one, "rejected": shared + "|" + other}
    (normal,) = preference_rows(placed([row]), "|")
    assert normal["prompt"] + normal["chosen"] == row["chosen"]
    assert normal["prompt"] + normal["rejected"] == row["rejected"]
    assert normal["prompt"].endswith("|") and normal["prompt"].startswith(shared)


def test_implicit_messages_are_split_at_turns():
    system = {"role": "system", "content": "be brief"}
    row = {"chosen": [system, USER, GOOD], "rejected": [system, USER, BAD, OTHER, GOOD]}
    (normal,) = preference_rows(placed([row]), None)
    assert normal["prompt"] == [system, USER]
    assert normal["chosen"] == [GOOD] and normal["rejected"] == [BAD, OTHER, GOOD]


def test_nulls_that_arrow_adds_to_messages_are_removed():
    called = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    row = {"prompt": [USER], "chosen": [called], "rejected": [{**BAD, "tool_calls": None}]}
    (normal,) = preference_rows(placed([row]), None)
    assert normal["chosen"] == [{"role": "assistant", "tool_calls": [{"name": "f"}]}]
    assert normal["rejected"] == [BAD]


def test_degenerate_pairs_are_left_for_the_encoding_to_count():
    rows = [pair(chosen=""), pair(chosen="r"), {"chosen": "", "rejected": "x"}]
    assert len(preference_rows(placed(rows), None)) == 3


def test_completion_rows():
    assert completion_rows(placed([{"prompt": "p", "completion": "c", "x": 1}])) == [
        {"prompt": "p", "completion": "c"}
    ]
    assert "row 1: no field 'completion'" in message(completion_rows, placed([{"prompt": "p"}]))


PROMPTS = st.lists(
    st.text(st.characters(codec="utf-8"), max_size=8)
    | st.builds(lambda text: [{"role": "user", "content": text}], st.text("ab", max_size=3)),
    max_size=30,
)


@given(PROMPTS, st.floats(0, 0.99))
def test_the_split_is_disjoint_complete_and_two_sided(prompts, fraction):
    rows = [{"prompt": prompt, "n": n} for n, prompt in enumerate(prompts)]
    train, held = split(rows, fraction)
    assert sorted(row["n"] for row in train + held) == list(range(len(rows)))
    assert not [row for row in train if row["prompt"] in [other["prompt"] for other in held]]
    if fraction and len({json.dumps(prompt) for prompt in prompts}) > 1:
        assert train and held
    assert (train, held) == split(rows, fraction)


@given(st.text("abc", max_size=9), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_holds_out_more(prompt, one, other):
    assert held_out(prompt, min(one, other)) <= held_out(prompt, max(one, other))
    assert not held_out(prompt, 0) and held_out(prompt, 1)


def test_the_share_held_out_is_the_fraction_and_does_not_change():
    share = sum(held_out(f"prompt {n}", 0.1) for n in range(20000)) / 20000
    assert share == pytest.approx(0.1, abs=0.01)
    # the first 8 bytes of sha256("a") and sha256("b") over 2**64: 0.7914, 0.2427
    assert held_out("b", 0.25) and not held_out("b", 0.24)
    assert held_out("a", 0.8) and not held_out("a", 0.79)
    assert "data.eval_fraction=1" in message(split, [], 1)


def test_the_order_of_a_message_s_keys_does_not_move_it():
    turned = dict(reversed(USER.items()))
    assert without([{"prompt": [turned]}], [{"prompt": [USER]}]) == []
    assert all(held_out([USER], f / 50) == held_out([turned], f / 50) for f in range(50))


def test_limit_is_seeded_and_ordered():
    rows = [{"prompt": str(n)} for n in range(100)]
    some = limit(rows, 10, 0)
    assert some == limit(rows, 10, 0) != limit(rows, 10, 1)
    assert len(some) == 10 and [r for r in rows if r in some] == some
    assert limit(rows, None, 0) is rows and "data.max_rows=0" in message(limit, rows, 0, 0)
    assert without(rows, some) == [row for row in rows if row not in some]
