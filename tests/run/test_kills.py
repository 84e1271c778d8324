"""Runs of two processes that lose one to SIGKILL, ten times, and go on as if they had not."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import Fork, forked
from test_processes import TWO as WHOLE
from test_processes import numbers, others_of, rows
from test_spread_runs import EVEN, assert_near
from test_spread_runs import TWO as PARTS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

ONE = ("hardware=cpu", "hardware.threads=1")
STEPS, CHANCE = 30, 26
LINE = (*EVEN, "solver=penalty", "solver/value=inner", f"max_steps={STEPS}")
LINE = (*LINE, "checkpoint.every_n_steps=1", "eval.every_n_steps=10", "sft.max_steps=3")


class Moment(NamedTuple):
    """A process is killed so many seconds, at most, after this is true of the run's directory."""

    name: str
    come: Callable[[Path, float], bool]  # told when the process began, too
    seconds: float = 0.0


def steps(directory: Path) -> int:
    path = directory / "metrics.csv"
    return max(0, path.read_text().count("\n") - 1) if path.exists() else 0


def at_step(step: int) -> Moment:
    return Moment(f"training, {step}", lambda directory, _: steps(directory) >= step, 0.1)


def in_stage(*names: str) -> Callable[[Path, float], bool]:
    def come(directory: Path, _: float) -> bool:
        path = directory / "status.json"
        if not path.exists():
            return False
        told = json.loads(path.read_text())
        return told["state"] == "running" and told["stage"] in names

    return come


def writes(directory: Path, began: float) -> bool:
    """In the middle of a checkpoint's writing, and not of one that was killed before."""
    with suppress(FileNotFoundError):
        return (directory / "checkpoints/last.ckpt.tmp").stat().st_mtime > began
    return False


def after_training(directory: Path, _: float) -> bool:
    """Of a run that has taken its last step and not saved."""
    if steps(directory) < STEPS:
        return False
    return json.loads((directory / "status.json").read_text())["stage"] != "training"


def saves(directory: Path, _: float) -> bool:
    return (directory / "model").exists()


def moments(chance: random.Random) -> list[Moment]:
    """Ten, of which what must come before the last step does."""
    before = [
        Moment("start", lambda *_: True, 8.0),
        Moment("reference", in_stage("reference", "held-out: init"), 0.2),
    ]
    before += [Moment("writing", writes, 0.01)] * 3
    before += [at_step(step) for step in chance.sample(range(2, STEPS - 10), 3)]
    chance.shuffle(before)
    return [*before, Moment("held-out", after_training, 0.1), Moment("saving", saves)]


def killed(
    place: Path, words: tuple, moment: Moment, chance: random.Random, alone: bool = False
) -> float:
    """Goes on, loses a process at that moment and ends: how long after it, in seconds."""
    directory = place / "run"
    run = Fork.begin(place, *words, "hydra.run.dir=run")
    pid, others, begun = run.process.pid, [], time.time()
    assert pid is not None
    while not alone and not (others := others_of(pid)):
        time.sleep(0.01)
    while not moment.come(directory, begun):
        assert run.process.is_alive(), run.end(1)
        time.sleep(0.001)
    time.sleep(chance.uniform(0, moment.seconds))
    first, began = alone or chance.random() < 0.5, time.monotonic()
    os.kill(pid if first else others[0], signal.SIGKILL)
    done = run.end(300)
    while any(Path(f"/proc/{other}").exists() for other in others):
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
    done = forked(tmp_path, *again, "hydra.run.dir=run", timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    done = forked(tmp_path, *words, "hydra.run.dir=undisturbed", timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    mine, theirs = tmp_path / "run", tmp_path / "undisturbed"
    assert_near(mine, theirs, 0)
    for name in ("init", "final", "steps"):
        assert numbers(mine)[name] == numbers(theirs)[name]
    told = [
        [{k: v for k, v in row.items() if "time/" not in k} for row in rows(place)]
        for place in (mine, theirs)
    ]
    assert told[0] == told[1] and len(told[0]) == STEPS
    assert len(took) == 10 and max(took) < 30


@pytest.mark.parametrize("first, then", [(PARTS, ONE), (ONE, PARTS)], ids=["2 to 1", "1 to 2"])
def test_a_killed_run_goes_on_with_other_processes(tmp_path, first, then):
    chance = random.Random(CHANCE)
    moment = at_step(chance.randrange(3, 20))
    killed(tmp_path, (*LINE, *first), moment, chance, alone=first == ONE)
    done = forked(tmp_path, *then, "ckpt_path=last", "hydra.run.dir=run", timeout=600)
    assert done.code == 0, done.err
    done = forked(tmp_path, *LINE, *ONE, "hydra.run.dir=undisturbed", timeout=600)
    assert done.code == 0, done.err
    assert_near(tmp_path / "run", tmp_path / "undisturbed", 1e-6)
    assert len(rows(tmp_path / "run")) == STEPS
