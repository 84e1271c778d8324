"""Sweeps by Hydra's other engines: Optuna's search, and launchers for more than one machine."""

import json
import os
import time

import pytest
from conftest import SMALL, command, end, start

pytestmark = pytest.mark.engines  # in an environment of their own: Hydra looks at every plugin
JOBS = ("loss=dpo", "max_steps=2", "loss.beta=0.1,0.2,0.3", "hydra.sweep.dir=sweep")


@pytest.mark.parametrize("engine", [("joblib", "hydra.launcher.n_jobs=2"), ("submitit_local",)])
def test_a_launcher_ends_four_jobs(tmp_path, cache, engine):
    launcher, *words = engine
    more = (*JOBS[:2], "loss.beta=0.1,0.2,-1,0.3", JOBS[3], f"hydra/launcher={launcher}")
    done = command(tmp_path, "-m", *SMALL, cache, *more, *words, timeout=300)
    assert done.code == 3 and "loss.beta=-1: it must be above 0" in done.err
    for job in (0, 1, 3):  # the failed one took none along
        found = json.loads((tmp_path / f"sweep/{job}/status.json").read_text())
        assert found["state"] == "finished"


def test_optuna_searches_and_goes_on(tmp_path, cache):
    """A study of four trials, then of two more in the same file."""
    rule = "sweep.objective={maximise: preference/accuracy, keep: exact_match, within: 0.02}"
    words = ("--config-name", "search_spo", *SMALL, cache, "max_steps=2", rule)
    done = command(tmp_path, *words, "hydra.sweeper.n_trials=4", "sweep.parallel=2", timeout=300)
    assert done.code == 0, done.err
    assert (tmp_path / "outputs/search_spo/study.db").stat().st_size
    (first,) = (tmp_path / "outputs/search_spo").glob("20*")
    jobs = json.loads((first / "sweep.json").read_text())["jobs"]
    assert [job["state"] for job in jobs] == ["finished"] * 4
    best = max(job["numbers"]["final"]["preference/accuracy"] for job in jobs)
    assert f"best_value: {best}" in (first / "optimization_results.yaml").read_text()
    done = command(tmp_path, *words, "hydra.sweeper.n_trials=2", timeout=300)
    assert done.code == 0 and "Using an existing study" in done.out + done.err
    done = command(tmp_path, *words, f"sweep.resume={first}", timeout=300)
    assert done.code == 2 and "sweep.resume goes on with a grid" in done.err


def test_the_submission_that_slurm_gets(tmp_path):
    """There is no SLURM here: its commands only take the script."""
    tools, kept = tmp_path / "tools", tmp_path / "kept"
    tools.mkdir(), kept.mkdir()
    for name, does in (("sbatch", f'cp "$1" {kept}; echo Submitted batch job 7'), ("srun", ":")):
        (tools / name).write_text(f"#!/bin/sh\n{does}\n")
        (tools / name).chmod(0o755)
    words = ("-m", *SMALL, "loss=dpo", "seed=0,1", "hydra/launcher=submitit_slurm")
    keys = ("partition=gpu", "timeout_min=30", "mem_gb=8", "gpus_per_node=4", "nodes=2")
    asked = [f"hydra.launcher.{key}" for key in (*keys, "tasks_per_node=4")]
    asked += ["+hydra.launcher.additional_parameters.requeue=true"]
    # what is shown beforehand, where there are not even those commands
    shown = command(tmp_path, *words, *asked, "hydra.sweep.dir=sweep", "hydra.launcher.dry_run=1")
    assert shown.code == 2 and "hydra.launcher.dry_run" in shown.err
    seen = ("hydra.sweep.dir=sweep", "hydra.launcher.dry_run=true")
    shown = command(tmp_path, *words, *asked, *seen)
    assert shown.code == 0, shown.err
    path = f"{tools}:{os.environ['PATH']}"
    process = start(tmp_path, *words, *asked, "hydra.sweep.dir=sweep", PATH=path)
    patience = time.monotonic() + 120
    while not list(kept.glob("*.sh")) and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.1)
    process.terminate()  # it waits for jobs that nobody runs
    ended = end(process)
    (script,) = kept.glob("*.sh")
    text = script.read_text()
    lines = ("--partition=gpu", "--time=30", "--mem=8GB", "--gpus-per-node=4", "--array=0-1")
    lines += ("--nodes=2", "--ntasks-per-node=4", "--signal=USR2@120", "--requeue")
    for line in lines:
        assert f"#SBATCH {line}" in text, ended
    assert text.strip() == shown.out.strip()
    assert "submitit.core._submit" in text
