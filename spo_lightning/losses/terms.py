"""What several losses are made of."""

from torch import Tensor
from torch.nn import functional as F

from spo_lightning.models.scorer import PairLogps


def _logistic(margin: Tensor) -> Tensor:
    # F.softplus is linear beyond 20, which float64 can tell; log-sigmoid is exact
    return -F.logsigmoid(margin)


def _smoothed(margin: Tensor, flipped: float) -> Tensor:
    """The logistic loss where this share of the labels is assumed to be flipped."""
    return (1 - flipped) * _logistic(margin) + flipped * _logistic(-margin)


def _margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    return policy.gap - reference.gap


def _mean_margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    return policy.mean_gap - reference.mean_gap


def _ratios(policy: PairLogps, reference: PairLogps) -> tuple[Tensor, Tensor]:
    """Of the chosen answers and of the rejected ones."""
    return policy.chosen - reference.chosen, policy.rejected - reference.rejected
