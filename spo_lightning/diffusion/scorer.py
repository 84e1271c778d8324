"""ImageBatch in, PairLogps out: the only code that asks the denoiser.

An image is an answer of one token, whose log-probability is its surrogate (``objective.py``).
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.diffusion.batch import ImageBatch
from spo_lightning.diffusion.objective import Schedule
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.logps import PairLogps


class ImageScorer(nn.Module):
    """``denoiser``: a diffusers UNet or transformer (adapters, if any, injected in place).

    ``scale`` is T, and ``weights`` [P] are w(t). The rest is what a scorer of tokens has too.
    """

    predicts = False  # no tokens, whose distribution one could look at
    squares, beside, spread, stays, compiled = False, None, None, False, False
    reading = SimpleNamespace(reward=False)

    def __init__(self, denoiser: Any, schedule: Schedule, *, scale: float, weights: Tensor):
        super().__init__()
        self.model, self.schedule = denoiser, schedule
        self.scale, self.weights = scale, weights

    @property
    def device(self) -> Any:
        return self.model.device

    def forward(self, batch: ImageBatch) -> PairLogps:
        """l of every image, the mean over its draws. Differentiable.

        Raises ValueError where the batch has no draws yet.
        """
        if batch.times is None or batch.noise is None:
            raise ValueError("the batch has no times and noise: Draws.of gives it some")
        count = batch.times.shape[1]
        places, noise = batch.times[batch.pair].flatten(), batch.noise[batch.pair].flatten(0, 1)
        latents = batch.latents.repeat_interleave(count, 0)
        told = {name: it.repeat_interleave(count, 0) for name, it in batch.conditions.items()}
        noisy = self.schedule.noised(latents, noise, places)
        times = self.schedule.times.to(places.device)[places]
        predicted = self.denoised(noisy, times, told)
        errors = (self.schedule.asked(latents, noise, places) - predicted).square().flatten(1)
        priced = self.scale * self.weights.to(errors)[places] * errors.mean(1)
        logps = -priced.view(-1, count).mean(1)
        return PairLogps(logps, batch.pair, batch.rejected, len(batch), rows=batch.rows)

    def denoised(self, noisy: Tensor, times: Tensor, told: Any) -> Tensor:
        """[N, ...] the target as the denoiser sees it; what it says of variances is left out."""
        found = self.model(noisy, times, **told).sample
        return found[:, : noisy.shape[1]]

    def twice(self) -> Callable[[], AbstractContextManager]:
        """A context whose forwards can be differentiated twice."""
        return MathKernel

    def smaller(self, batch: ImageBatch) -> list[ImageBatch]:
        return [batch]

    def keeps(self, batch: ImageBatch) -> bool:
        """Whether a graph of the whole batch may be kept: not where it comes in parts."""
        return False


def reference_of(scorer: ImageScorer) -> Callable[[ImageBatch], PairLogps]:
    """What the scorer says as it is now, whatever it learns later: with its adapters off, or from
    a frozen copy where all its weights train. Adapters must be new, whose update is 0."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in scorer.modules() if isinstance(layer, BaseTunerLayer)]
    judge = scorer if layers else deepcopy(scorer).requires_grad_(False)

    @contextmanager
    def off() -> Iterator[None]:
        trained = [p for p in judge.parameters() if p.requires_grad]
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)
            for p in judge.parameters():  # peft lets go of what it turns off
                p.requires_grad_(any(p is one for one in trained))

    @torch.no_grad()
    def reference(batch: ImageBatch) -> PairLogps:
        with off():
            return judge(batch)

    return reference
