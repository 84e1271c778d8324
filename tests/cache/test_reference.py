"""Reference log-probabilities are scored once, found again bit for bit, and never wrong."""

import contextlib
import gc
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SMALL, environment
from fitting import PAD_ID, config
from tiny import lora, policy, random_pairs, with_context

from spo_lightning.cache import reference, shards
from spo_lightning.cache.reference import files_name, row_key, weights_name, with_reference
from spo_lightning.cache.shards import Shards
from spo_lightning.config import knobs
from spo_lightning.data.batch import Pair, epoch_order
from spo_lightning.data.encode import encode_pairs
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import Interrupted, UserError
from spo_lightning.models import policy as policies
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.progress import silent
from spo_lightning.train import train

PLAIN = contextlib.nullcontext
NAME = "reference"


@pytest.fixture
def made():
    return policy(dtype="float32", num_hidden_layers=1)


@pytest.fixture
def shelf(tmp_path):
    return Shards(tmp_path / "home", NAME, 1e9)


@pytest.fixture
def rows():
    """Ragged rows of numbers that no arithmetic gives by chance."""
    seeded = torch.Generator().manual_seed(0)
    sizes = [1, 5, 2, 9, 3, 17]
    return {bytes([n] * 16): -torch.rand(size, generator=seeded) for n, size in enumerate(sizes)}


class Counting(Scorer):
    """Counts forwards and rows."""

    def __init__(self, lm):
        super().__init__(lm, True)
        self.forwards = self.rows = 0

    def forward(self, batch):
        self.forwards += 1
        self.rows += len(batch)
        return super().forward(batch)


def sets_of(pairs, **more):
    return {name: Pairs(some, None, PAD_ID) for name, some in {"train": pairs, **more}.items()}


def scored(made, sets, shelf, batch_size=5, stages=None, **more):
    """The sets with their reference, and the scorer that was at hand."""
    judge = Counting(made.lm)
    found = with_reference(
        sets,
        shelf,
        lambda: judge,
        batch_size=batch_size,
        precision=PLAIN,
        stages=silent() if stages is None else stages,
        **more,
    )
    return found, judge


def same(found, other):
    assert found.keys() == other.keys()
    for name in found:
        mine, theirs = found[name].references, other[name].references
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(mine, theirs, strict=True)
        )


def files(shelf):
    return sorted(shelf.room.glob("*.rows"))


# -- rows on disk


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_come_back_bit_for_bit(shelf, rows, dtype):
    rows = {key: row.to(dtype) for key, row in rows.items()}
    shelf.keep(rows)
    found = shelf.find([*rows, b"x" * 16])
    assert found.keys() == rows.keys()
    assert all(torch.equal(found[k], rows[k]) and found[k].dtype == dtype for k in rows)
    few = dict(list(rows.items())[2:4])
    assert shelf.find(few.keys()).keys() == few.keys()
    assert not replace(shelf, name="another").find(rows.keys())


def test_a_row_found_does_not_hold_its_shard(shelf, rows):
    shelf.keep(rows)
    (row,) = shelf.find([next(iter(rows))]).values()
    assert row.untyped_storage().nbytes() == row.nbytes


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_kept(shelf, rows, bad, caplog):
    first, *rest = rows
    rows[first][-1] = bad
    shelf.keep(rows)
    assert shelf.find(rows.keys()).keys() == set(rest)
    assert caplog.text.count("not finite") == 1
    shelf.keep({first: rows[first]})
    assert len(files(shelf)) == 1


def test_any_flipped_byte_is_noticed(shelf, rows, caplog):
    shelf.keep(rows)
    (path,) = files(shelf)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(
            whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :]
        )
        caplog.clear()
        assert shelf.find(rows.keys()) == {}, place
        assert len(caplog.records) == 1
        assert not path.exists()
    shelf.keep(rows)
    assert len(shelf.find(rows.keys())) == len(rows)


def test_any_truncation_is_noticed(shelf, rows):
    shelf.keep(rows)
    (path,) = files(shelf)
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        assert shelf.find(rows.keys()) == {}, size
    path.write_bytes(whole + b"\0")
    assert shelf.find(rows.keys()) == {}


