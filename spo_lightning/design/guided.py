r"""A denoiser, a preference and a weight in, designs out.

One step back in time is the denoiser's, moved along the preference's gradient:

$$ x_{t-1} = \mu_t + \sqrt{\beta_t} z
   + w \beta_t \nabla_{x_t} \log p_\phi(x_t \succ x_{ref} \mid t) $$

$x_{ref}$ is first a non-dominated design that is known, the same for all, and from then on what
$x_t$ was a step before.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spo_lightning.design.preference import Score, gradient
from spo_lightning.studies.denoiser import Schedule, Timed


@torch.no_grad()
def sampled(
    denoiser: Timed,
    score: Score,
    schedule: Schedule,
    known: Tensor,
    *,
    count: int,
    weight: float,
    clamp_every: int,
    draws: torch.Generator,
    advance: Callable[[], Any] = lambda: None,
) -> Tensor:
    """[count, D] designs in [-1, 1]. ``known``: [D] the first to be preferred to. Whatever the
    weight, the same draws are the same noise; weight 0 asks the preference nothing."""
    shape = (count, len(known))
    noised = torch.randn(shape, generator=draws, dtype=known.dtype)
    reference = known.expand(shape)
    for time in reversed(range(schedule.times)):
        times = torch.full((count,), time)
        moved = schedule.mean(noised, time, denoiser(noised, times))
        beta = schedule.beta[time].item()
        if weight:
            moved += weight * beta * gradient(score, noised, reference, times)
        if time:
            moved += math.sqrt(beta) * torch.randn(shape, generator=draws, dtype=known.dtype)
        noised, reference = moved, noised
        if time % clamp_every == 0:
            noised = noised.clamp(-1, 1)
        advance()
    return noised
