"""A run's configuration and its material in, what a few real steps do to log pi(y_w) out.

The steps are the training command's own: its module, solver, optimizer, schedule and order of the
pairs. Afterwards the weights are what they were, bit for bit.
"""

import time
from dataclasses import dataclass
from typing import Any

import torch
from lightning import Trainer
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from spo_lightning.bench.ours import unmoved
from spo_lightning.data.sets import Pairs
from spo_lightning.models.scorer import Scorer
from spo_lightning.preflight.geometry import chosen, slopes
from spo_lightning.records.progress import quiet
from spo_lightning.run.record import Referenced
from spo_lightning.training.callbacks.evolution import Named
from spo_lightning.training.fit import OuterSteps, lightning_precision, module_of
from spo_lightning.training.microbatch import trainable

SIDES = ("seen", "held")


@dataclass(frozen=True)
class Pilot:
    """Changes of log pi(y_w) in nats, a list per side, ``seen`` and ``held``."""

    measured: dict[str, list[float]]
    first: dict[str, list[float]]  # gradient at the start times the step that was taken
    random: dict[str, list[float]]  # after a random step as long in every tensor
    step_seconds: float


def pilot(
    cfg: DictConfig,
    at: Referenced,
    objective: tuple[Any, Any],
    looked: dict[str, Pairs],
    steps: int,
    *,
    split: bool,
) -> Pilot:
    """``cfg``, ``steps``: of the run, whose schedule holds; ``split``: into first order and rest,
    beside a random step."""
    scorer = at.scorer
    before = {side: chosen(scorer, pairs) for side, pairs in looked.items()}
    with unmoved(scorer):
        start = (
            {name: p.detach().clone() for name, p in trainable(scorer).items()} if split else {}
        )
        seconds = _steps(cfg, at, objective, steps)
        measured = changes(scorer, looked, before)
        if not split:
            return Pilot(measured, {}, {}, seconds)
        delta = {n: p.detach() - start[n] for n, p in trainable(scorer).items()}
        first = {side: slopes(scorer, some, start, delta) for side, some in looked.items()}
        _step_at_random(scorer, start, delta, cfg.seed)
        return Pilot(measured, first, changes(scorer, looked, before), seconds)


def changes(
    scorer: Scorer, looked: dict[str, Pairs], before: dict[str, list[float]]
) -> dict[str, list[float]]:
    return {
        side: [now - then for now, then in zip(chosen(scorer, pairs), before[side])]
        for side, pairs in looked.items()
    }


def _steps(cfg: DictConfig, at: Referenced, objective: tuple[Any, Any], steps: int) -> float:
    """Take them; seconds of one."""
    quiet()
    module = module_of(cfg, at.scorer, *objective, steps)
    data = OuterSteps.of(cfg, module, at.train, at.lower, mismatched=at.mismatched.train)
    trainer = Trainer(
        accelerator=cfg.hardware.accelerator,
        devices=1,
        precision=lightning_precision(cfg.hardware),
        max_steps=cfg.preflight.pilot_steps,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    began = time.monotonic()
    trainer.fit(module, DataLoader(data, batch_size=None))
    module.to(at.world.device)  # Lightning leaves it on the CPU
    return (time.monotonic() - began) / cfg.preflight.pilot_steps


@torch.no_grad()
def _step_at_random(scorer: Scorer, start: Named, delta: Named, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in trainable(scorer).items():
        noise = torch.randn(parameter.shape, generator=chance).to(parameter)
        parameter.copy_(start[name] + noise * (delta[name].norm() / noise.norm().clamp(min=1e-30)))
