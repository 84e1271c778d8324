r"""Losses of a reward model: a reward stands where other losses have an answer's log-probability.

In formulas $r_w$, $r_l$ are the rewards of the chosen and of the rejected answer.
"""

from torch import Tensor

from spo_lightning.losses.terms import _logistic
from spo_lightning.models.scorer import PairLogps


def reward(
    policy: PairLogps,
    margins: Tensor,
    *,
    beta: float,
    label_smoothing: float,
    margin: bool,
    center_rewards_coefficient: float,
) -> Tensor:
    r"""Bradley-Terry on the difference of two rewards, less the data's ``margins`` if ``margin``
    says so (Touvron et al. 2023, 2307.09288, eq. 2).

    ``label_smoothing`` is the share of flipped labels assumed, and a flipped pair has its margin
    the other way round. The last term holds rewards around 0 (Eisenstein et al. 2023, 2312.09244).

    $-(1-\epsilon)\log\sigma(\beta (r_w - r_l) - m) - \epsilon\log\sigma(-\beta (r_w - r_l) - m) +
    c\,(r_w + r_l)^2$
    """
    apart, asked = beta * policy.gap, margins if margin else 0.0
    right, flipped = _logistic(apart - asked), _logistic(-apart - asked)
    centred = (policy.chosen + policy.rejected).square()
    return (
        (1 - label_smoothing) * right
        + label_smoothing * flipped
        + center_rewards_coefficient * centred
    )