def test_a_shard_under_another_name_is_noticed(shelf, rows):
    """Somebody moved a file from one reference's directory to another's."""
    shelf.keep(rows)
    (path,) = files(shelf)
    other = replace(shelf, name="another")
    other.room.mkdir()
    shutil.copy(path, other.room)
    assert other.find(rows.keys()) == {}


def test_a_damaged_shard_costs_only_its_own_rows(shelf, rows):
    halves = dict(list(rows.items())[:3]), dict(list(rows.items())[3:])
    for half in halves:
        shelf.keep(half)
    files(shelf)[0].write_bytes(b"")
    assert len(shelf.find(rows.keys())) == 3


def test_what_cannot_be_read_now_is_not_removed(shelf, rows, monkeypatch, caplog):
    shelf.keep(rows)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_index", lambda *_: (_ for _ in ()).throw(OSError("no route")))
        assert shelf.find(rows.keys()) == {}
    assert "no route" in caplog.text
    assert len(shelf.find(rows.keys())) == len(rows)


def test_the_least_recently_used_go_first(shelf, caplog):
    caplog.set_level("INFO")
    old, used, new = ({bytes([n] * 16): torch.full((100,), -1.0)} for n in range(3))
    for age, some in ((300, used), (200, old), (100, new)):
        before = set(files(shelf))
        shelf.keep(some)
        (path,) = set(files(shelf)) - before
        at = path.stat().st_mtime - age
        os.utime(path, (at, at))
        size = path.stat().st_size
    shelf.find(used.keys())
    shelf.trim()
    assert len(files(shelf)) == 3
    assert not caplog.text
    elsewhere = replace(shelf, name="another", limit=2 * size)  # the limit is that of all names
    elsewhere.trim()
    assert "removed 1 of 3 files" in caplog.text
    assert "cache.max_gb" in caplog.text
    assert shelf.find([*old, *used, *new]).keys() == {*used, *new}
    replace(shelf, limit=size).trim()
    assert len(files(shelf)) == 1


def test_a_directory_that_takes_no_files(tmp_path, made, caplog):
    """The cache is never a reason to fail."""
    (tmp_path / "home").write_text("a file where the directory should be")
    sets = sets_of(random_pairs(4))
    found, judge = scored(made, sets, Shards(tmp_path / "home", NAME, 1e9))
    assert judge.rows == 4
    assert "nothing kept" in caplog.text
    same(found, scored(made, sets, None)[0])


# -- which rows are scored


def test_the_second_time_nothing_is_scored(made, shelf, caplog):
    caplog.set_level("INFO")
    sets = sets_of(random_pairs(12), held=random_pairs(3, seed=1))
    cold, judge = scored(made, sets, shelf)
    assert judge.rows == 15
    assert "reference: 0 of 15 rows from the cache" in caplog.text
    warm, judge = scored(made, sets, shelf, batch_size=1)
    assert judge.forwards == 0
    assert caplog.text.count("reference: 15 of 15 rows from the cache") == 1
    same(warm, cold)


def test_values_belong_to_their_rows(made, shelf):
    """Against a scoring of each pair alone, cold, warm, shuffled and in part."""
    pairs = random_pairs(12)
    alone = {pair: scored(made, sets_of([pair]), None)[0]["train"].references[0] for pair in pairs}
    scored(made, sets_of(pairs), shelf)
    shuffled = random.Random(0).sample(pairs, 12)
    for some in (pairs, shuffled, pairs[3:7]):
        found, judge = scored(made, sets_of(some), shelf)
        assert judge.forwards == 0
        for pair, row in zip(some, found["train"].references, strict=True):
            torch.testing.assert_close(row, alone[pair], atol=1e-5, rtol=1e-5)


def test_only_missing_rows_are_scored(made, shelf, caplog):
    caplog.set_level("INFO")
    pairs = random_pairs(12)
    cold, _ = scored(made, sets_of(pairs[:5]), shelf)
    more, judge = scored(made, sets_of(pairs), shelf)
    assert judge.rows == 7
    assert "reference: 5 of 12 rows from the cache" in caplog.text
    for a, b in zip(cold["train"].references, more["train"].references):
        assert torch.equal(a, b)


