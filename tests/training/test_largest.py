"""data.tokens_per_batch=auto: what is found fits, is the most that does, and leaves no trace."""

import json
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, command, environment
from fitting import SOLVERS, config, fitted, objective, scored, snapshot
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from tiny import lora, policy, random_pairs

from spo_lightning.models import memory
from spo_lightning.train import train
from spo_lightning.training.largest import most

MIB = 2**20


# -- the search


@given(
    st.integers(2, 2000),
    st.integers(1, 200_000),
    st.floats(0, 1e6),
    st.floats(0.1, 1e4),
    st.floats(1, 1e9),
)
def test_the_most_within_a_tenth_and_no_trial_takes_more_than_there_is(least, more, a, b, room):
    """Weights on a line, as gradients and activations have it."""
    whole, asked = least + more, []

    def weigh(tokens):
        asked.append(tokens)
        return a + b * tokens

    found = most(weigh, least, whole, room)
    truth = min(whole, int((room - a) / b))
    assert all(weight <= room * (1 + 1e-9) for weight in map(weigh, asked[1:]))
    assert least <= found <= max(least, truth)
    assert found == whole or truth <= 1.1 * found + 1
    assert len(asked) <= 2 * (5 + math.log2(whole / least))


@given(st.integers(2, 500), st.integers(1, 100_000), st.integers(1, 100_000))
def test_where_memory_ends_before_it_is_said_to(least, more, end):
    """A trial fails outright: it is not asked for again, and the search ends below it."""
    whole, asked = least + more, []

    def weigh(tokens):
        assert tokens not in asked
        asked.append(tokens)
        return math.inf if tokens > end else float(tokens)

    found = most(weigh, least, whole, 1e12)
    truth = max(least, min(whole, end))
    assert least <= found <= truth and found in asked
    assert found == whole or truth <= 1.25 * found + 2


def test_weights_that_do_not_show_stop_nothing():
    assert most(lambda tokens: 0.0, 10, 1000, 1.0) == 1000


# -- what is free


def test_the_tightest_group_counts(tmp_path, monkeypatch):
    """Files as the kernel writes them; a group without a limit says max."""
    files = {"memory.max": "1000\n", "memory.current": "700\n"}
    files["memory.stat"] = "anon 600\ninactive_file 50\nactive_file 40\n"
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    names = memory.VERSIONS[0][2:]
    assert [*memory._left(tmp_path, *names)] == [350]
    (tmp_path / "memory.max").write_text("max\n")
    assert not [*memory._left(tmp_path, *names)]
    assert not [*memory._left(tmp_path / "unseen", *names)]
    own = torch.device("cpu")
    assert memory.in_use(own) > 0 and memory.free(own) > 0
    monkeypatch.setattr(memory, "_below_limits", lambda: iter([350]))
    assert memory.free(own) == 350


def test_the_peak_is_seen():
    own, before = torch.device("cpu"), memory.in_use(torch.device("cpu"))
    memory.forget(own)
    torch.ones(16 * MIB).sum()  # gone again when it is asked for
    assert 60 * MIB < memory.peak(own) - before < 100 * MIB


# -- in training


CASES = {
    **{name: ("loss=dpo", *SOLVERS[name]) for name in ("none", "softplus", "inner", "second")},
    "implicit": ("loss=dpo", *SOLVERS["implicit"]),
    "coin": ("loss=dpo", *SOLVERS["coin"]),
    "alpha_dpo": ("loss=alpha_dpo",),
    "kto": ("loss=kto", "solver=penalty"),
}


USUAL = ("none", "second", "kto")  # what is like one of them is slow


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in USUAL else [pytest.mark.slow]) for n in CASES]
)
def test_trials_leave_no_trace(name, caplog):
    """Parameters and numbers are those of the same number given by hand, bit for bit."""
    caplog.set_level("INFO")
    how = {"steps": 3, "batch_size": 6, "optimizer": torch.optim.AdamW}
    torch.manual_seed(1)
    auto = fitted(policy(), objective(*CASES[name]), tokens="auto", **how)
    drawn = torch.rand(())
    (said,) = (line for line in caplog.messages if line.startswith("data.tokens_per_batch=auto"))
    number = auto.module.tokens
    assert f"=auto: {number} tokens a forward, all of an outer step" in said
    torch.manual_seed(1)
    given = fitted(policy(), objective(*CASES[name]), tokens=number, **how)
    assert torch.equal(drawn, torch.rand(()))
    for key, value in snapshot(given.module).items():
        assert torch.equal(value, snapshot(auto.module)[key]), key
    assert auto.numbers == given.numbers


