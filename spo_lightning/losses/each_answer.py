r"""Losses that hold each answer's own log-ratio against the reference to something.

What the margin alone leaves free, where the two answers go together, is fixed here.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.terms import _logistic, _ratios
from spo_lightning.models.scorer import PairLogps


def cal_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, coefficient: float) -> Tensor:
    r"""DPO at scale 1 with both log ratios regressed to +-1 / 2 beta. Xiao et al. 2024, Cal-DPO
    (2412.14516).

    $-\log\sigma(h) + c\,[(s_w - \frac{1}{2\beta})^2 + (s_l + \frac{1}{2\beta})^2]$
    """
    chosen, rejected = _ratios(policy, reference)
    target = 1 / (2 * beta)
    off_target = (chosen - target).square() + (rejected + target).square()
    return _logistic(chosen - rejected) + coefficient * off_target


def sppo_hard(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Both log-ratios regressed to +-1 / 2 beta. Wu et al. 2024 (2405.00675), with the labels as
    win probabilities.

    $(s_w - \frac{1}{2\beta})^2 + (s_l + \frac{1}{2\beta})^2$
    """
    chosen, rejected = _ratios(policy, reference)
    return (chosen - 1 / (2 * beta)).square() + (rejected + 1 / (2 * beta)).square()


def nca_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Noise contrast of both answers with the reference. Chen et al. 2024 (2402.05369).

    $-\log\sigma(\beta s_w) - \frac12\log\sigma(-\beta s_w) - \frac12\log\sigma(-\beta s_l)$
    """
    chosen, rejected = _ratios(policy, reference)
    noise = _logistic(-beta * chosen) + _logistic(-beta * rejected)
    return _logistic(beta * chosen) + 0.5 * noise


def bco_pair(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""A classifier of good and bad answers, on pairs. Jung et al. 2024 (2404.04656), as TRL has
    it: without the running mean of the rewards.

    $-\log\sigma(\beta s_w) - \log\sigma(-\beta s_l)$
    """
    chosen, rejected = _ratios(policy, reference)
    return _logistic(beta * chosen) + _logistic(-beta * rejected)


def apo_zero(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Chosen up, rejected down: for answers better than the model's own. D'Oosterlinck et al.
    2024 (2408.06266), eq. 7.

    $1 - \sigma(\beta s_w) + \sigma(\beta s_l)$
    """
    chosen, rejected = _ratios(policy, reference)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Both down, rejected further: for answers worse than the model's own. D'Oosterlinck et al.
    2024 (2408.06266), eq. 8.

    $\sigma(\beta s_w) + 1 - \sigma(\beta h)$
    """
    chosen, rejected = _ratios(policy, reference)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def smooth_hinge(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Hinge on the per-token gap, and a smooth anchor that keeps the chosen answer above the
    reference. Shi et al. 2024 (2410.11677).

    $\max(0, 1 - \beta\bar z) - \alpha\log\sigma(\bar s_w - 1)$
    """
    anchor = _logistic(policy.mean_chosen - reference.mean_chosen - 1)
    return F.relu(1 - beta * policy.mean_gap) + alpha * anchor
