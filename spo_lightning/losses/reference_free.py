r"""Losses of the policy alone; ``sft`` is the control that the others are held against.

In formulas $\ell_w$, $\ell_l$ are the answers' log-probabilities, $z = \ell_w - \ell_l$ the gap, a
bar is a mean per token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.terms import _logistic
from spo_lightning.models.scorer import PairLogps


def sft(policy: PairLogps, *, beta: float) -> Tensor:
    r"""Negative log-likelihood of the chosen answer, per token.

    ``beta`` does not enter the value: it is the scale of the rewards that runs report, so that an
    SFT run can be compared with the preference losses.

    $-\bar\ell_w$
    """
    return -policy.mean_chosen


def simpo(policy: PairLogps, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    r"""Logistic loss on the per-token gap, less a target margin. Meng et al. 2024 (2405.14734).

    $-\log\sigma(\beta (\bar z - \gamma / \beta))$
    """
    return _logistic(beta * (policy.mean_gap - gamma_beta_ratio))


def cpo(policy: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Logistic loss on the summed gap plus SFT. Xu et al. 2024 (2401.08417).

    The SFT term is each pair's own token mean, so accumulation never changes it.

    $-\log\sigma(\beta z) - \alpha\bar\ell_w$
    """
    return _logistic(beta * policy.gap) - alpha * policy.mean_chosen


def slic(policy: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Hinge on the summed gap, without a reference, plus SFT. Zhao et al. 2023 (2305.10425), at
    the scale of RSO (2309.06657): the gap asked for is 1 / beta.

    $\max(0, 1 - \beta z) - \alpha\beta \ell_w$
    """
    return F.relu(1 - beta * policy.gap) - alpha * beta * policy.chosen


def _log_odds(mean_logp: Tensor) -> Tensor:
    # a certain answer (log-probability 0) would have infinite odds
    capped = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return capped - torch.log(-torch.expm1(capped))


def orpo(policy: PairLogps, *, beta: float) -> Tensor:
    r"""SFT plus beta times the log odds ratio loss. Hong et al. 2024 (2403.07691), eqs. 6 and 7.

    $-\bar\ell_w - \beta\log\sigma(o_w - o_l)$ with $o = \log\frac{p}{1-p}$, $\log p = \bar\ell$
    """
    odds = _log_odds(policy.mean_chosen) - _log_odds(policy.mean_rejected)
    return -policy.mean_chosen + beta * _logistic(odds)
