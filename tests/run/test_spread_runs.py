"""Runs whose parameters are spread: from files to a saved model, killed, and gone on with."""

import json
import os
import signal

import pytest
from conftest import SMALL, command, end, start
from safetensors.torch import load_file
from test_processes import LONG, TINY, TORCHRUN, assert_one_run, others_of, rows, training

from spo_lightning.records import checkpoints

EVEN = (*TINY, "batch_size=8")
SPREAD = ("hardware=fsdp", "hardware.accelerator=cpu")
TWO = (*SPREAD, "hardware.devices=2")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


# a checkpoint brings its own shape
OPENED = tuple(word for word in EVEN if not word.startswith(("model.config", "sft.")))


def run(place, *words, of=EVEN, **how):
    done = command(place, *of, *words, timeout=500, **how)
    assert (done.code, done.err) == (0, ""), done.err
    return done


@pytest.mark.parametrize(
    "words",
    [
        ("solver=penalty",),
        ("solver=penalty", "model.lora.rank=2"),
        ("loss=tdpo2", "model.lora.rank=2"),
        ("loss=reward", "solver=none"),
        ("loss=kto", "solver=penalty"),
        ("solver=none", "model.reference_sync=soft", "model.sync.every_n_steps=2"),
    ],
    ids=" ".join,
)
def test_two_parts_equal_one_run(tmp_path, words):
    run(tmp_path, *words, "hydra.run.dir=one")
    run(tmp_path, *words, *TWO, "hydra.run.dir=two")
    assert_one_run(tmp_path / "two", tmp_path / "one")


def test_answers_from_parts_are_those_of_all_weights(tmp_path):
    """Greedy and drawn ones, of a model whose embedding and head are two."""
    words = ("solver=none", "model.config.tie_word_embeddings=false")
    run(tmp_path, *words, "hydra.run.dir=one")
    parts = "hardware.sharding.gather_for_answers=false"
    run(tmp_path, *words, *TWO, parts, "hydra.run.dir=two")
    assert_one_run(tmp_path / "two", tmp_path / "one")
    done = command(tmp_path, *OPENED, *TWO, parts, "eval.tasks=[ifeval]")
    assert done.code == 2 and "gather_for_answers=false does not go with eval.tasks" in done.err


@pytest.mark.parametrize(
    "words",
    [
        ("solver=penalty",),
        ("model.lora.rank=2", "model.lora.merge=true"),
        ("loss=reward", "solver=none"),
    ],
    ids=" ".join,
)
def test_a_checkpoint_that_begins_in_parts_equals_one_run(tmp_path, words):
    """Its weights are read block by block, and adapters and a head are drawn before it."""
    run(tmp_path, "max_steps=1", "hydra.run.dir=begun")
    start = ("model=llama", "model.pretrained=begun/model", *words)
    run(tmp_path, *start, "hydra.run.dir=one", of=OPENED)
    done = run(tmp_path, *start, *TWO, "hydra.run.dir=two", of=OPENED)
    assert "reads the whole model" not in done.out
    assert_one_run(tmp_path / "two", tmp_path / "one")


def test_torchrun_begins_them(tmp_path):
    run(tmp_path, "solver=penalty", "hydra.run.dir=one")
    words = ("solver=penalty", *TWO, "hydra.run.dir=two")
    done = command(tmp_path, *EVEN, *words, module=TORCHRUN, timeout=500)
    assert done.code == 0, done.err
    assert_one_run(tmp_path / "two", tmp_path / "one")
    assert done.out.count("Run directory") == 1 and done.out.count("training 10/10") == 1


def weights(place):
    return load_file(place / "model/model.safetensors")


def assert_near(place, other, tolerance):
    mine, theirs = weights(place), weights(other)
    assert mine.keys() == theirs.keys()
    assert max(float((mine[name] - theirs[name]).abs().max()) for name in theirs) <= tolerance


def test_a_run_goes_on_with_as_many_processes_and_with_others(tmp_path):
    """With as many bit for bit; from two to one, and from one to two, to rounding."""
    solver = ("solver=penalty", "solver/value=inner")  # a shadow of every parameter is kept too
    one, half = ("hardware=cpu", "hardware.threads=1"), ("max_steps=5",)
    for name, words in (("one", one), ("two", TWO)):
        run(tmp_path, *solver, *words, f"hydra.run.dir={name}")
    for name, first, then in (
        ("two-two", TWO, TWO), ("two-one", TWO, one), ("one-two", one, TWO)
    ):  # fmt: skip
        run(tmp_path, *solver, *first, *half, f"hydra.run.dir={name}")
        again = (*then, "ckpt_path=last", "max_steps=10", f"hydra.run.dir={name}")
        done = command(tmp_path, *again, timeout=500)
        assert done.code == 0, done.err
        assert len(rows(tmp_path / name)) == 10
    assert_near(tmp_path / "two-two", tmp_path / "two", 0)
    for name in ("two", "two-one", "one-two"):
        assert_near(tmp_path / name, tmp_path / "one", 1e-9)


def test_a_killed_part_ends_all_and_the_run_goes_on_as_if_undisturbed(tmp_path):
    words = ("solver=penalty", "checkpoint.every_n_steps=1")
    process = start(tmp_path, *EVEN, *TWO, *LONG, *words, "hydra.run.dir=run")
    training(tmp_path / "run", process, 3)
    (other,) = others_of(process.pid)
    os.kill(other, signal.SIGKILL)
    done = end(process, 100)
    assert done.code == 1 and "process 1 of this run was killed by SIGKILL" in done.err
    assert "Traceback" not in done.err
    saved = checkpoints.read(tmp_path / "run/checkpoints/last.ckpt")
    steps = f"max_steps={saved['spo_lightning']['outer_step'] + 2}"
    done = command(tmp_path, "ckpt_path=last", steps, "hydra.run.dir=run", timeout=500)
    assert done.code == 0, done.err
    run(tmp_path, *TWO, *LONG, *words, steps, "hydra.run.dir=undisturbed")
    assert_near(tmp_path / "run", tmp_path / "undisturbed", 0)


def test_a_model_is_evaluated_to_the_same_numbers(tmp_path):
    run(tmp_path, "solver=penalty", *TWO, "hydra.run.dir=run")
    data = [word for word in SMALL if word.startswith("data")]
    looks = (*data, "checkpoint=run/model", "eval.batch_size=3", "eval.max_new_tokens=4")
    looks = (*looks, "cache.enabled=false", "dtype=float64", "reference=run/model")
    found = []
    for name, words in (("one", ("hardware=cpu",)), ("two", TWO)):
        module = ("-m", "spo_lightning.eval")
        done = command(tmp_path, *looks, *words, f"output={name}.json", module=module, timeout=500)
        assert (done.code, done.err) == (0, "")
        found.append(json.loads((tmp_path / f"{name}.json").read_text()))
    assert found[1] == pytest.approx(found[0], rel=1e-9, abs=1e-9)
    final = json.loads((tmp_path / "run/metrics.json").read_text())["final"]
    assert found[1]["logps/chosen"] == pytest.approx(final["logps/chosen"], rel=1e-9)
