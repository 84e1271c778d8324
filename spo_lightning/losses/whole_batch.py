r"""Losses in which a pair's value depends on the other pairs of its outer step.

Their yaml says ``whole_batch: true``: they are given the outer step in one piece or refused.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.terms import _ratios, _smoothed
from spo_lightning.models.scorer import PairLogps


def aot(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""The policy's gaps lie above the reference's as distributions: both are sorted over the
    batch. Melnyk et al. 2024 (2406.05882).

    $-\log\sigma(\beta (z_{(i)} - z^{ref}_{(i)}))$, $z_{(i)}$ the i-th smallest of the batch
    """
    ordered = policy.gap.sort().values - reference.gap.sort().values
    return _smoothed(beta * ordered, label_smoothing)


def aot_unpaired(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> Tensor:
    r"""The same of the chosen answers' log-ratios and the rejected ones'. Melnyk et al. 2024
    (2406.05882).

    $-\log\sigma(\beta (s_{w(i)} - s_{l(i)}))$, $s_{(i)}$ the i-th smallest of the batch
    """
    chosen, rejected = _ratios(policy, reference)
    return _smoothed(beta * (chosen.sort().values - rejected.sort().values), label_smoothing)


def kto_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Each answer against what the batch's others of the other side have moved on average.
    Ethayarajh et al. 2024 (2402.01306), in the form for pairs.

    As in the code that it is from, gradients reach those averages.

    $1 - \frac12\sigma(\beta (s_w - K_l)) - \frac12\sigma(\beta (K_w - s_l))$ with $K = \max(0, \mathrm{mean}\, s)$
    """  # noqa: E501 (a formula)
    chosen, rejected = _ratios(policy, reference)
    of_chosen, of_rejected = F.relu(chosen.mean()), F.relu(rejected.mean())
    desirable = torch.sigmoid(-beta * (chosen - of_rejected))
    return 0.5 * (desirable + torch.sigmoid(-beta * (of_chosen - rejected)))
