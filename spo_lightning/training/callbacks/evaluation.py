"""First after each outer step: training's pace, and the held-out log-probabilities when due."""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning import Callback, Trainer

from spo_lightning import losses
from spo_lightning.data.sets import Pairs
from spo_lightning.evaluation.held_out import pair_totals
from spo_lightning.training.module import Preference

EVAL_NAMES = (
    "eval/loss",
    "eval/rewards/chosen",
    "eval/rewards/rejected",
    "eval/rewards/accuracies",
    "eval/rewards/margins",
    "eval/logps/chosen",
    "eval/logps/rejected",
    "eval/nll/chosen",
    "eval/preference/accuracy",
    "eval/preference/accuracy_norm",
    "eval/displacement/rate",
    "eval/displacement/chosen",
    "eval/entropy/top10",
    "eval/mass/top10",
)


class Evaluation(Callback):
    """Adds to ``module.numbers``. ``every``: outer steps between evaluations; 0 is off.

    ``epoch``: passes over the training pairs, of the outer step and of the pairs seen.
    """

    def __init__(
        self,
        held: Pairs,
        *,
        epoch: Callable[[int, int], float],
        every: int,
        batch_size: int,
        precision: Callable[[], AbstractContextManager],
    ):
        self.held, self.epoch = held, epoch
        self.every, self.batch_size, self.precision = every, batch_size, precision

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        self.clock, self.tokens = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += sum(part.tokens for part in batch) * trainer.world_size
        if module.numbers:
            module.numbers |= self._pace(module)
        if self.every and module.outer_step % self.every == 0:
            module.numbers |= self._evaluate(trainer, module)

    def _pace(self, module: Preference) -> dict[str, float]:
        now = time.monotonic()
        rate = self.tokens / max(now - self.clock, 1e-9)
        self.clock, self.tokens = now, 0
        epoch = self.epoch(module.outer_step, module.pairs_seen)
        return {"train/epoch": epoch, "train/time/tokens_per_second": rate}

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, module: Preference) -> dict[str, float]:
        began = time.monotonic()
        batches = self.held.batches(self.batch_size)
        mine = batches[trainer.global_rank :: trainer.world_size]
        with self.precision():
            totals = pair_totals(
                module.scorer,
                self.held,
                mine or batches[:1],
                loss=module.loss,
                moments=losses.moments_of(module.moments_state),
                beta=module.beta,
                top=True,
            )
        if not mine:  # more ranks than batches: zeros, under the names the other ranks reduce
            totals.sums = {name: (0 * total, 0 * n) for name, (total, n) in totals.sums.items()}
        means = module._reduce(totals).means()
        self.clock += time.monotonic() - began  # evaluation is not training's pace
        return {f"eval/{name}": value.item() for name, value in means.items()}
