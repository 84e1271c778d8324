r"""Two noised designs and their time in, how surely the first is preferred out.

A net scores each design by itself, and the softmax of two scores says which is preferred:
$p_\phi(x \succ x' \mid t) = \sigma(s(x_t, t) - s(x'_t, t))$, so that the two answers about a pair
always add to one.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.design.order import Order
from spo_lightning.studies.denoiser import Schedule

Score = Callable[[Tensor, Tensor], Tensor]  # [N, D] and [N] to [N, 1]


def log_preferred(score: Score, noised: Tensor, other: Tensor, times: Tensor) -> Tensor:
    """[N] log p(noised preferred to other | t)."""
    return F.logsigmoid(score(noised, times) - score(other, times)).squeeze(1)


def gradient(score: Score, noised: Tensor, other: Tensor, times: Tensor) -> Tensor:
    """[N, D] how the first of each pair is moved to be preferred more surely."""
    with torch.enable_grad():
        noised = noised.detach().requires_grad_(True)
        (slope,) = torch.autograd.grad(log_preferred(score, noised, other, times).sum(), noised)
    return slope


def pairs(
    order: Order, count: int, threshold: float, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Places of at most ``count`` pairs, the preferred one first; those of which neither is
    preferred are left out."""
    first, second = torch.randint(len(order.rank), (2, count), generator=draws).numpy()
    sign = order.prefers(first, second, threshold)
    first, second = first[sign != 0], second[sign != 0]
    turned = sign[sign != 0] < 0
    better, worse = np.where(turned, second, first), np.where(turned, first, second)
    return torch.from_numpy(better), torch.from_numpy(worse)


def loss(
    score: Score, schedule: Schedule, better: Tensor, worse: Tensor, draws: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The cross-entropy, and the share of pairs told right; both of a pair are noised to the same
    time, each with its own noise."""
    times, noise = schedule.drawn(better, draws)
    other = torch.randn(worse.shape, generator=draws, dtype=worse.dtype)
    first, second = (schedule.noised(x, times, z) for x, z in ((better, noise), (worse, other)))
    told = log_preferred(score, first, second, times)
    return -told.mean(), (told > np.log(0.5)).double().mean()
