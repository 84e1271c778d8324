"""What held-out answers come to as training goes on: exact match, ROUGE, win rate, refusals."""

import logging
from contextlib import suppress
from typing import Any

import torch
from lightning import Callback, Trainer

from spo_lightning.errors import Interrupted, UserError
from spo_lightning.evaluation.shares import SHARES
from spo_lightning.training.callbacks.setting import Setting
from spo_lightning.training.module import Preference

log = logging.getLogger(__name__)


class Quality(Callback):
    """``eval/exact_match``, ``eval/win_rate`` and the like, as far as data and judge allow: the
    numbers of a run's end, or those that ``setting.quality`` is, at each ``every_n_steps``-th
    outer step."""

    names = [
        f"eval/{name}"
        for name in (
            *("exact_match", "rouge1", "rouge2", "rougeL"),
            *("win_rate", "win_rate_low", "win_rate_high", "win_rate_controlled"),
            *(f"answers/{kind}" for kind in SHARES),
        )
    ]

    def __init__(self, setting: Setting, *, every_n_steps: int):
        self.setting, self.every = setting, every_n_steps

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if module.outer_step % self.every:
            return
        devices = [module.device] if module.device.type == "cuda" else []
        # answers are drawn from a stream of their own; training's goes on as if nobody had looked
        # a signal that ends a judge's work is the recorder's to obey, which saves first
        with torch.random.fork_rng(devices), suppress(Interrupted):
            try:
                found = self.setting.quality()
            except UserError as error:  # of a judge's endpoint: training goes on
                log.warning("outer step %d is not judged: %s", module.outer_step, error)
                return
            module.numbers |= {f"eval/{name}": value for name, value in found.items()}
