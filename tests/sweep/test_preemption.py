"""Jobs of a scheduler by submitit's own local executor: told to stop they are queued again and go
on; their tasks are one run; what SLURM would be given is shown."""

import csv
import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, command, end, start
from safetensors.torch import load_file

from spo_lightning.records.progress import WARNINGS

pytestmark = [pytest.mark.engines, pytest.mark.timeout(1800)]

RUN = (*SMALL, "loss=spo", "checkpoint.every_n_steps=0", "report.enabled=false")
RUN = (*RUN, "eval.every_n_steps=0", "max_steps=60")
LOCAL = ("-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep")
TWO = ("batch_size=7", "model.dtype=float64", "hardware.precision=64-true", "max_steps=40")


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Nobody disturbs it."""
    place = tmp_path_factory.mktemp("whole")
    done = command(place, *RUN, cache, "hydra.run.dir=run", timeout=900)
    assert done.code == 0, done.err
    return place / "run"


def begun(directory, process, rows):
    """Once so many steps are logged: the job's status."""
    path, until = directory / "metrics.csv", time.monotonic() + 900
    while not path.exists() or path.read_text().count("\n") <= rows:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    return json.loads((directory / "status.json").read_text())


def numbers(directory):
    with (directory / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if "/time/" not in k} for row in csv.DictReader(file)
        ]


def weights(directory):
    return load_file(directory / "model/model.safetensors")


def logs(place):
    return "".join(path.read_text() for path in sorted(place.rglob(".submitit/*/*_log.out")))


def controller_of(place):
    """The process that begins a job's tasks, once it has."""
    pickled = [*(place / "sweep/.submitit").glob("*/*_submitted.pkl")]
    return int(pickled[0].name.split("_")[0]) if pickled else None


def hears(controller, numbers):
    """Whether its only task answers these signals: submitit, which loads the job first, sets its
    own for one of them."""
    try:
        (task,) = Path(f"/proc/{controller}/task/{controller}/children").read_text().split()
        caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{task}/status").read_text())
    except (FileNotFoundError, ValueError):
        return False
    return all(int(caught[1], 16) >> (number - 1) & 1 for number in numbers)


@pytest.mark.parametrize(
    "number", [signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM], ids=lambda number: number.name
)
def test_a_preempted_job_is_queued_again_and_goes_on(tmp_path, cache, whole, number):
    """Twice, as a scheduler may; the last bit is that of a run that nobody disturbed."""
    process = start(tmp_path, *LOCAL, *RUN, cache)
    job, pids = tmp_path / "sweep/0", set()
    for rows in (5, 25):
        pid = begun(job, process, rows)["pid"]
        os.kill(pid, number)
        pids.add(pid)
        while json.loads((job / "status.json").read_text())["pid"] in pids:
            assert process.poll() is None
            time.sleep(0.05)
    done = end(process, 900)
    assert done.code == 0, done.err
    told = logs(tmp_path)
    assert told.count(f"stopped by {number.name}. Go on with") == 2
    assert told.count("Going on from outer step") == 2
    assert len(pids) == 2
    assert numbers(job) == numbers(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(job)[name], value), name


def test_a_job_that_is_told_before_it_begins(tmp_path, cache, whole):
    """While it imports and composes: nothing is saved yet, and nothing is lost."""
    process = start(tmp_path, *LOCAL, *RUN, cache)
    until = time.monotonic() + 600
    while not (controller := controller_of(tmp_path)) or not hears(controller, WARNINGS):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(controller, signal.SIGTERM)  # which passes it on
    done = end(process, 900)
    assert done.code == 0, done.err
    assert "SIGTERM" in logs(tmp_path) and "this job is preempted" in logs(tmp_path)
    assert "Going on from" not in logs(tmp_path)
    for name, value in weights(whole).items():
        assert torch.equal(weights(tmp_path / "sweep/0")[name], value), name


def test_what_ctrl_c_ends_is_not_queued_again(tmp_path, cache):
    process = start(tmp_path, *LOCAL, *RUN, cache)
    job = tmp_path / "sweep/0"
    os.kill(begun(job, process, 10)["pid"], signal.SIGINT)
    done = end(process, 600)
    assert done.code == 130 and "stopped by SIGINT" in done.err
    assert json.loads((job / "status.json").read_text())["state"] == "interrupted"
    assert "Requeued" not in logs(tmp_path)


def test_a_job_that_slurm_itself_restarts_goes_on(tmp_path, cache, whole):
    """A node fails: no signal was heard, and the scheduler begins the same job anew."""
    words = (*LOCAL, *RUN, cache, "checkpoint.every_n_steps=5")
    process = start(tmp_path, *words)
    job = tmp_path / "sweep/0"
    os.kill(begun(job, process, 12)["pid"], signal.SIGKILL)
    assert end(process, 600).code == 1
    done = command(tmp_path, *words, timeout=900, SLURM_RESTART_COUNT="1")
    assert done.code == 0, done.err
    assert "Going on from outer step" in logs(tmp_path)
    assert numbers(job) == numbers(whole)
    for name, value in weights(whole).items():
        assert torch.equal(weights(job)[name], value), name


def test_tasks_are_the_processes_of_one_run(tmp_path, cache):
    """Two of them, preempted together, beside one process."""
    one = command(tmp_path, *RUN, *TWO, cache, "hydra.run.dir=one", timeout=900)
    assert one.code == 0, one.err
    process = start(tmp_path, *LOCAL, *RUN, *TWO, cache, "hydra.launcher.tasks_per_node=2")
    job = tmp_path / "sweep/0"
    first = begun(job, process, 10)["pid"]
    os.kill(first, signal.SIGUSR1)
    done = end(process, 900)
    assert done.code == 0, done.err
    told = logs(tmp_path)
    assert told.count("Run directory") == 2 and told.count("Going on from outer step") == 1
    for name, value in weights(tmp_path / "one").items():
        torch.testing.assert_close(weights(job)[name], value, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    "words, says",
    [
        (("submitit_local", "nodes=2"), "hydra.launcher.nodes=2: submitit_local is this machine"),
        (("submitit_local", "nodes=0"), "hydra.launcher.nodes=0: it must be a whole number"),
        (("submitit_slurm", "mem_gb=much"), "hydra.launcher.mem_gb=much: it must be a whole"),
        (("submitit_slurm", "timeout_min=60"), "there is no srun here: submit where SLURM is"),
    ],
    ids=lambda it: it[-1] if isinstance(it, tuple) else "",
)
def test_refused_in_one_line(tmp_path, words, says):
    name, key = words
    more = (f"hydra/launcher={name}", f"hydra.launcher.{key}")
    done = command(tmp_path, "-m", *SMALL, "loss=dpo", *more)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done.err
