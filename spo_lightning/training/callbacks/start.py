"""Before the first step the policy is the reference: every log-probability must be its own."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from lightning import Callback, Trainer

from spo_lightning.data.batch import draws
from spo_lightning.data.sets import Pairs
from spo_lightning.models.scorer import reference_logps
from spo_lightning.training.module import Preference

# nats by which right scorings of a token differ: packed in another batch, by other kernels
TOLERANCE = {torch.float32: 5e-4, torch.float64: 5e-6}
ROUNDINGS = 4  # the same of bfloat16, in its steps at the size of a logit; 1 to 2 were measured


def tolerated(dtype: torch.dtype, vocabulary: int) -> float:
    """Nats per token; n tokens differ by the root of n times as much, as roundings are a walk.

    A logit that stands out among V tokens is ln V above them, and bfloat16 rounds it to one part
    in 2^8: by 0.04 nats among 49,152 tokens, where 0.046 was measured (SmolLM2, 30 layers), and by
    0.024 among 512, where 0.044 was (a Llama of 260 thousand weights).
    """
    return TOLERANCE.get(dtype, ROUNDINGS * 2**-8 * math.log(vocabulary))


class StartCheck(Callback):
    """Scores the first microbatch before any update; not on resume.

    ``half``: the arithmetic is in bfloat16, whatever the weights are in.
    """

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
        change = policy.sums - reference_logps(batch).sums  # [B, 2]
        off = change.abs() / policy.lengths.sqrt()
        model = module.scorer.model
        dtype = torch.bfloat16 if self.half else model.dtype
        tolerance = tolerated(dtype, model.config.get_text_config().vocab_size)
        if not off.mean() <= tolerance:
            worst, side = divmod(int(off.argmax()), 2)
            raise RuntimeError(
                f"at step 0 the policy should be the reference, yet log-probabilities are off by "
                f"{off.mean().item():.2g} nats times the root of their tokens, of which "
                f"{tolerance:.2g} is rounding (row {batch.rows[worst].item()}: log pi(y_"
                f"{'wl'[side]}) differs by {change[worst, side].item():.3g} nats over "
                f"{policy.lengths[worst, side].item():.0f} tokens): the two were scored in "
                "another dtype, with another attention implementation, with dropout, or with "
                "other weights"
            )
