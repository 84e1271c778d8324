"""Before the first step the policy is the reference: DPO's loss must be ln 2."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial

import torch
from lightning import Callback, Trainer

from spo_lightning import losses
from spo_lightning.data.batch import draws
from spo_lightning.data.sets import Pairs
from spo_lightning.models.scorer import reference_logps
from spo_lightning.training.module import Preference

BETA = 0.1  # of the DPO loss that is looked at, whatever loss is trained
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}
HALF = 2e-2  # of bfloat16, in weights or in arithmetic


class StartCheck(Callback):
    """Scores the first microbatch before any update; not on resume."""

    def __init__(
        self,
        pairs: Pairs,
        *,
        seed: int,
        size: int,
        half: bool,
        precision: Callable[[], AbstractContextManager],
    ):
        self.pairs, self.seed, self.size = pairs, seed, size
        self.half, self.precision = half, precision

    @torch.no_grad()
    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if module.outer_step > 0:
            return
        rows = next(draws(len(self.pairs), self.size, self.seed, 0))
        batch = self.pairs.batch(rows).to(module.device)
        with self.precision():
            policy = module.scorer(batch)
        reference = reference_logps(batch)
        dpo = partial(losses.dpo, beta=BETA, label_smoothing=0.0)
        off = (dpo(policy, reference) - math.log(2)).abs()
        weights = module.scorer.model.dtype
        tolerance = HALF if self.half or weights == torch.bfloat16 else TOLERANCE[weights]
        worst = int(off.argmax())
        if not off.mean() <= tolerance:
            change = (policy.chosen - reference.chosen)[worst].item()
            raise RuntimeError(
                f"at step 0 the policy should be the reference, yet DPO's loss is off ln 2 by "
                f"{off.mean().item():.2g} (row {batch.rows[worst].item()}: log pi(y_w) differs by "
                f"{change:.3g} nats): the two were scored in another dtype, with another "
                "attention implementation, with dropout, or with other weights"
            )
