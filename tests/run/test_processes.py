"""Two processes through the real command line end where one process with the same batch ends."""

import csv
import os
import signal
import subprocess
import sys

import pytest

TINY = [
    "data=slips",
    "data.sft_rows=0",
    "data.prompts=40",
    "data.eval_prompts=5",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=64",
    "model.config.num_hidden_layers=1",
    "optimizer.lr=1e-3",
    "batch_size=7",
    "micro_batch_size=2",
    "max_steps=10",
    "log.every_n_steps=1",
    "eval.every_n_steps=5",
    "eval.max_new_tokens=4",
    "hardware.threads=1",
    "loss=dpo",
]


def run(directory, *overrides):
    """The rows of metrics.csv."""
    line = ["-m", "spo_lightning.train", *TINY, *overrides, f"hydra.run.dir={directory}"]
    started = subprocess.Popen(
        [sys.executable, *line],
        cwd=directory.parent,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, said = started.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(started.pid, signal.SIGKILL)  # the ranks too
        raise
    assert started.returncode == 0, said[-3000:]
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
@pytest.mark.parametrize("solver", ["none", "penalty", "unrolled"])
def test_two_processes_equal_one(tmp_path, solver):
    one = run(tmp_path / "one", f"solver={solver}", "hardware=cpu")
    two = run(tmp_path / "two", f"solver={solver}", "hardware=ddp", "hardware.accelerator=cpu")
    assert (
        [row["step"] for row in one]
        == [row["step"] for row in two]
        == [str(n) for n in range(1, 11)]
    )
    for name in ("train/loss", "train/grad_norm"):
        assert float(two[0][name]) == pytest.approx(float(one[0][name]), rel=1e-6), name
    for name in ("train/loss", "train/nll/chosen", "eval/loss"):
        pairs = [(float(b[name]), float(a[name])) for a, b in zip(one, two) if a[name]]
        assert len(pairs) == (2 if name.startswith("eval") else 10)
        for mine, theirs in pairs:
            assert mine == pytest.approx(theirs, abs=1e-5), name
    assert [row["train/num_tokens"] for row in one] == [row["train/num_tokens"] for row in two]
