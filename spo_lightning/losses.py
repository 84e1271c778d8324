"""Log-probabilities of pairs in, one loss per pair [B] out. Add one: a function here, its yaml.

Pure functions; means over pairs are taken elsewhere. Lengths are completion tokens. A loss that
needs no reference does not take one. Every loss calls its strength ``beta``; ``beta`` times the
policy's change against the reference is the reward that runs report.
"""

import inspect
import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.models import PairLogps

Loss = Callable[..., Tensor]

DECAY = 0.9  # of alpha_dpo's moving moments, as in its official code
FLOOR = 0.01  # nats per token: at policy = reference every margin is 0, and so is their spread


class Moments(NamedTuple):
    """Mean and spread of the per-token margin against the reference over earlier batches."""

    mean: float
    spread: float


def _logistic(margin: Tensor) -> Tensor:
    # F.softplus is linear beyond 20, which float64 can tell; log-sigmoid is exact
    return -F.logsigmoid(margin)


def _margin(policy: PairLogps, reference: PairLogps) -> Tensor:
    return policy.gap - reference.gap


def sft(policy: PairLogps, *, beta: float) -> Tensor:
    """Negative log-likelihood of the chosen answer, per token.

    ``beta`` does not enter the value: it is the scale of the rewards that runs report, so that an
    SFT run can be compared with the preference losses.
    """
    return -policy.mean_chosen


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


def alpha_dpo(
    policy: PairLogps,
    reference: PairLogps,
    moments: Moments,
    *,
    beta: float,
    gamma_beta_ratio: float,
    alpha: float,
) -> Tensor:
    """SimPO whose target margin follows the pair's standardised margin. Wu et al. 2024
    (2410.10148), in the official code's scale: alpha is alpha / beta of the paper."""
    margin = (policy.mean_gap - reference.mean_gap).detach()
    standardised = (margin - moments.mean) / max(moments.spread, FLOOR)
    return _logistic(beta * (policy.mean_gap - gamma_beta_ratio - alpha * standardised))


def evaluate(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, moments: Moments | None
) -> Tensor:
    """[B] the loss, given only what its signature asks for."""
    offered = {"reference": reference, "moments": moments}
    asked = inspect.signature(loss).parameters
    return partial(loss, **{name: it for name, it in offered.items() if name in asked})(policy)


def needs_moments(loss: Loss) -> bool:
    """Whether somebody has to keep the moments of earlier batches for this loss."""
    return "moments" in inspect.signature(loss).parameters


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
