"""A configuration in; out comes nothing, or one line that refuses what cannot be foreseen."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spo_lightning.config.apart import Only, check_only
from spo_lightning.errors import UserError
from spo_lightning.records.directory import without_secrets

if TYPE_CHECKING:
    from omegaconf import DictConfig

# a fact that a loss's yaml tells -> why its pairs have no gradient of their own
LOSSES = {
    "unpaired": "its rows have one answer, and a pair's geometry is that of two",
    "whole_batch": "it judges all pairs of a step together",
    "rewards": "a reward model has no likelihood to lose",
    "template": "a ranker answers with a letter and has no likelihood to lose",
}

ONLY: Only = [
    ("data.stream", (None, False), "the preflight draws from all pairs: leave it out"),
    ("study", (None,), "an experiment without a model has nothing to look at: leave it out"),
    ("ckpt_path", (None,), "the preflight starts where the run begins: leave it out"),
    ("hardware.devices", (1,), "the preflight runs on one device: leave it out"),
]

# what decides which steps are taken on which pairs
TELLING = ("data", "loss", "solver", "optimizer", "seed", "batch_size", "max_length")


def telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What tells whether a run is the one that was looked ahead at, without secrets."""
    told = {key: config.get(key) for key in TELLING}
    data = dict(told["data"] or {})
    data.pop("layout", None)  # a run writes down the one that it found
    return without_secrets({**told, "data": data})


def refuse(cfg: "DictConfig") -> None:
    """Before anything is read."""
    for key, why in LOSSES.items():
        if cfg.loss.get(key):
            raise UserError(f"loss: {why}, so there is no preflight: train it")
    check_only(cfg, ONLY, "a preflight")
    if cfg.max_steps == 0:
        raise UserError("max_steps=0: nothing would be trained, so nothing can be foreseen")
    if cfg.max_steps * cfg.batch_size == 1:
        raise UserError("max_steps=1 of batch_size=1: one pair tells nothing of the others")
    weights = list(cfg.preflight.weights)
    if weights != sorted(weights) or any(not weight > 0 for weight in weights):
        raise UserError(f"preflight.weights={weights}: they must be above 0 and rise")