def test_a_row_that_occurs_twice_is_scored_once(made, shelf):
    """Scored twice, in batches of other widths, it would have two values and the cache one."""
    pairs = random_pairs(6)
    sets = sets_of([*pairs, *pairs[:2]], held=[replace(pairs[3], row=99)])
    cold, judge = scored(made, sets, shelf)
    assert judge.rows == 6
    same(scored(made, sets, shelf)[0], cold)
    same(scored(made, sets, None)[0], cold)


def test_parts_are_kept_as_they_are_scored(made, shelf, monkeypatch):
    monkeypatch.setattr(reference, "TOKENS", 40)
    sets = sets_of(random_pairs(12))
    cold, _ = scored(made, sets, shelf, batch_size=1)
    assert len(files(shelf)) > 3
    same(scored(made, sets, shelf, batch_size=1)[0], cold)


def test_rows_that_training_does_not_come_to_are_not_scored(made):
    """And a longer run scores the same rows in the same batches: bit for bit the same numbers."""
    pairs = random_pairs(40)
    pairs[7] = replace(pairs[3], row=7)  # drawn once, known twice
    order, found = epoch_order(40, 0, 0), {}
    for count in (0, 3, 12, 40):
        more = {"orders": {"train": order}, "count": count, "block": 10, "batch_size": 5}
        sets, judge = scored(made, sets_of(pairs, held=random_pairs(4, seed=1)), None, **more)
        assert judge.rows == 4 + min(-(-count // 10) * 10, 39)
        found[count] = sets["train"].references
        assert all(len(found[count][row]) for row in order[:count])
        assert len(sets["held"].references) == 4
    for row in order[:12]:
        assert torch.equal(found[12][row], found[40][row])
    assert [len(row) for row in found[3]].count(0) >= 28


def test_texts_without_a_rejected_response(made, shelf):
    pairs = [replace(pair, rejected=()) for pair in random_pairs(5)]
    cold, _ = scored(made, sets_of(pairs), shelf)
    warm, judge = scored(made, sets_of(pairs), shelf)
    assert judge.forwards == 0
    same(warm, cold)


# -- what a row is known by


def test_one_token_or_one_border_makes_another_row():
    pair = random_pairs(1, longest=6)[0]
    pair = replace(pair, prompt=(1, 2, 3), chosen=(4, 5), rejected=(6, 7))
    others = [
        replace(pair, prompt=(1, 2, 4)),
        replace(pair, chosen=(4, 6)),
        replace(pair, rejected=(6, 8)),
        replace(pair, prompt=(1, 2), chosen=(3, 4, 5)),
        replace(pair, chosen=(4,), rejected=(5, 6, 7)),
        replace(pair, chosen=(6, 7), rejected=(4, 5)),
        replace(pair, chosen=(4, 5, 6, 7), rejected=()),
    ]
    assert len({row_key(p) for p in [pair, *others]}) == 8
    assert row_key(replace(pair, row=77)) == row_key(pair)


def test_context_misses(made, shelf):
    pairs = random_pairs(6, longest=9)
    scored(made, sets_of(pairs), shelf)
    whole = Pair((1, 2), (3, 4, 5, 6), (7, 8))
    contexts = (((1, 2),), ((1, 3),), ((), (1, 2)))
    masked = [with_context(whole, *context) for context in contexts]
    assert len({row_key(pair) for pair in [whole, *masked]}) == 4
    first, judge = scored(made, sets_of([*pairs, *masked]), shelf)
    assert judge.rows == 3
    sizes = [len(row) for row in first["train"].references[-3:]]
    assert sizes == [5, 4, 5]  # a log-probability per scored token
    again, judge = scored(made, sets_of([*pairs, *masked]), shelf)
    assert judge.rows == 0 and again["train"].references[-1].equal(first["train"].references[-1])


def test_one_token_misses(made, shelf):
    pairs = random_pairs(6)
    scored(made, sets_of(pairs), shelf)
    first = replace(pairs[2], chosen=(*pairs[2].chosen[:-1], (pairs[2].chosen[-1] + 1) % 256))
    _, judge = scored(made, sets_of([*pairs[:2], first, *pairs[3:]]), shelf)
    assert judge.rows == 1


def test_the_chat_template_misses(made, shelf):
    message = [{"role": "user", "content": "How many?"}]
    row = {
        "prompt": message,
        "chosen": [{"role": "assistant", "content": "Four."}],
        "rejected": [{"role": "assistant", "content": "Five."}],
    }

    def encoded(opening):
        tokenizer = policies.byte_tokenizer()
        tokenizer.chat_template = (
            "{% for m in messages %}" + opening + "{{ m.role }}: {{ m.content }}\n{% endfor %}"
        )
        how = {
            "max_length": 200,
            "on_mismatch": "split",
            "strict": True,
            "scored": "assistant",
            "where": "test",
        }
        return encode_pairs([row], tokenizer, **how).pairs

    scored(made, sets_of(encoded("<")), shelf)
    assert scored(made, sets_of(encoded("<")), shelf)[1].rows == 0
    assert scored(made, sets_of(encoded("[")), shelf)[1].rows == 1


# -- what a reference is known by


def test_every_single_weight_is_part_of_the_name(made):
    names = {weights_name(made, PLAIN)}
    for parameter in made.lm.parameters():
        flat = parameter.data.view(-1)
        for place in {0, flat.numel() // 2, flat.numel() - 1}:
            before = flat[place].clone()
            flat[place] = torch.nextafter(before, torch.tensor(9.0))
            names.add(weights_name(made, PLAIN))
            flat[place] = before
    assert len(names) > 30
    assert weights_name(made, PLAIN) in names
    assert weights_name(policy(dtype="float32", num_hidden_layers=1), PLAIN) in names


def test_how_the_reference_computes_is_part_of_the_name(made, monkeypatch):
    build = partial(policy, num_hidden_layers=1)
    cast = partial(torch.autocast, "cpu", torch.bfloat16)
    names = [
        weights_name(made, PLAIN),
        weights_name(made, cast),
        weights_name(build(dtype="bfloat16"), PLAIN),
        weights_name(build(dtype="float64"), PLAIN),
        weights_name(build(dtype="float32", attention="eager"), PLAIN),
        weights_name(build(dtype="float32", rms_norm_eps=1e-4), PLAIN),  # weights are the same
        weights_name(
            build(dtype="float32", rope_parameters={"rope_theta": 5e3, "rope_type": "default"}),
            PLAIN,
        ),
    ]
    monkeypatch.setattr(reference, "CODE", reference.CODE + 1)
    names.append(weights_name(made, PLAIN))
    assert len(set(names)) == len(names)


def test_adapters_are_no_part_of_the_name(made):
    """The base alone scores, whatever the adapters hold."""
    plain = weights_name(made, PLAIN)
    adapted = lora(made)
    assert weights_name(adapted, PLAIN) == plain
    for parameter in adapted.module.parameters():
        if parameter.requires_grad:
            parameter.data.add_(1.0)
    assert weights_name(adapted, PLAIN) == plain
    frozen = next(p for p in adapted.module.parameters() if not p.requires_grad)
    frozen.data.view(-1)[0] += 1.0
    assert weights_name(adapted, PLAIN) != plain


def test_a_checkpoint_is_known_by_its_files(made, tmp_path):
    here = tmp_path / "here"
    made.save(here, merge=False, card="")
    cpu, shared = torch.device("cpu"), config("model.dtype=float32").model

    def name(**changes):
        changed = shared.copy()
        for key, value in changes.items():
            changed[key] = value
        return files_name(str(here), changed, cpu, PLAIN)

    first = name()
    assert name() == first
    shutil.copytree(here, tmp_path / "there")
    assert files_name(str(tmp_path / "there"), shared, cpu, PLAIN) == first
    (here / "README.md").write_text("other words")
    assert name() == first
    found = [first, name(dtype="bfloat16"), name(attention="eager")]
    weights = here / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1  # the lowest bit of the last weight's highest byte
    weights.write_bytes(content)
    found.append(name())
    text = (here / "config.json").read_text()
    (here / "config.json").write_text(
        text.replace('"rms_norm_eps": 1e-06', '"rms_norm_eps": 1e-03')
    )
    found.append(name())
    assert len(set(found)) == 5
    (here / "adapter_config.json").write_text("{}")
    assert name() is None
    assert files_name("some/hub-id", shared, cpu, PLAIN) is None


# -- several processes, and kills

CHILD = """
import contextlib, hashlib, json, os, signal, sys
sys.path[:0] = [{tests!r}, {tests!r} + '/cache']
import torch
torch.set_num_threads(1)
from tiny import policy, random_pairs
from test_reference import scored, sets_of
from spo_lightning.cache import reference
from spo_lightning.cache import shards
from pathlib import Path

how, home, out = {how!r}, Path({home!r}), Path({out!r})
reference.TOKENS = 60
made, sets = policy(dtype="float32", num_hidden_layers=1), sets_of(random_pairs(24))
shelf = shards.Shards(home, "reference", 1e9)

def one(number):
    found, judge = scored(made, sets, shelf)
    bits = hashlib.sha256(b"".join(r.numpy().tobytes() for r in found["train"].references))
    (out / f"{{number}}.json").write_text(json.dumps([judge.rows, bits.hexdigest()]))

if how.startswith("kill"):
    plain = Path.replace
    count = iter(range(99))
    def replace(self, target):  # the third shard is killed in mid-write
        if self.suffix == ".tmp" and next(count) == 2:
            if how == "kill half":
                os.truncate(self, self.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, target)
    Path.replace = replace
    one(0)
else:
    if how == "no locks":
        import errno, fcntl
        def refused(*_, **__):
            raise OSError(errno.ENOLCK, "no locks here")
        fcntl.flock = refused
    children = []
    for number in range(8):
        child = os.fork()
        if not child:
            code = 1
            try:
                one(number)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
"""


def run_child(tmp_path, how):
    out = tmp_path / "out"
    out.mkdir(exist_ok=True)
    tests = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    text = CHILD.format(tests=tests, how=how, home=str(tmp_path / "home"), out=str(out))
    code = [sys.executable, "-c", text]
    done = subprocess.run(code, env=environment(), capture_output=True, text=True, timeout=300)
    return done, [json.loads(path.read_text()) for path in sorted(out.iterdir())]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["locks", "no locks"])
def test_eight_processes_on_one_cold_cache(tmp_path, made, how):
    done, found = run_child(tmp_path, how)
    assert done.returncode == 0, done.stderr
    assert len(found) == 8
    assert len({bits for _, bits in found}) == 1
    if how == "locks":  # one scores, seven wait for it
        assert sorted(count for count, _ in found) == [0] * 7 + [24]
    shelf = Shards(tmp_path / "home", NAME, 1e9)
    warm, judge = scored(made, sets_of(random_pairs(24)), shelf)
    assert judge.forwards == 0
    bits = hashlib.sha256(b"".join(r.numpy().tobytes() for r in warm["train"].references))
    assert bits.hexdigest() == found[0][1]
    assert not list(shelf.room.glob("*.tmp"))
    # each row is kept once, though without locks several processes wrote it
    keys = []
    for path in files(shelf):
        with path.open("rb") as file:
            keys += shards._index(file, NAME)[2]
    assert len(keys) == len(set(keys)) == 24


@pytest.mark.parametrize(
    "how", ["kill half", pytest.param("kill before the rename", marks=pytest.mark.slow)]
)
def test_a_kill_in_mid_write(tmp_path, made, how):
    done, found = run_child(tmp_path, how)
    assert done.returncode == -9
    assert not found
    shelf, sets = Shards(tmp_path / "home", NAME, 1e9), sets_of(random_pairs(24))
    (left,) = shelf.room.glob("*.tmp")
    again, judge = scored(made, sets, shelf)
    assert 0 < judge.rows < 24  # two parts were kept, the third was not
    for a, b in zip(again["train"].references, scored(made, sets, None)[0]["train"].references):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    same(scored(made, sets, shelf)[0], again)
    long_ago = left.stat().st_mtime - 2 * shards.ABANDONED
    os.utime(left, (long_ago, long_ago))
    shelf.trim()
    assert not left.exists()


def test_a_signal_ends_the_wait_for_another_run(tmp_path, made, shelf):
    stages = silent()
    stages.stop.signal = 15
    with shelf.alone(silent()), pytest.raises(Interrupted):
        scored(made, sets_of(random_pairs(2)), replace(shelf), stages=stages)


# -- whole runs


@pytest.fixture
def counted(monkeypatch):
    """Forwards of any scorer while the reference is scored, run by run."""
    counts = []
    forward, inside = Scorer.forward, reference.Referee.over
    active = []

    def count(self, *args, **kwargs):
        if active:
            counts[-1] += 1
        return forward(self, *args, **kwargs)

    def watched(*args, **kwargs):
        counts.append(0)
        active.append(True)
        try:
            return inside(*args, **kwargs)
        finally:
            active.pop()

    monkeypatch.setattr(Scorer, "forward", count)
    monkeypatch.setattr(reference.Referee, "over", watched)
    return counts


def ran(home, name, *words):
    words = [*SMALL, "loss=dpo", "max_steps=3", f"cache.dir={home / 'cache'}", *words]
    numbers = train(config(*words), home / name)
    weights = (home / name / "model" / "model.safetensors").read_bytes()
    return {k: v for k, v in numbers.items() if k != "seconds"}, weights


def test_a_second_run_scores_nothing_and_equals_the_first(tmp_path, counted, caplog):
    caplog.set_level("INFO")
    cold = ran(tmp_path, "cold")
    assert counted[-1] > 0
    assert "reference: 0 of 48 rows from the cache" in caplog.text
    assert ran(tmp_path, "warm") == cold
    assert counted[-1] == 0
    assert caplog.text.count("reference: 48 of 48 rows from the cache") == 1
    for number, kept in enumerate(sorted((tmp_path / "cache" / "reference").glob("*/*.rows")), 1):
        content = bytearray(kept.read_bytes())
        content[-3] ^= 4
        kept.write_bytes(content)
        # the rows of a shard were scored together, and are so again: the same bits
        assert ran(tmp_path, f"damaged-{number}") == cold
        assert 0 < counted[-1] < counted[0]
        assert caplog.text.count("is not used and its rows are found anew") == number
    assert number == 2  # training and held-out pairs
    assert ran(tmp_path, "mended") == cold
    assert counted[-1] == 0


def test_a_run_of_other_settings_scores_nothing(tmp_path, counted):
    ran(tmp_path, "cold")
    others = [
        "loss=ipo",
        "loss.beta=0.7",
        "optimizer.lr=1e-5",
        "batch_size=8",
        "eval.batch_size=3",
    ]
    ran(tmp_path, "other", *others, "model.share_prompt=false", "clip_norm=2.0", "max_steps=4")
    ran(tmp_path, "adapters", "model.lora.rank=2", "loss=spo")
    ran(tmp_path, "part", "eval.max_rows=3")
    assert counted[0] > 0
    assert counted[1:] == [0, 0, 0]
    ran(tmp_path, "half", "model.dtype=bfloat16", "sft.max_steps=0")
    assert counted[-1] > 0


@pytest.mark.parametrize("lost", ["nothing", "all", "one"])
def test_an_interrupted_run_goes_on_bit_for_bit_whatever_is_left(tmp_path, counted, lost):
    whole = ran(tmp_path, "whole", "max_steps=4")
    ran(tmp_path, "parts", "max_steps=2")
    kept = sorted((tmp_path / "cache" / "reference").glob("*/*.rows"))
    for path in {"nothing": [], "all": kept, "one": kept[:1]}[lost]:
        path.unlink()
    assert ran(tmp_path, "parts", "max_steps=4", "ckpt_path=last") == whole
    assert (counted[-1] > 0) == (lost != "nothing")


def test_without_a_cache_nothing_is_read_or_written(tmp_path, counted, caplog):
    caplog.set_level("INFO")
    off = ran(tmp_path, "off", "cache.enabled=false")
    assert not (tmp_path / "cache").exists()
    assert "from the cache" not in caplog.text
    assert ran(tmp_path, "on") == off
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    assert ran(tmp_path, "off again", "cache.enabled=false") == off
    assert counted == [counted[0]] * 3
    assert kept == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}


def test_the_size_limit_of_a_run(tmp_path, counted, caplog):
    caplog.set_level("INFO")
    first = ran(tmp_path, "first", "cache.max_gb=1e-8")
    assert "removed 2 of 2 files" in caplog.text
    assert not list((tmp_path / "cache" / "reference").glob("*/*.rows"))
    assert ran(tmp_path, "second") == first
    assert counted[0] == counted[1] > 0


@pytest.mark.parametrize("limit", ["0", "-1", "null", "text"])
def test_a_limit_that_cannot_be_meant(limit):
    chosen = config(f"cache.max_gb={limit}")
    with pytest.raises(UserError, match="cache.max_gb"):
        knobs.check(chosen, knobs.Given(["cache.max_gb"], {}, config()))


def test_the_knobs_of_a_cache_that_is_off():
    chosen = config("cache.max_gb=2", "cache.enabled=false")
    with pytest.raises(UserError, match="cache.max_gb has no effect: cache.enabled is false"):
        knobs.check(chosen, knobs.Given(["cache.max_gb", "cache.enabled"], {}, config()))
    knobs.check(config("cache.enabled=false"), knobs.Given(["cache.enabled"], {}, config()))


@pytest.fixture
def checkpoints(tmp_path):
    """A policy and a reference of other weights."""
    found = []
    for seed in range(2):
        where = tmp_path / f"checkpoint-{seed}"
        made = policy(dtype="float32", num_hidden_layers=1, seed=seed)
        made.save(where, merge=False, card="")
        found.append(where)
    return found


def from_checkpoints(home, name, mine, theirs, *words):
    kept = [word for word in SMALL if not word.startswith(("model.", "sft."))]
    model = ["model=pretrained", f"model.pretrained={mine}", f"model.reference={theirs or 'null'}"]
    words = [*kept, *model, "loss=dpo", "max_steps=2", f"cache.dir={home / 'cache'}", *words]
    return train(config(*words), home / name)["final"]


def test_another_checkpoint_is_not_even_loaded(tmp_path, counted, checkpoints, monkeypatch):
    opened, plain = [], reference.opened

    def watched(*args, **how):
        found = plain(*args, **how)
        opened.append(weakref.ref(found.lm))
        return found

    monkeypatch.setattr(reference, "opened", watched)
    cold = from_checkpoints(tmp_path, "cold", *checkpoints)
    assert counted[-1] > 0
    assert len(opened) == 1
    gc.collect()
    assert opened[0]() is None  # its weights do not outlive the scoring
    assert from_checkpoints(tmp_path, "warm", *checkpoints) == cold
    assert counted[-1] == 0
    assert len(opened) == 1
    weights = checkpoints[1] / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    from_checkpoints(tmp_path, "changed", *checkpoints)
    assert counted[-1] > 0
    assert len(opened) == 2


def test_the_seed_of_a_run_from_a_checkpoint_scores_nothing(tmp_path, counted, checkpoints):
    from_checkpoints(tmp_path, "cold", checkpoints[0], None)
    from_checkpoints(tmp_path, "seed", checkpoints[0], None, "seed=7", "data.seed=0")
    assert counted[0] > 0
    assert counted[1] == 0


def test_a_reference_with_another_tokenizer_is_refused_before_it_is_loaded(
    tmp_path, checkpoints, monkeypatch
):
    tokenizer = policies.byte_tokenizer()
    tokenizer.add_tokens(["one more"])
    tokenizer.save_pretrained(checkpoints[1])
    monkeypatch.setattr(reference, "opened", lambda *_: pytest.fail("loaded"))
    with pytest.raises(UserError, match="another tokenizer"):
        from_checkpoints(tmp_path, "refused", *checkpoints)
