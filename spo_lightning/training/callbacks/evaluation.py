"""First after each outer step: training's pace, and the held-out log-probabilities when due."""

import time
from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, Trainer

from spo_lightning.data.sets import Pairs
from spo_lightning.evaluation.groups import PerPair, means_by, places_by
from spo_lightning.evaluation.held_out import pair_totals
from spo_lightning.evaluation.totals import Totals
from spo_lightning.training.callbacks.setting import Setting
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

    ``epoch``: passes over the training pairs, of the outer step and of the pairs seen. ``names``:
    columns that it may fill besides ``EVAL_NAMES``, of groups of held-out pairs.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        epoch: Callable[[int, int], float],
        every: int,
    ):
        self.setting, self.epoch, self.every = setting, epoch, every
        self.names = [
            name.replace("eval/", f"eval/{group}/")
            for group in places_by(setting.held.groups)
            for name in EVAL_NAMES
        ] + ([] if setting.mismatched is None else ["eval/kl"])

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        self.clock, self.tokens = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.tokens += sum(part.tokens for part in batch) * trainer.world_size
        if module.numbers:
            module.numbers |= self._pace(module)
        if self.every and module.outer_step % self.every == 0:
            module.numbers |= self._evaluate(module)

    def _pace(self, module: Preference) -> dict[str, float]:
        now = time.monotonic()
        rate = self.tokens / max(now - self.clock, 1e-9)
        self.clock, self.tokens = now, 0
        epoch = self.epoch(module.outer_step, module.pairs_seen)
        return {"train/epoch": epoch, "train/time/tokens_per_second": rate}

    @torch.no_grad()
    def _evaluate(self, module: Preference) -> dict[str, float]:
        began, held = time.monotonic(), self.setting.held
        each = PerPair() if held.groups else None
        with self.setting.precision():
            kl = self._kl(module)
            totals = self._totals(module, held, loss=module.loss, kl=kl, top=True, each=each)
        means = {f"eval/{name}": value for name, value in totals.numbers().items()}
        means |= {} if kl is None else {"eval/kl": kl.item()}
        if each is not None:
            by = means_by(each.gathered(self.setting.world), held.groups)
            means |= {f"eval/{g}/{name}": v for g, of in by.items() for name, v in of.items()}
        self.clock += time.monotonic() - began  # evaluation is not training's pace
        return means

    def _kl(self, module: Preference) -> torch.Tensor | None:
        """How far the policy has moved on mismatched rows, at least 0; 0 where there are none."""
        others = self.setting.mismatched
        if others is None:
            return None
        found = self._totals(module, others, loss=None, kl=None, top=False, each=None)
        moved = found.numbers().get("displacement/chosen", 0.0)
        return torch.tensor(max(0.0, moved), dtype=torch.float64, device=module.device)

    def _totals(self, module: Preference, pairs: Pairs, **how: Any) -> Totals:
        return pair_totals(
            module.scorer,
            pairs,
            batch_size=self.setting.batch_size,
            moments=module.moments,
            beta=module.beta,
            world=self.setting.world,
            **how,
        )
