"""Every row that is refused, and the split by prompt."""

import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spo_lightning.data.rows import (
    held_out,
    limit,
    split,
    without,
)
from spo_lightning.errors import UserError

USER = {"role": "user", "content": "hi"}


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
