"""Tokens on disk: the same as anew, missed when what decides them differs, never wrong."""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
from conftest import SMALL
from fitting import config
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import policy

from spo_lightning.cache import tokens
from spo_lightning.cache.tokens import CHECK, SUFFIX, Tokens, name_of
from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import COUNTS, Encoded, encode_some
from spo_lightning.train import train

HOW = {"max_length": 64, "on_mismatch": "split", "strict": False, "scored": "assistant"}
ROWS = [{"prompt": f"{n}+{n}=", "chosen": str(2 * n), "rejected": str(n)} for n in range(1, 10)]
ROWS.append({"prompt": "1+1=", "chosen": "2", "rejected": "2"})  # dropped: identical


@pytest.fixture
def tokenizer():
    return policy().tokenizer


@pytest.fixture
def kept(tmp_path, tokenizer):
    return Tokens(tmp_path / "tokens", name_of(tokenizer), 1e9)


def found(kept, tokenizer, rows=ROWS, places=None, **changed):
    """What is found, and whether the tokenizer was asked."""
    how, asked = HOW | changed, []
    places = range(len(rows)) if places is None else places

    def encode():
        asked.append(True)
        return encode_some(rows, tokenizer, places, where="a.jsonl", **how)

    return kept.find(rows, places, how, encode), bool(asked)


def files(kept):
    return sorted(kept.home.glob(f"*/*{SUFFIX}"))


def test_the_second_time_nothing_is_tokenised(kept, tokenizer):
    first, asked = found(kept, tokenizer)
    assert asked and len(first.pairs) == 9 and first.counts["dropped/identical"] == 1
    assert found(kept, tokenizer) == (first, False)
    assert len(files(kept)) == 1 and not list(kept.home.rglob("*.tmp"))


PAIRS = st.lists(st.tuples(*(st.lists(st.integers(0, 2**31 - 1)).map(tuple),) * 5))


@settings(max_examples=25, deadline=None)
@given(pairs=PAIRS, counts=st.lists(st.integers(0, 2**40), min_size=7, max_size=7))
def test_any_pairs_come_back(tmp_path_factory, pairs, counts):
    kept = Tokens(tmp_path_factory.mktemp("tokens"), "any", 1e9)
    told = [(None, 0.5, 2.0)[n % 3] for n in range(len(pairs))]
    made = [Pair(*ids[:3], 3 * n, *ids[3:], told[n], told[n - 1]) for n, ids in enumerate(pairs)]
    whole = Encoded(made, dict(zip(COUNTS, counts)))
    for encode in (lambda: whole, None):
        assert kept.find(ROWS, range(len(ROWS)), HOW, encode) == whole


@pytest.mark.parametrize(
    "changed",
    [
        {"rows": [{**ROWS[0], "prompt": "1+1 ="}, *ROWS[1:]]},
        {"rows": [{**ROWS[0], "chosen": "3"}, *ROWS[1:]]},
        {"rows": [*ROWS[1:], ROWS[0]]},
        {"rows": ROWS[:-1]},
        {"places": range(1, len(ROWS) + 1)},
        {"max_length": 63},
        {"on_mismatch": "drop"},
        {"scored": "all"},
        {"rows": [{**ROWS[0], "plain": {"prompt": "1 + 1 ="}}, *ROWS[1:]]},
        {"rows": [{**ROWS[0], "reference_side": "chosen"}, *ROWS[1:]]},
        {"strict": True, "rows": ROWS[:-1]},
    ],
)
def test_what_differs_is_missed(kept, tokenizer, changed):
    found(kept, tokenizer)
    other, asked = found(kept, tokenizer, **changed)
    assert asked
    assert found(kept, tokenizer, **changed) == (other, False)


def test_what_no_token_depends_on_is_found(kept, tokenizer):
    first, _ = found(kept, tokenizer)
    assert found(kept, tokenizer, [{**row, "answer": "7"} for row in ROWS]) == (first, False)


@pytest.mark.parametrize("change", ["token", "template", "end", "kind"])
def test_another_tokenizer_has_another_name(tokenizer, change):
    name = name_of(tokenizer)
    assert name == name_of(policy().tokenizer)
    if change == "token":
        tokenizer.add_tokens(["zzz"])
    elif change == "template":
        tokenizer.chat_template = "{{ messages }}"
    elif change == "end":
        tokenizer.eos_token = "a"
    else:
        tokenizer.backend_tokenizer.post_processor = None
        tokenizer.backend_tokenizer.pre_tokenizer = None
    assert name_of(tokenizer) not in (None, name)


