r"""Losses of what ranks answers and writes none.

Of a reward model a reward stands where other losses have an answer's log-probability: in formulas
$r_w$, $r_l$ of the chosen and of the rejected answer. A ranker reads both answers in one prompt,
and the log-probabilities $\ell_w$, $\ell_l$ are those of their names.
"""

from torch import Tensor

from spo_lightning.losses.terms import _logistic, _smoothed
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


def ranker(policy: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Bradley-Terry on the log-odds of the two names, one of which the model gives to the better
    answer: the pairwise ranker of RSO (Liu et al. 2023, 2309.06657) and SLiC.

    ``label_smoothing`` is the share of flipped labels assumed.

    $-(1-\epsilon)\log\sigma(\beta z) - \epsilon\log\sigma(-\beta z)$
    """
    return _smoothed(beta * policy.gap, label_smoothing)
