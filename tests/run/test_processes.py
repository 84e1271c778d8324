"""Several processes are one run: begun here, by torchrun or by srun, they end where one ends."""

import csv
import json
import os
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, command, end, start
from safetensors.torch import load_file

from spo_lightning.world import World

TINY = (
    *SMALL,
    "batch_size=7",
    "max_steps=10",
    "eval.every_n_steps=5",
    "eval.batch_size=3",
    "cache.enabled=false",
    "loss=dpo",
    # rounding apart, they are equal: in float32 a change of 0.1 nats in a sum of 40 has 4 digits
    "model.dtype=float64",
    "hardware.precision=64-true",
)
COMPARED = {"train/loss", "train/nll/chosen", "train/grad_norm", "eval/loss"}
TWO = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def numbers(directory: Path) -> dict:
    found = json.loads((directory / "metrics.json").read_text())
    return {name: found[name] for name in ("init", "final", "steps", "choices")}


def rows(directory: Path) -> list[dict]:
    with (directory / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def assert_one_run(two: Path, one: Path):
    """The same files with the same numbers."""
    assert {p.name for p in one.iterdir()} == {p.name for p in two.iterdir()}
    mine, theirs = numbers(two), numbers(one)
    assert mine["steps"] == theirs["steps"] == 10
    for when in ("init", "final"):
        assert mine[when].keys() == theirs[when].keys()
        for name, value in theirs[when].items():
            assert mine[when][name] == pytest.approx(value, rel=1e-9, abs=1e-9), (when, name)
    assert [row["step"] for row in rows(two)] == [str(n) for n in range(1, 11)]
    for ours, other in zip(rows(two), rows(one), strict=True):
        assert ours.keys() == other.keys()
        assert ours["train/num_tokens"] == other["train/num_tokens"]
        for name in COMPARED & ours.keys():  # a reward model has no likelihood
            assert (ours[name] == "") == (other[name] == "")
            if other[name]:
                assert float(ours[name]) == pytest.approx(float(other[name]), rel=1e-9)
    weights = [load_file(place / "model/model.safetensors") for place in (two, one)]
    assert weights[0].keys() == weights[1].keys()
    for name, value in weights[1].items():
        torch.testing.assert_close(weights[0][name], value, rtol=1e-6, atol=1e-9)
    told = [(place / "samples.jsonl").read_text().splitlines() for place in (two, one)]
    for ours, other in zip(*(map(json.loads, lines) for lines in told), strict=True):
        assert {k: v for k, v in ours.items() if "delta" not in k} == {
            k: v for k, v in other.items() if "delta" not in k
        }


@pytest.mark.parametrize(
    "words",
    [
        ("solver=none",),
        ("solver=penalty",),
        ("solver=unrolled",),
        ("loss=tdpo1",),
        ("loss=tdpo2", "model.lora.rank=2"),
        ("loss=sgdpo",),
        ("loss=reward",),
        ("loss=kto", "solver=penalty"),
        ("loss=bco", "solver=none"),
    ],
    ids=" ".join,
)
def test_two_processes_equal_one(tmp_path, words):
    for name, more in (("one", ()), ("two", TWO)):
        line = (*TINY, *words, *more, f"hydra.run.dir={name}")
        done = command(tmp_path, *line, timeout=300)
        assert (done.code, done.err) == (0, "")
    assert_one_run(tmp_path / "two", tmp_path / "one")


def test_pairs_that_are_sampled_are_the_same_in_both(tmp_path):
    """The policy's own answers, the judge's pairs and the win rate."""
    kept = [word for word in TINY if not word.startswith("data")]
    sizes = ("sft_rows=64", "prompts=24", "eval_prompts=7", "operations=1", "digits=1")
    words = (*kept, "data=arithmetic", *(f"data.{size}" for size in sizes), "sft.max_steps=60")
    for name, more in (("one", ()), ("two", TWO)):
        done = command(tmp_path, *words, *more, f"hydra.run.dir={name}", timeout=300)
        assert (done.code, done.err) == (0, "")
    assert "win_rate" in numbers(tmp_path / "one")["final"]
    assert_one_run(tmp_path / "two", tmp_path / "one")


TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "spo_lightning.train")


def test_torchrun_begins_them(tmp_path):
    one = command(tmp_path, *TINY, "solver=penalty", "hydra.run.dir=one", timeout=300)
    assert one.code == 0
    words = (*TINY, "solver=penalty", "hydra.run.dir=two")
    two = command(tmp_path, *words, module=TORCHRUN, timeout=300)
    assert two.code == 0, two.err
    assert_one_run(tmp_path / "two", tmp_path / "one")
    assert two.out.count("Run directory") == 1 and two.out.count("training 10/10") == 1
    assert {p.name for p in tmp_path.iterdir()} == {"one", "two"}


