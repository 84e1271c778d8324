"""What several losses are made of."""

from torch import Tensor
from torch.nn import functional as F

from spo_lightning.models.scorer import PairLogps


def _logistic(margin: Tensor) -> Tensor:
    # F.softplus is linear beyond 20, which float64 can tell; log-sigmoid is exact
    return -F.logsigmoid(margin)


def _margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    return policy.gap - reference.gap
