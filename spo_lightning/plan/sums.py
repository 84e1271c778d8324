"""A config in; bytes of each kind on a device, of the disk, and seconds of a step out."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.models.device import precision_of
from spo_lightning.plan import memory
from spo_lightning.plan.shape import Imagined, imagined

GIB = 2**30
# what a solver holds at its peak beside theta and one gradient, in copies of what trains, and its
# forward and backward passes; by the part of the config that asks for it
HELD: dict[str, tuple[int, int]] = {
    "values.Inner": (2, 1),  # the shadow; theta while the parameters hold the shadow
    "unrolled.Unrolled": (3, 1),  # theta' and theta, and the first inner slope
    "unrolled.Preconditioned": (2, 0),  # squares and scale
    "implicit.Implicit": (6, 6),  # theta, phi, its last step, and three vectors of the solve
    "weights.SlackBarrier": (1, 1),  # two gradients
    "alternating.Gap": (1, 1),
}
# words that take less memory, each by itself
CHANGES: list[Mapping[str, Any]] = [
    {"micro_batch_size": 1},
    {"hardware.activation_checkpointing": True},
    {"hardware.logits_mib": 64},
    {"eval.batch_size": 8},
    {"model.dtype": "bfloat16", "hardware.precision": "bf16-true"},
    {"model.lora.rank": 16},
    {"model.lora.rank": 16, "model.quantize": "nf4"},
]


@dataclass(frozen=True)
class Planned:
    """Bytes on a device at the peak, by what holds them; of the disk; operations of a step."""

    device: dict[str, float]
    disk: dict[str, float]
    products: float  # floating-point operations of matrices
    attended: float  # of attention
    moved: float  # bytes that the optimizer reads and writes

    @property
    def peak(self) -> float:
        return sum(self.device.values())


def planned(cfg: DictConfig) -> Planned:
    """All of a run that is known before it."""
    model = imagined(cfg)
    copies, passes = held(cfg)
    asked, here = cfg.plan, max(1, cfg.batch_size // cfg.hardware.devices)
    micro = min(cfg.micro_batch_size, here)
    if cfg.data.get("tokens_per_batch"):
        row = asked.prompt + 2 * asked.completion
        micro = min(here, max(1, cfg.data.tokens_per_batch // row))
    precision = precision_of(cfg.hardware, "cpu")
    lengths = asked.prompt, asked.completion
    step = memory.batch_of(micro, *lengths)
    looked = memory.batch_of(min(cfg.eval.batch_size, asked.pairs), *lengths)
    parts = math.ceil(here / micro)
    active = memory.of_step(model.scorer, step, precision, parts)
    looks = memory.of_look(model.scorer, looked, precision)
    trained = model.trained * model.each
    weights = model.weights / asked.shards
    kept = model.trained * memory.of_optimizer(
        cfg, model.scorer.model.dtype if not cfg.model.lora.rank else _float32()
    )
    unsharded = 2 * model.largest * model.each if asked.shards > 1 else 0.0
    rounded = model.largest * 4 if cfg.model.get("quantize") else 0
    device = {
        "weights": weights + unsharded,
        "gradients": trained / asked.shards,
        "optimizer": kept / asked.shards,
        "solver": copies * trained / asked.shards,
        "reference": _reference(cfg, model) / asked.shards,
        # the larger of a step's and of a look's, which has no gradients
        "activations": max(active - trained, looks - trained / asked.shards) + rounded,
    }
    return Planned(device, _disk(cfg, model, kept), *_work(cfg, model, passes, here, kept))


def held(cfg: DictConfig) -> tuple[int, int]:
    """Copies beside theta and its gradient, and passes beside the first."""
    names: list[str] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            names.append(str(node.get("_target_")))
            for part in node.values():
                walk(part)

    walk(OmegaConf.to_container(cfg.solver, resolve=True))
    found = [HELD.get(name.removeprefix("spo_lightning.solvers."), (0, 0)) for name in names]
    steps = OmegaConf.select(cfg, "solver.steps") or 1
    return sum(c for c, _ in found), sum(p for _, p in found) * steps


def _reference(cfg: DictConfig, model: Imagined) -> float:
    """A copy that stays what the policy was: adapters and rows scored before need none."""
    from spo_lightning.losses import asks
    from spo_lightning.run.job import loss_of

    stays = cfg.data.get("stream") or asks(loss_of(cfg), "divergences")
    another = cfg.model.reference is not None
    return model.weights if another or (stays and not cfg.model.lora.rank) else 0


def _disk(cfg: DictConfig, model: Imagined, kept: float) -> dict[str, float]:
    trained = model.trained * model.each
    written = trained if cfg.model.lora.rank and not cfg.model.lora.merge else model.weights
    files = 2 if cfg.checkpoint.monitor is None else 3  # the last, the one before it, the best
    tokens = cfg.plan.pairs * (cfg.plan.prompt + 2 * cfg.plan.completion)
    return {
        "checkpoints": files * (trained + kept),
        "model": written,
        # a float of every scored token, an id of every token
        "cache": 4.0 * (2 * cfg.plan.pairs * cfg.plan.completion + tokens),
    }


def _work(
    cfg: DictConfig, model: Imagined, passes: int, here: int, kept: float
) -> tuple[float, float, float]:
    """Operations of matrices and of attention in an outer step, and bytes the optimizer moves."""
    p, c = cfg.plan.prompt, cfg.plan.completion
    layers, width = model.layers
    forward = 2 * model.linear * (p + 2 * c) + 2 * model.head * 2 * c
    attended = 4 * layers * width * (p * (p + 1) / 2 + 2 * (c * p + c * (c + 1) / 2))
    # backward: by inputs, and by weights where they train; a checkpointed layer is done again
    times = (2 if cfg.model.lora.rank else 3) + cfg.hardware.activation_checkpointing
    times = times * (1 + passes) * here
    trained = model.trained * model.each
    return times * forward, times * attended, 2 * kept + 3 * trained


def _float32() -> Any:
    import torch

    return torch.float32


def seconds(found: Planned, rates: Mapping[str, float]) -> float:
    """Of an outer step, by measured rates."""
    return (
        found.products / rates["matrices"]
        + found.attended / rates["attention"]
        + found.moved / rates["optimizer"]
    )


def changes(cfg: DictConfig, room: float) -> list[tuple[str, float]]:
    """Single changes, and the peak with each; those that fit come first, the largest of them
    first, as what takes least away."""
    rows = []
    for words in CHANGES:
        if all(OmegaConf.select(cfg, key) == value for key, value in words.items()):
            continue
        other = cfg.copy()
        for key, value in words.items():
            OmegaConf.update(other, key, value)
        said = " ".join(f"{key}={str(value).lower()}" for key, value in words.items())
        rows.append((said, planned(other).peak))
    return sorted(rows, key=lambda row: (row[1] > room, -row[1] if row[1] <= room else row[1]))