def test_srun_begins_them(tmp_path):
    """There is no SLURM here: two processes with the variables that its steps set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    step = {
        "SLURM_JOB_ID": "1",
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": "2",
        "SLURM_NODEID": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    words = (*TINY, "solver=penalty", "hydra.run.dir=two")
    ranks = [
        start(tmp_path, *words, **step, SLURM_PROCID=str(n), SLURM_LOCALID=str(n))
        for n in range(2)
    ]
    first, second = (end(rank, 300) for rank in ranks)
    assert (first.code, second.code, second.out, second.err) == (0, 0, "", ""), first.err
    one = command(tmp_path, *TINY, "solver=penalty", "hydra.run.dir=one", timeout=300)
    assert one.code == 0
    assert_one_run(tmp_path / "two", tmp_path / "one")


def others_of(pid: int) -> list[int]:
    """Processes below it that have begun to import torch."""
    listed = ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(pid)]  # whole lines, at any width
    found = subprocess.run(listed, capture_output=True)
    lines = found.stdout.decode().splitlines()
    return [int(line.split()[0]) for line in lines if "spawn_main" in line]


def training(directory: Path, process: subprocess.Popen, steps: int = 2) -> None:
    path, until = directory / "metrics.csv", time.monotonic() + 200
    while not path.exists() or path.read_text().count("\n") <= steps:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)


LONG = ("max_steps=100000", "checkpoint.every_n_steps=5", "eval.every_n_steps=0")


@pytest.mark.parametrize("killed", ["the first", "the other"])
def test_a_killed_process_ends_all(tmp_path, killed):
    process = start(tmp_path, *TINY, *TWO, *LONG, "hydra.run.dir=run")
    training(tmp_path / "run", process, 8)
    (other,) = others_of(process.pid)
    began = time.monotonic()
    os.kill(process.pid if killed == "the first" else other, signal.SIGKILL)
    done = end(process, 60)
    while Path(f"/proc/{other}").exists() and time.monotonic() - began < 40:
        time.sleep(0.1)
    assert not Path(f"/proc/{other}").exists() and time.monotonic() - began < 30
    status = json.loads((tmp_path / "run/status.json").read_text())
    if killed == "the first":
        assert done.code == -signal.SIGKILL
        return
    assert done.code == 1 and "process 1 of this run was killed by SIGKILL" in done.err
    assert "Traceback" not in done.err
    assert status["state"] == "failed" and "killed by SIGKILL" in status["error"]
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=False)
    step = saved["spo_lightning"]["outer_step"]
    again = ("ckpt_path=last", "hydra.run.dir=run", f"max_steps={step + 3}")
    done = command(tmp_path, *again, timeout=200)
    assert done.code == 0, done.err
    assert int(rows(tmp_path / "run")[-1]["step"]) == step + 3


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_ends_all(tmp_path, number, code):
    process = start(tmp_path, *TINY, *TWO, *LONG, "hydra.run.dir=run")
    training(tmp_path / "run", process)
    process.send_signal(number)
    done = end(process, 60)
    assert done.code == code and done.err.startswith(f"stopped by {number.name}. Go on with")
    status = json.loads((tmp_path / "run/status.json").read_text())
    assert status["state"] == "interrupted"
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=False)
    assert saved["spo_lightning"]["outer_step"] == len(rows(tmp_path / "run"))


def test_bad_input_ends_all_with_one_line(tmp_path):
    done = command(tmp_path, *TINY, *TWO, "sft.max_steps=1", "model.lora.rank=2",
                   "model.lora.targets=[nothing]", "hydra.run.dir=run", timeout=200)  # fmt: skip
    assert done.code == 2 and done.err.count("\n") == 1, done.err
    assert "model.lora.targets" in done.err
    done = command(tmp_path, *TINY, "batch_size=1", module=TORCHRUN, timeout=200)
    assert "gives no pair to some of the 2 processes" in done.err


def test_eval_and_sample_take_them_too(tmp_path):
    run = command(tmp_path, *TINY, "solver=penalty", "hydra.run.dir=run", timeout=300)
    assert run.code == 0
    data = [word for word in SMALL if word.startswith("data")]
    looks = (*data, "checkpoint=run/model", "reference=run/model", "eval.batch_size=3")
    looks = (*looks, "cache.enabled=false", "eval.max_new_tokens=4", "dtype=float64")
    looks = (*looks, "eval.by=answer")
    found = []
    for name, words in (("one", ("hardware=cpu",)), ("two", TWO)):
        module = ("-m", "spo_lightning.eval")
        done = command(tmp_path, *looks, *words, f"output={name}.json", module=module, timeout=300)
        assert (done.code, done.err) == (0, "")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    one, two = (numbers.pop("by") for numbers in found)
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-9)
    assert one.keys() == two.keys() and len(one) > 1
    for value, numbers in one.items():
        assert two[value] == pytest.approx(numbers, rel=1e-9, abs=1e-9)
    answers = ("model=pretrained", "model.pretrained=run/model", *data, "judge=answer")
    answers = (*answers, "samples=3", "eval.batch_size=9", "cache.enabled=false")
    answers = (*answers, "eval.max_new_tokens=4", "temperature=1.5")
    for name, words in (("one", ("hardware=cpu",)), ("two", TWO)):
        module = ("-m", "spo_lightning.sample")
        more = (f"output={name}.jsonl", *words)
        done = command(tmp_path, *answers, *more, module=module, timeout=300)
        assert (done.code, done.err) == (0, "")
    one, two = ((tmp_path / f"{n}.samples.jsonl").read_text() for n in ("one", "two"))
    assert one == two


def test_work_is_dealt_and_counted_once():
    """Three ranks, seven items: equal turns, and every item counts in one of them."""
    turns = [list(World(rank, 3).deal(range(7))) for rank in range(3)]
    assert {len(mine) for mine in turns} == {3}
    counted = [turn.item for mine in turns for turn in mine if turn.mine]
    assert sorted(counted) == list(range(7))
    assert [turn.together for turn in turns[0]] == [range(0, 3), range(3, 6), range(6, 7)]
    assert all(turn.item == 6 for turn in (turns[0][2], turns[1][2], turns[2][2]))


def test_one_process_sends_nothing():
    alone = World()
    assert alone.gather(3) == [3] and alone.once(lambda: 4) == 4 and alone.first
    value = torch.ones(2)
    assert alone.sum(value) is value
    with pytest.raises(ZeroDivisionError):
        alone.once(lambda: 1 // 0)
