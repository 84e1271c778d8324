"""what=solvers: the command end to end, and its arithmetic. Never how long it took."""

import json
import mmap
import signal

import pytest
import torch
from benches import bench_config
from conftest import SMALL, command, forked
from fitting import config, objective, scored
from tiny import policy

from spo_lightning import command as command_line
from spo_lightning.bench import measuring, solvers
from spo_lightning.bench.ours import Entry, Ours, Start, Watch
from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import Interrupted
from spo_lightning.models.scorer import Scorer

MODULE = ("-m", "spo_lightning.bench")
TINY = (
    "what=solvers",
    "cache.enabled=false",
    *(word for word in SMALL if not word.startswith("sft.")),
    *("steps=1", "warmup=1", "repetitions=2"),
)


@pytest.mark.slow
def test_the_command(tmp_path):
    mine = '+solvers.mine=["solver=penalty","solver.weight=3"]'
    done = command(tmp_path, *TINY, mine, "only=[mine]", "hydra.run.dir=run", module=MODULE)
    assert (done.code, done.err) == (0, "")
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md", "bench.log"}
    numbers = json.loads((tmp_path / "run/bench.json").read_text())
    assert list(numbers["solvers"]) == ["none", "mine"]
    for row in numbers["solvers"].values():
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0
        assert row["memory_mib"] > 0 and row["memory_ratio"] > 0
        assert 0 < row["time_ratio_min"] <= row["time_ratio"] <= row["time_ratio_max"]
    assert numbers["solvers"]["mine"]["overrides"] == ["solver=penalty", "solver.weight=3"]
    assert numbers["solvers"]["none"]["time_ratio"] == 1
    assert numbers["solvers"]["none"]["memory_ratio"] == 1
    assert 0 < numbers["inner_share"] < 1
    table = (tmp_path / "run/table.md").read_text()
    assert table in done.out and "| mine" in table
    assert "memory 2/2" in done.out and "time 4/4" in done.out


@pytest.mark.parametrize(
    "words, says",
    [
        (["solver=penalty"], "solver has no effect"),
        (["only=[absent]"], "absent is none of solvers"),
        (['solvers.penalty=["solver=penalty","solver.wait=1"]'], "solvers.penalty: "),
    ],
)
def test_refused(tmp_path, words, says):
    done = forked(tmp_path, *TINY, *words, "hydra.run.dir=run", module=MODULE)
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["bench.log"]


@pytest.mark.slow
def test_every_listed_solver_can_be_built():
    listed = bench_config("what=solvers").solvers
    built = {str(objective(*words)[1]) for words in listed.values()}
    assert len(built) == len(listed)


def test_a_signal_amid_the_steps_ends_as_one_line():
    cfg = config("hardware=cpu", "hardware.precision=64-true", "batch_size=4")
    made = policy()
    start = Start(Scorer(made.lm, True), scored(made.lm), None)
    entry = Entry(cfg, *objective("solver=none")[:2])

    class Asks(Watch):
        def start(self):
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="stopped by SIGTERM") as error:
        Ours(entry, start).run(2, Asks())
    assert command_line.verdict(error.value) == (143, "stopped by SIGTERM")


def test_steps_leave_the_policy_as_it_was():
    made = policy()
    start = Start(Scorer(made.lm, True), scored(made.lm), None)
    cfg = config("hardware=cpu", "hardware.precision=64-true", "batch_size=4", "optimizer.lr=0.1")
    loss, solver, _ = objective("solver=unrolled")
    before, moved = weights(start), []

    class Looks(Watch):
        def stop(self):
            moved.append(not torch.equal(weights(start), before))

    Ours(Entry(cfg, loss, solver), start).run(2, Looks())
    assert moved == [True, True]
    assert torch.equal(weights(start), before)


def weights(start):
    return torch.cat([p.detach().flatten() for p in start.scorer.parameters()])


def test_the_share_of_the_inner_pass():
    pairs = Pairs([Pair((1, 2), (3,), (4, 5, 6)), Pair((1,), (2, 3), (4,))], None, 0)
    texts = Pairs([Pair((1, 2), (3, 4), ())], None, 0)
    lm = policy().lm
    # 3 + 3 tokens of 6 + 4; apart, the prompts' 2 + 1 once more; texts of 4 beside rows of 5
    assert solvers.inner_share(Start(Scorer(lm, True), pairs, None)) == 6 / 10
    assert solvers.inner_share(Start(Scorer(lm, False), pairs, None)) == 6 / 13
    assert solvers.inner_share(Start(Scorer(lm, True), pairs, texts)) == 4 / 5


def test_ratios_are_taken_within_a_round():
    found = solvers.ratios(
        {"none": [1.0, 2.0, 4.0], "other": [2.0, 3.0, 16.0]}, {"none": 8.0, "other": 12.0}, "none"
    )["other"]
    assert [found[f"time_ratio{end}"] for end in ("_min", "", "_max")] == [1.5, 2.0, 4.0]
    assert found["memory_ratio"] == 1.5


def test_memory_at_the_peak():
    watched = measuring.Memory()
    watched.begin()
    # a mapping of its own: what malloc gives may be in memory already, left free by other tests
    with mmap.mmap(-1, 64 * measuring.MIB) as block:
        block.write(bytes(len(block)))
    assert watched.mib >= 60
