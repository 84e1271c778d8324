"""A run whose policy draws, killed by SIGKILL in every stage, goes on as if it had not been."""

import random

import pytest
import torch
from conftest import forked
from safetensors.torch import load_file
from test_kills import STEPS, Moment, after_training, at_step, in_stage, killed, saves, writes
from test_processes import numbers, rows

pytest.importorskip("diffusers")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

LINE = (
    *("experiment=diffusion_shapes", "loss=dpo", "solver=penalty", "model.lora.rank=2"),
    *("model.config.block_out_channels=[16,16]", "hardware=cpu", "hardware.threads=1"),
    *("data.prompts=72", "data.eval_prompts=24", "data.sft_rows=256", "sft.max_steps=60"),
    *(f"max_steps={STEPS}", "batch_size=8", "micro_batch_size=4", "model.sampling.steps=4"),
    *("eval.every_n_steps=10", "log.every_n_steps=1", "checkpoint.every_n_steps=1"),
    *("checkpoint.monitor=null", "optimizer.lr=1e-3"),
)


def moments(chance):
    """Ten, of which what must come before the last step does."""
    before = [at_step(step) for step in chance.sample(range(2, STEPS - 10), 3)]
    before += [Moment("writing", writes, 0.01)] * 2
    chance.shuffle(before)
    return [
        Moment("start", lambda *_: True, 3.0),
        Moment("pretraining", in_stage("pretraining"), 0.3),
        Moment("images", in_stage("train images", "held-out images"), 0.2),
        *before,
        Moment("held-out", after_training, 0.1),
        Moment("saving", saves),
    ]


@pytest.mark.parametrize("seed", range(2))
def test_a_run_that_is_killed_ten_times_ends_as_one_that_is_not(tmp_path, seed):
    chance, again = random.Random(seed), ("ckpt_path=last",)
    words = (*LINE, f"seed={seed}")
    for moment in moments(chance):
        begun = (tmp_path / "run/config.yaml").exists()
        killed(tmp_path, again if begun else words, moment, chance, alone=True)
    done = forked(tmp_path, *again, "hydra.run.dir=run", timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    # with a cache of its own: nothing that a killed run left there
    apart = (*words, "hydra.run.dir=undisturbed", "cache.dir=another")
    done = forked(tmp_path, *apart, timeout=600)
    assert (done.code, done.err) == (0, ""), done.err
    mine, theirs = (tmp_path / name for name in ("run", "undisturbed"))
    file = "model/unet/diffusion_pytorch_model.safetensors"
    one, other = load_file(mine / file), load_file(theirs / file)
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    assert numbers(mine) == numbers(theirs)
    for name in ("samples.jsonl", "samples.png", "pairs.png"):
        assert (mine / name).read_bytes() == (theirs / name).read_bytes()
    told = [
        [{k: v for k, v in row.items() if "time/" not in k} for row in rows(place)]
        for place in (mine, theirs)
    ]
    assert told[0] == told[1] and len(told[0]) >= STEPS
