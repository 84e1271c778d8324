"""Losses that follow earlier batches, and the state they are given: the module keeps it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from spo_lightning.losses.terms import _logistic, _margin
from spo_lightning.models.scorer import PairLogps

DECAY = 0.9  # of the moving moments, as in the official code of both losses
FLOOR = 0.01  # nats per token: at policy = reference every margin is 0, and so is their spread


SMALLEST = 1e-3  # of beta_dpo's strength, as in its official code
APART = 1_000_003  # between the seeds of two outer steps' draws


class Moments(NamedTuple):
    """Mean and spread over earlier batches of the margins against the reference."""

    mean: float  # of the per-token margin
    spread: float
    summed_mean: float = 0.0  # of the summed margin
    summed_spread: float = 1.0
    weight: float = 0.0  # what earlier batches count, below 1
    steps: int = 0  # how many there were
    ratio: float = 0.0  # mean log-ratio of all their answers, the old ones as much as the new

    def with_batch(self, margin: Tensor) -> tuple[float, float]:
        """Mean and spread of the summed margin with one more batch."""
        mean, spread = float(margin.mean()), self.summed_spread
        if len(margin) > 1:
            spread = float(margin.std())
        now = self.weight * DECAY + 1 - DECAY
        kept = (1 - (1 - DECAY) / now) * self.summed_mean, (1 - DECAY) / now
        return kept[0] + kept[1] * mean, (1 - kept[1]) * self.summed_spread + kept[1] * spread


def alpha_dpo(
    policy: PairLogps,
    reference: PairLogps,
    moments: Moments,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
) -> Tensor:
    r"""SimPO whose target margin follows the pair's standardised margin. Wu et al. 2024
    (2410.10148), in the official code's scale: alpha is alpha / beta of the paper.

    $-\log\sigma(\beta (\bar z - \gamma/\beta - \alpha\frac{\bar h - \mu}{sd}))$, $\bar h$ detached
    """
    margin = (policy.mean_gap - reference.mean_gap).detach()
    standardised = (margin - moments.mean) / max(moments.spread, FLOOR)
    return _logistic(beta * (policy.mean_gap - gamma_beta_ratio - alpha * standardised))


def beta_dpo(
    policy: PairLogps,
    reference: PairLogps,
    moments: Moments,
    *,
    beta: float,
    alpha: float,
    filtered: float,
    seed: int,
) -> Tensor:
    r"""DPO whose strength follows the batch's margin, on the pairs nearest to the usual one. Wu et
    al. 2024 (2407.08639), with the bias of the moving moments corrected.

    A share of the pairs is left out by a draw without replacement, which the outer step decides.

    $-\log\sigma(\beta' h)$ with $\beta' = \beta (1 + \alpha (\mathrm{mean}\, h - M))$
    """
    margin = _margin(policy, reference)
    held = margin.detach().double()
    mean, spread = moments.with_batch(held)
    seeded = torch.Generator().manual_seed(seed * APART + moments.steps)
    noise = torch.rand(len(held), generator=seeded, dtype=torch.float64).clamp(min=1e-300)
    likely = -0.5 * ((held - mean) / max(spread, FLOOR)).square()
    # the largest of log weight + Gumbel noise are a draw without replacement by these weights
    count = max(1, int(len(held) * (1 - filtered)))
    kept = (likely - torch.log(-torch.log(noise)).to(held.device)).topk(count).indices
    strength = max(SMALLEST, beta * (1 + alpha * (float(held[kept].mean()) - mean)))
    counts = torch.zeros_like(margin).index_fill(0, kept, len(held) / count)
    return counts * _logistic(strength * margin)


def update(state: dict[str, float], **seen: float) -> dict[str, float]:
    """Fold one global batch's means and standard deviations into the moving moments.

    ``state`` is {} at the start. One pair has no standard deviation: the state stays as it is.
    """
    if not all(map(math.isfinite, seen.values())):
        return state
    steps = state.get("steps", 0) + 1
    folded = {**seen, "weight": 1.0}.items()
    return {
        **{name: DECAY * state.get(name, 0.0) + (1 - DECAY) * it for name, it in folded},
        "steps": steps,
    }


def moments_of(state: dict[str, float]) -> Moments:
    """The bias-corrected moments; mean 0 and spread 1 before the first update."""
    if not state:
        return Moments(0.0, 1.0)
    weight = state["weight"]
    whole = {name: it / weight for name, it in state.items() if name not in ("weight", "steps")}
    return Moments(**whole, weight=weight, steps=int(state.get("steps", 0)))
