"""Runs of two processes that lose one to SIGKILL, ten times, and go on as if they had not."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import command, end, start
from test_processes import TWO as WHOLE
from test_processes import numbers, others_of, rows, training
from test_spread_runs import EVEN, assert_near
from test_spread_runs import TWO as PARTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ONE = ("hardware=cpu", "hardware.threads=1")
STEPS, CHANCE = 40, 26
LINE = (*EVEN, "solver=penalty", "solver/value=inner", f"max_steps={STEPS}")
LINE = (*LINE, "checkpoint.every_n_steps=1", "eval.every_n_steps=5")


class Moment(NamedTuple):
    """A process is killed so many seconds, at most, after this is true of the run's directory."""

    name: str
    come: Callable[[Path], bool]
    seconds: float = 0.0


def steps(directory: Path) -> int:
    path = directory / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def in_stage(*names: str) -> Callable[[Path], bool]:
    def come(directory: Path) -> bool:
        path = directory / "status.json"
        if not path.exists():
            return False
        told = json.loads(path.read_text())
        return told["state"] == "running" and told["stage"] in names

    return come


def writes(directory: Path) -> bool:
    """In the middle of a checkpoint's writing."""
    return (directory / "checkpoints/last.ckpt.tmp").exists()


def moments(chance: random.Random) -> list[Moment]:
    """Ten, of which what must come before the last step does."""
    start = Moment("start", lambda directory: True, 8.0)
    before = [start, Moment("reference", in_stage("reference", "held-out: init"), 0.2)]
    before += [Moment("writing", writes, 0.01)] * 3
    for step in sorted(chance.sample(range(2, STEPS - 10), 3)):
        at = Moment(f"training, {step}", lambda it, step=step: steps(it) >= step, 0.1)
        before.append(at)
    chance.shuffle(before)
    after = ("held-out: final", "save")
    return [*before, *(Moment(name, in_stage(name)) for name in after)]


def killed(place: Path, words: tuple, moment: Moment, chance: random.Random) -> float:
    """Goes on, loses a process at that moment and ends: how long after it, in seconds."""
    directory = place / "run"
    process = start(place, *words, "hydra.run.dir=run")
    until = time.monotonic() + 600
    while not (others := others_of(process.pid)) or not moment.come(directory):
        assert process.poll() is None and time.monotonic() < until, end(process, 1)
        time.sleep(0.001)
    time.sleep(chance.uniform(0, moment.seconds))
    (other,), began = others, time.monotonic()
    first = chance.random() < 0.5
    os.kill(process.pid if first else other, signal.SIGKILL)
    done = end(process, 300)
    while Path(f"/proc/{other}").exists():
        time.sleep(0.05)
    took = time.monotonic() - began
    stage = "start"
    if (directory / "status.json").exists():
        stage = json.loads((directory / "status.json").read_text())["stage"]
    whom = "the first" if first else "the other"
    said = f"{moment.name}: {whom} in {stage}, step {steps(directory)}, {took:.1f} s"
    print(said, flush=True)
    if first:
        assert done.code == -signal.SIGKILL, said
        return took
    errors = [line for line in done.err.splitlines() if line.startswith("error:")]
    assert done.code == 1 and len(errors) == 1 and "Traceback" not in done.err, done.err
    assert "process 1 of this run was killed by SIGKILL" in errors[0], done.err
    return took


@pytest.mark.parametrize("hardware", [PARTS, WHOLE], ids=["fsdp", "ddp"])
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(tmp_path, hardware):
    chance, again = random.Random(CHANCE), ("ckpt_path=last",)
    words, took = (*LINE, *hardware), []
    for moment in moments(chance):
        begun = (tmp_path / "run/config.yaml").exists()
        took.append(killed(tmp_path, again if begun else words, moment, chance))
    done = command(tmp_path, *again, "hydra.run.dir=run", timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    done = command(tmp_path, *words, "hydra.run.dir=undisturbed", timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    mine, theirs = tmp_path / "run", tmp_path / "undisturbed"
    assert_near(mine, theirs, 0)
    for name in ("init", "final", "steps"):
        assert numbers(mine)[name] == numbers(theirs)[name]
    for ours, other in zip(rows(mine), rows(theirs), strict=True):
        assert {k: v for k, v in ours.items() if not k.startswith("time/")} == {
            k: v for k, v in other.items() if not k.startswith("time/")
        }
    assert len(took) == 10 and max(took) < 30


@pytest.mark.parametrize("first, then", [(PARTS, ONE), (ONE, PARTS)], ids=["2 to 1", "1 to 2"])
def test_a_killed_run_goes_on_with_other_processes(tmp_path, first, then):
    process = start(tmp_path, *LINE, *first, "hydra.run.dir=run")
    training(tmp_path / "run", process, random.Random(CHANCE).randrange(3, 20))
    process.send_signal(signal.SIGKILL)
    end(process, 60)
    done = command(tmp_path, *then, "ckpt_path=last", "hydra.run.dir=run", timeout=600)
    assert done.code == 0, done.err
    done = command(tmp_path, *LINE, *ONE, "hydra.run.dir=undisturbed", timeout=600)
    assert done.code == 0, done.err
    assert_near(tmp_path / "run", tmp_path / "undisturbed", 1e-6)
    assert len(rows(tmp_path / "run")) == STEPS
