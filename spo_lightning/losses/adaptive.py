"""Losses that follow earlier batches, and the state they are given: the module keeps it."""

import math
from typing import NamedTuple

from torch import Tensor

from spo_lightning.losses.terms import _logistic
from spo_lightning.models.scorer import PairLogps

DECAY = 0.9  # of alpha_dpo's moving moments, as in its official code
FLOOR = 0.01  # nats per token: at policy = reference every margin is 0, and so is their spread


class Moments(NamedTuple):
    """Mean and spread of the per-token margin against the reference over earlier batches."""

    mean: float
    spread: float


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


def update(state: dict[str, float], mean: float, spread: float) -> dict[str, float]:
    """Fold one global batch's mean and standard deviation into the moving moments.

    ``state`` is {} at the start. One pair has no standard deviation: the state stays as it is.
    """
    if not (math.isfinite(mean) and math.isfinite(spread)):
        return state
    seen = {"mean": mean, "spread": spread, "weight": 1.0}
    return {name: DECAY * state.get(name, 0.0) + (1 - DECAY) * it for name, it in seen.items()}


def moments_of(state: dict[str, float]) -> Moments:
    """The bias-corrected moments; mean 0 and spread 1 before the first update."""
    if not state:
        return Moments(0.0, 1.0)
    return Moments(state["mean"] / state["weight"], state["spread"] / state["weight"])
