"""What does not go with parameters that are spread over processes (``hardware=fsdp``)."""

from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.errors import UserError

OUT = "leave it out, or take hardware=ddp"
# key, values refused, why
SHARDED: list[tuple[str, Callable[[Any], bool], str]] = [
    ("model.quantize", bool, "no process can have a part of quantised bytes: take hardware=ddp"),
    ("hardware.compile", bool, f"what gathers the weights of a layer is not compiled: {OUT}"),
    (
        "data.tokens_per_batch",
        bool,
        f"processes would have unequal numbers of microbatches and wait for one another: {OUT}",
    ),
    (
        "diagnostics.geometry.every_n_steps",
        bool,
        f"it differentiates by torch.autograd.grad, which finds no spread weights: {OUT}",
    ),
    (
        "diagnostics.evolution.every_n_steps",
        bool,
        f"spread weights have no forward-mode derivative: {OUT}",
    ),
    (
        "solver.hvp._target_",
        lambda v: str(v).endswith(".Exact"),
        "spread weights are differentiated once: take solver/hvp=finite_difference",
    ),
    (
        "optimizer._target_",
        lambda v: str(v).startswith("bitsandbytes."),
        "its blocks of 8 bits would end where a process's part does: take optimizer=adamw, whose "
        "moments are spread too",
    ),
]


def check_sharded(cfg: DictConfig) -> None:
    """Refused by what the keys say; what only the model shows, ``models/sharded.py`` refuses."""
    spread = OmegaConf.select(cfg, "hardware.sharding") is not None
    if spread != (OmegaConf.select(cfg, "hardware.strategy") == "fsdp"):
        raise UserError(
            "hardware.strategy comes with its keys: take hardware=fsdp or hardware=ddp"
        )
    for key, refused, why in SHARDED if spread else ():
        value = OmegaConf.select(cfg, key)
        if refused(value):
            raise UserError(f"{key}={value} does not go with hardware=fsdp: {why}")
    apart = OmegaConf.select(cfg, "hardware.sharding.gather_for_answers") is False
    if apart and cfg.eval.get("tasks"):
        raise UserError(
            "hardware.sharding.gather_for_answers=false does not go with eval.tasks: the harness "
            "asks one process that has all weights: leave either out"
        )
    if spread and "samples" in cfg:
        raise UserError(
            "hardware=fsdp: every process answers with all weights, so none would be spread: take "
            "hardware=ddp"
        )
