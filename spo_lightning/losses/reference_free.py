"""Losses of the policy alone; ``sft`` is the control that the others are held against."""

import torch
from torch import Tensor

from spo_lightning.losses.terms import _logistic
from spo_lightning.models.scorer import PairLogps


def sft(policy: PairLogps, *, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen answer, per token.

    ``beta`` does not enter the value: it is the scale of the rewards that runs report, so that an
    SFT run can be compared with the preference losses.
    """
    return -policy.mean_chosen


def simpo(policy: PairLogps, *, beta: float, gamma_beta_ratio: float) -> Tensor:
    """Logistic loss on the per-token gap, less a target margin. Meng et al. 2024 (2405.14734)."""
    return _logistic(beta * (policy.mean_gap - gamma_beta_ratio))


def cpo(policy: PairLogps, *, beta: float, alpha: float) -> Tensor:
    """Logistic loss on the summed gap plus SFT. Xu et al. 2024 (2401.08417).

    The SFT term is each pair's own token mean, so accumulation never changes it.
    """
    return _logistic(beta * policy.gap) - alpha * policy.mean_chosen


def _log_odds(mean_logp: Tensor) -> Tensor:
    # a certain answer (log-probability 0) would have infinite odds
    capped = mean_logp.clamp(max=-torch.finfo(mean_logp.dtype).eps)
    return capped - torch.log(-torch.expm1(capped))


def orpo(policy: PairLogps, *, beta: float) -> Tensor:
    """SFT plus beta times the log odds ratio loss. Hong et al. 2024 (2403.07691), eqs. 6 and 7."""
    odds = _log_odds(policy.mean_chosen) - _log_odds(policy.mean_rejected)
    return -policy.mean_chosen + beta * _logistic(odds)
