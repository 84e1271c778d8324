"""Losses of the policy's change against a reference, most of them of the summed margin."""

from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.terms import _logistic, _margin
from spo_lightning.models.scorer import PairLogps


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    """Logistic loss on the summed margin. Rafailov et al. 2023 (2305.18290), eq. 7.

    ``label_smoothing`` is the share of flipped labels assumed (conservative DPO).
    """
    margin = beta * _margin(policy, reference)
    return (1 - label_smoothing) * _logistic(margin) + label_smoothing * _logistic(-margin)


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Regress the summed margin onto 1 / 2 beta. Azar et al. 2023 (2310.12036), eq. 17."""
    return (_margin(policy, reference) - 1 / (2 * beta)).square()


def ipo_norm(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """IPO on the per-token margin, TRL's reading of the same equation."""
    return (policy.mean_gap - reference.mean_gap - 1 / (2 * beta)).square()


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    """Hinge on the summed margin. Liu et al. 2023, RSO (2309.06657), hinge-norm."""
    return F.relu(1 - beta * _margin(policy, reference))


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, dpop_lambda: float) -> Tensor:
    """DPO whose margin pays for a fallen chosen answer. Pal et al. 2024 (2402.13228), Smaug."""
    fallen = F.relu(reference.chosen - policy.chosen)
    return _logistic(beta * (_margin(policy, reference) - dpop_lambda * fallen))


def rdpo(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Tensor:
    """DPO with a price on length. Park et al. 2024 (2403.19159).

    alpha > 0 asks less of a long chosen answer, so length earns nothing. It stands outside beta.
    """
    longer = policy.chosen_length - policy.rejected_length
    return _logistic(beta * _margin(policy, reference) + alpha * longer)


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float, eta: float) -> Tensor:
    """DPO plus eta * beta times the summed NLL. Liu et al. 2024 (2405.16436), sum form."""
    return _logistic(beta * _margin(policy, reference)) - eta * beta * policy.chosen


def cal_dpo(policy: PairLogps, reference: PairLogps, *, beta: float, coefficient: float) -> Tensor:
    """DPO at scale 1 with both log ratios regressed to +-1 / 2 beta. Xiao et al. 2024, Cal-DPO
    (2412.14516)."""
    chosen, rejected = policy.chosen - reference.chosen, policy.rejected - reference.rejected
    target = 1 / (2 * beta)
    off_target = (chosen - target).square() + (rejected + target).square()
    return _logistic(chosen - rejected) + coefficient * off_target