def test_a_tokenizer_that_cannot_be_named(tokenizer):
    """One that asks the time, one of its own code, and one in Python."""
    tokenizer.chat_template = "{{ strftime_now('%d') }}{{ messages }}"
    assert name_of(tokenizer) is None

    class Own(type(tokenizer)):
        """From a checkpoint's own files."""

    own = Own(tokenizer_object=tokenizer.backend_tokenizer)
    assert name_of(own) is None


@pytest.mark.parametrize("damage", ["empty", "half", "check", "first", "last"])
def test_a_damaged_file_is_noticed(kept, tokenizer, damage, caplog):
    first, _ = found(kept, tokenizer)
    (path,) = files(kept)
    good = path.read_bytes()
    flipped = {"check": 3, "first": CHECK, "last": len(good) - 1}
    if damage in flipped:
        bad = bytearray(good)
        bad[flipped[damage]] ^= 1
    else:
        bad = good[: {"empty": 0, "half": len(good) // 2}[damage]]
    path.write_bytes(bad)
    assert found(kept, tokenizer) == (first, True)
    (line,) = caplog.messages
    assert str(path) in line and "tokenised anew" in line and "\n" not in line
    assert path.read_bytes() == good
    assert found(kept, tokenizer) == (first, False)


def test_a_place_that_cannot_be_written(tmp_path, kept, tokenizer, caplog):
    (tmp_path / "tokens").write_text("a file, not a directory")
    first, asked = found(kept, tokenizer)
    assert asked and len(first.pairs) == 9
    assert "no tokens kept" in caplog.messages[-1]


def test_many_writers_leave_one_file(kept, tokenizer):
    own = [policy().tokenizer for _ in range(4)]
    with ThreadPoolExecutor(4) as pool:
        all_found = [one for one, _ in pool.map(lambda mine: found(kept, mine), own)]
    assert all(one == all_found[0] for one in all_found)
    assert len(files(kept)) == 1 and not list(kept.home.rglob("*.tmp"))


def test_the_least_recently_used_go_first(kept, tokenizer):
    for start in range(3):
        found(kept, tokenizer, ROWS[start : start + 3])
    size = max(path.stat().st_size for path in files(kept))
    for path in files(kept):
        os.utime(path, (0, 0))  # long ago: a clock's ticks are longer than this test
    found(kept, tokenizer, ROWS[:3])  # now the latest
    found(replace(kept, limit=2.5 * size), tokenizer, ROWS[3:6])
    assert len(files(kept)) == 2
    assert not found(kept, tokenizer, ROWS[:3])[1]
    assert found(kept, tokenizer, ROWS[1:4])[1]


@pytest.fixture
def tokenised(monkeypatch):
    """Counts the times that pairs are tokenised."""
    calls = []

    def spied(encode, rows, *args, **how):
        calls.append(len(rows))
        return encode(rows, *args, **how)

    for name in ("encode_pairs", "encode_some"):
        monkeypatch.setattr(tokens, name, partial(spied, getattr(tokens, name)))
    return calls


def ran(tmp_path, name, *words):
    cfg = config(*SMALL, "max_steps=2", f"cache.dir={tmp_path / 'cache'}", *words)
    numbers = train(cfg, tmp_path / name)
    return {key: value for key, value in numbers.items() if key != "seconds"}


def test_runs_share_their_tokens(tmp_path, tokenised):
    first = ran(tmp_path, "first", "loss=dpo")
    assert len(tokenised) == 2  # training and held-out rows
    assert ran(tmp_path, "second", "loss=dpo") == first
    ran(tmp_path, "third", "loss=ipo", "loss.beta=0.3", "optimizer.lr=1e-3")
    assert len(tokenised) == 2
    assert ran(tmp_path, "off", "loss=dpo", "cache.enabled=false") == first
    assert len(tokenised) == 4


def test_a_streamed_file_is_tokenised_once(tmp_path, tokenised):
    """The second epoch and the next run read what the first epoch made."""
    data = tmp_path / "rows.jsonl"
    rows = [{**row, "prompt": f"{n}:"} for n, row in enumerate(ROWS[:-1] * 4)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    stream = ("data=pairs", f"data.path={data}", "data.stream=true", "data.chunk_rows=12")
    small = [word for word in SMALL if not word.startswith(("data", "sft."))]

    def streamed(name):
        # 36 rows and 16 steps of 4: nearly two epochs
        cfg = config(*small, *stream, "max_steps=16", f"cache.dir={tmp_path / 'cache'}")
        numbers = train(cfg, tmp_path / name)
        return {key: value for key, value in numbers.items() if key != "seconds"}

    first = streamed("first")
    assert sum(tokenised) <= 36 + 12
    times = len(tokenised)
    assert streamed("second") == first
    assert len(tokenised) == times
