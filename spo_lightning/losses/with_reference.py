r"""Losses of the margin: how much more the policy has moved to the chosen answer than a reference.

Between dollar signs stands what a docstring says in words: $s_w$, $s_l$ are the log-ratios of the
two answers against the reference, $h = s_w - s_l$ the margin, a bar is a mean per token.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.terms import _logistic, _margin, _mean_margin, _smoothed
from spo_lightning.models.scorer import PairLogps


def dpo(policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float) -> Tensor:
    r"""Logistic loss on the summed margin. Rafailov et al. 2023 (2305.18290), eq. 7.

    ``label_smoothing`` is the share of flipped labels assumed (conservative DPO).

    $-(1-\epsilon)\log\sigma(\beta h) - \epsilon\log\sigma(-\beta h)$
    """
    return _smoothed(beta * _margin(policy, reference), label_smoothing)


def robust(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> Tensor:
    r"""DPO's loss as it would be without the flipped labels. Chowdhury et al. 2024 (2403.00409).

    $\frac{-(1-\epsilon)\log\sigma(\beta h) + \epsilon\log\sigma(-\beta h)}{1-2\epsilon}$
    """
    margin = beta * _margin(policy, reference)
    clean, flipped = _logistic(margin), _logistic(-margin)
    return ((1 - label_smoothing) * clean - label_smoothing * flipped) / (1 - 2 * label_smoothing)


def sigmoid_norm(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""DPO on the per-token margin, as TRL has it; RSO's sigmoid-norm is another.

    $-\log\sigma(\beta \bar h)$
    """
    return _logistic(beta * _mean_margin(policy, reference))


def ipo(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Regress the summed margin onto 1 / 2 beta. Azar et al. 2023 (2310.12036), eq. 17.

    $(h - \frac{1}{2\beta})^2$
    """
    return (_margin(policy, reference) - 1 / (2 * beta)).square()


def ipo_norm(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""IPO on the per-token margin, TRL's reading of the same equation.

    $(\bar h - \frac{1}{2\beta})^2$
    """
    return (_mean_margin(policy, reference) - 1 / (2 * beta)).square()


def hinge(policy: PairLogps, reference: PairLogps, *, beta: float) -> Tensor:
    r"""Hinge on the summed margin. Liu et al. 2023, RSO (2309.06657), hinge-norm.

    $\max(0, 1 - \beta h)$
    """
    return F.relu(1 - beta * _margin(policy, reference))


def dpop(policy: PairLogps, reference: PairLogps, *, beta: float, dpop_lambda: float) -> Tensor:
    r"""DPO whose margin pays for a fallen chosen answer. Pal et al. 2024 (2402.13228), Smaug.

    $-\log\sigma(\beta (h - \lambda \max(0, -s_w)))$
    """
    fallen = F.relu(reference.chosen - policy.chosen)
    return _logistic(beta * (_margin(policy, reference) - dpop_lambda * fallen))


def rdpo(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""DPO with a price on length. Park et al. 2024 (2403.19159).

    alpha > 0 asks less of a long chosen answer, so length earns nothing. It stands outside beta.

    $-\log\sigma(\beta h + \alpha (n_w - n_l))$
    """
    longer = policy.chosen_length - policy.rejected_length
    return _logistic(beta * _margin(policy, reference) + alpha * longer)


def rpo(policy: PairLogps, reference: PairLogps, *, beta: float, eta: float) -> Tensor:
    r"""DPO plus eta * beta times the summed NLL. Liu et al. 2024 (2405.16436), sum form.

    $-\log\sigma(\beta h) - \eta\beta \ell_w$
    """
    return _logistic(beta * _margin(policy, reference)) - eta * beta * policy.chosen


def odpo(
    policy: PairLogps, reference: PairLogps, margins: Tensor, *, beta: float, alpha: float
) -> Tensor:
    r"""DPO that asks more where the scores lie further apart. Amini et al. 2024 (2402.10571).

    ``margins`` are the data's: the chosen answer's score less the rejected one's, above 0.

    $-\log\sigma(\beta h - \alpha\log(\mathrm{score}_w - \mathrm{score}_l))$
    """
    return _logistic(beta * _margin(policy, reference) - alpha * margins.log())


def xpo(
    policy: PairLogps,
    reference: PairLogps,
    reference_sides: Tensor | None,
    *,
    beta: float,
    label_smoothing: float,
    alpha: float,
) -> Tensor:
    r"""DPO that turns away from the reference's own answer. Xie et al. 2024 (2405.21046), XPO.

    ``reference_sides``: which of the two that one is, 0 chosen, 1 rejected; where it is neither
    (nan, or None for all) there is no such term.

    $-(1-\epsilon)\log\sigma(\beta h) - \epsilon\log\sigma(-\beta h) + \alpha \ell_{ref}$ with
    $\ell_{ref}$ the log-probability of the reference's own answer
    """
    found = _smoothed(beta * _margin(policy, reference), label_smoothing)
    if reference_sides is None:
        return found
    own = torch.where(reference_sides > 0, policy.rejected, policy.chosen)
    return found + alpha * torch.where(reference_sides.isnan(), 0.0, own)


def exo_pair(
    policy: PairLogps, reference: PairLogps, *, beta: float, label_smoothing: float
) -> Tensor:
    r"""KL of the policy's odds of the pair from smoothed labels. Ji et al. 2024 (2402.00856).

    $p\log\frac{p}{1-\epsilon} + (1-p)\log\frac{1-p}{\epsilon}$ with $p = \sigma(\beta h)$
    """
    margin = beta * _margin(policy, reference)
    smooth = torch.tensor(label_smoothing, dtype=margin.dtype, device=margin.device)
    chosen = margin.sigmoid() * (-_logistic(margin) - torch.log1p(-smooth))
    return chosen + (-margin).sigmoid() * (-_logistic(-margin) - smooth.log())


def dmpo(policy: PairLogps, reference: PairLogps, *, beta: float, alpha: float) -> Tensor:
    r"""Reverse KL of the odds of two images. Our reconstruction of DMPO (2507.07510), whose own
    equation is not public to us: ``exo_pair`` on the denoising errors, ``alpha`` its smoothing.

    $p\log\frac{p}{1-\alpha} + (1-p)\log\frac{1-p}{\alpha}$ with $p = \sigma(\beta h)$
    """
    return exo_pair(policy, reference, beta=beta, label_smoothing=alpha)


def discopop(policy: PairLogps, reference: PairLogps, *, beta: float, tau: float) -> Tensor:
    r"""Logistic loss below the margin 0, exponential above. Lu et al. 2024 (2406.08414), eq. 5.

    $-(1-m)\log\sigma(\beta h) + m e^{-\beta h}$ with $m = \sigma(\beta h / \tau)$
    """
    margin = beta * _margin(policy, reference)
    share = torch.sigmoid(margin / tau)
    # share * e^-margin in one exponent, which neither end can overflow
    return _logistic(margin) * (1 - share) + torch.exp(-_logistic(margin / tau) - margin)


def two_sided(
    policy: PairLogps, reference: PairLogps, *, beta: float, lower: float, upper: float
) -> Tensor:
    r"""DPO that also pushes a margin back that has gone too far: two-sided contrastive learning.

    $-\log\sigma(\beta (h - m_l)) - \log\sigma(\beta (m_u - h))$
    """
    margin = _margin(policy, reference)
    return _logistic(beta * (margin - lower)) + _logistic(beta * (upper - margin))
