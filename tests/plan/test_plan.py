"""The plan: what it counts is what is there, and what it says of models that are not at hand."""

from contextlib import nullcontext

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from spo_lightning.command import CONF
from spo_lightning.errors import UserError
from spo_lightning.models.policy import of_config
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer
from spo_lightning.plan import memory, sums
from spo_lightning.plan.shape import imagined

GIB = 2**30


def config(*words):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose("plan", ["hardware=cpu", *words])


@pytest.mark.parametrize("lora", [0, 4])
def test_what_is_imagined_is_what_a_real_step_holds(lora):
    cfg = config("model=llama", "loss=dpo", "model.config.hidden_size=64")
    made = imagined(cfg)
    real = of_config(cfg, "cpu")
    scorer = Scorer(real.lm, True, reading=Reading("model"))
    assert made.parameters == sum(p.numel() for p in real.lm.parameters())
    batch = memory.batch_of(4, 40, 20)
    for parts in (1, 2):
        counted = memory.of_step(scorer, batch, nullcontext, parts)
        guess = memory.of_step(made.scorer, batch, nullcontext, parts)
        assert guess == pytest.approx(counted, rel=0.01)
    look = memory.of_look(made.scorer, batch, nullcontext)
    assert look == pytest.approx(memory.of_look(scorer, batch, nullcontext), rel=0.01)
    assert look < guess


def test_eight_billion(tmp_path):
    """Published: 8.03 billion parameters; none of them is loaded."""
    base = ("model=llama3-8b", "hardware.precision=bf16-true", "loss=dpo")
    short = ("micro_batch_size=1", "eval.batch_size=1", "plan.prompt=16", "plan.completion=8")
    whole = sums.planned(config(*base, *short))
    assert whole.device["weights"] == 2 * 8_030_261_248
    assert whole.device["gradients"] == whole.device["weights"]
    assert whole.device["optimizer"] == 8 * 8_030_261_248  # two moments in float32
    four = sums.planned(config(*base, *short, "model.lora.rank=16", "model.quantize=nf4"))
    assert 5.0 * GIB < four.device["weights"] < 5.8 * GIB
    assert four.device["gradients"] == 4 * 16 * 32 * (
        2 * (4096 + 4096) + 2 * (4096 + 1024) + 3 * (4096 + 14336)
    )


def test_an_optimizer_is_measured():
    kept = {name: memory.of_optimizer(config(f"optimizer={name}"), torch.float32)
            for name in ("adamw", "sgd", "rmsprop")}  # fmt: skip
    assert kept == {"adamw": 8, "sgd": 0, "rmsprop": 4}
    half = memory.of_optimizer(config("optimizer.bf16=master"), torch.bfloat16)
    assert half == 12


def test_what_takes_less():
    words = ("model=llama", "model.config.hidden_size=64", "plan.prompt=64", "plan.completion=32")
    base = sums.planned(config(*words))
    ways = {
        "checkpointing": ("hardware.activation_checkpointing=true",),
        "microbatches": ("micro_batch_size=2",),
    }
    for name, more in ways.items():
        less = sums.planned(config(*words, "eval.batch_size=2", *more))
        assert less.device["activations"] < 0.6 * base.device["activations"], name
    inner = sums.planned(config(*words, "solver=penalty", "solver/value=inner"))
    assert inner.device["solver"] == 2 * base.device["gradients"]
    found = sums.changes(config(*words), base.peak - 1)
    assert found[0][1] < base.peak and "micro_batch_size=1" in dict(found)


def test_what_is_not_at_hand():
    cfg = config("model=pretrained", "model.pretrained=somebody/nothing")
    with pytest.raises(UserError, match="its config.json is not at hand"):
        imagined(cfg)
    OmegaConf.update(cfg, "model.shape", {"model_type": "llama", "hidden_size": "wide"})
    with pytest.raises(UserError, match="model.shape: "):
        imagined(cfg)