@pytest.mark.parametrize("attention", ["auto", "eager"])
def test_texts_and_padded_models(attention, monkeypatch):
    """Nothing is free, so that every row stands alone; the lower level's texts count."""
    monkeypatch.setattr(memory, "free", lambda device: -1)  # so small a step may show no bytes
    made = lora(policy(attention=attention))
    rows = [replace(pair, rejected=()) for pair in random_pairs(7, seed=9)]
    given, below = scored(made.lm), scored(made.lm, rows)
    auto = fitted(made, objective("loss=spo"), given, tokens="auto", lower=below, steps=2)
    assert auto.module.tokens == max(map(len, given.pairs)) + max(map(len, below.pairs))


def test_a_run_goes_on_with_the_number_it_found(tmp_path, cache, monkeypatch):
    """Nothing is free at first, plenty when it goes on: another number would round otherwise."""
    words = [word for word in SMALL if not word.startswith("micro")]
    words += ["loss=spo", cache, "checkpoint.every_n_steps=5", "data.tokens_per_batch=auto"]
    real = memory.free
    monkeypatch.setattr(memory, "free", lambda device: -1)
    train(config(*words, "max_steps=12"), tmp_path / "whole")
    train(config(*words, "max_steps=5"), tmp_path / "parts")
    monkeypatch.setattr(memory, "free", real)
    train(config(*words, "max_steps=12", "ckpt_path=last"), tmp_path / "parts")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=False)
        for name in ("whole", "parts")
    )
    numbers = [it["spo_lightning"]["tokens_per_batch"] for it in (whole, parts)]
    assert numbers[0] == numbers[1] < 40  # of a row; a step of four would have twice as many
    for name, value in whole["state_dict"].items():
        assert torch.equal(parts["state_dict"][name], value), name


# -- for real


TRAINED = """
import json, sys, torch
from fitting import fitted, objective, scored
from tiny import policy, random_pairs
from spo_lightning.models import memory
from spo_lightning.training import largest

share, limit = float(sys.argv[1]), float(sys.argv[2])
torch.set_num_threads(1)
sizes = {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 3}
made = policy(dtype="float32", **sizes)
given = scored(made.lm, random_pairs(48, longest=80))
room, own = share * 2**20, torch.device("cpu")
if limit:
    import resource
    now = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + int(limit * 2**20),) * 2)
else:
    memory.free = lambda device: room
before = memory.in_use(own)
memory.forget(own)
done = fitted(made, objective("loss=spo"), given, tokens="auto", batch_size=48, steps=2)
whole = sum(map(len, given.pairs))
taken = (memory.peak(own) - before) / 2**20
print(json.dumps({"tokens": done.module.tokens, "whole": whole, "taken": taken}))
"""


def trained(share, limit=0.0):
    """In a process of its own, which has seen nothing larger before."""
    here = os.path.dirname(os.path.dirname(__file__))
    line = [sys.executable, "-c", TRAINED, str(share), str(limit)]
    env = environment(PYTHONPATH=os.pathsep.join([here, os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(line, capture_output=True, text=True, env=env, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_what_is_found_fits_and_is_most_of_what_would():
    """By measured memory: training stays within what was said to be free, and uses most of it."""
    plenty = trained(100_000)
    assert plenty["tokens"] == plenty["whole"]
    room = plenty["taken"] / 2
    found = trained(room)
    assert found["tokens"] < found["whole"]
    assert 0.5 * room < found["taken"] < room
    tighter = trained(room * 0.6)
    assert tighter["tokens"] < found["tokens"] and tighter["taken"] < room * 0.6


@pytest.mark.slow
def test_where_the_system_says_no():
    """A real lack of memory, which the figure of what is free did not show."""
    plenty = trained(100_000)
    found = trained(0, limit=plenty["taken"] * 0.7)
    assert 0 < found["tokens"] < found["whole"]


@pytest.mark.slow
def test_several_processes_take_one_number(tmp_path):
    words = [word for word in SMALL if not word.startswith("micro")]
    words += ["max_steps=4", "loss=spo", "data.tokens_per_batch=auto", "cache.enabled=false"]
    words += ["model.dtype=float64", "hardware.precision=64-true", "batch_size=7"]
    two = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")
    for name, more in (("one", ()), ("two", two)):
        done = command(tmp_path, *words, *more, f"hydra.run.dir={name}", timeout=400)
        assert done.code == 0, done.err
        assert done.out.count("data.tokens_per_batch=auto: ") == 1
    one, two = (load_file(tmp_path / name / "model/model.safetensors") for name in ("one", "two"))
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-6, atol=1e-9)
