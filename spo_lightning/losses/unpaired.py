r"""Losses of single answers, each with a label: a good one (desirable) or a bad one.

A row has one answer, on the chosen side where it is a good one and on the rejected side where it
is not; where a row has both, its value is their mean. Their yaml says ``unpaired: true``. In
formulas an answer's log-ratio is $s_w$ or $s_l$, by its label, and the first of two lines is of
the good ones.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from spo_lightning.losses.adaptive import Moments
from spo_lightning.losses.terms import _logistic, _ratios
from spo_lightning.models.logps import PairLogps

MOST = 4 / 3  # of all good answers' weight over all bad ones', which KTO keeps from 1 to this


def kto(
    policy: PairLogps,
    reference: PairLogps,
    kl: Tensor,
    *,
    beta: float,
    desirable_weight: float | None,
    undesirable_weight: float | None,
) -> Tensor:
    r"""Each answer against how far the policy has moved from the reference at all. Ethayarajh et
    al. 2024 (2402.01306), eq. 7.

    ``kl`` is the mean log-ratio, at least 0, of the outer step's prompts with one another's
    answers; no gradient reaches it. A weight of None counts 1.

    $\lambda_D\,\sigma(\beta (K - s_w))$, $\lambda_U\,\sigma(\beta (s_l - K))$
    """
    desirable, undesirable = _ratios(policy, reference)
    return _of_answers(
        policy,
        _weight(desirable_weight) * torch.sigmoid(beta * (kl - desirable)),
        _weight(undesirable_weight) * torch.sigmoid(beta * (undesirable - kl)),
    )


def bco(
    policy: PairLogps,
    reference: PairLogps,
    moments: Moments,
    *,
    beta: float,
) -> Tensor:
    r"""A classifier of good and bad answers by their reward, against the mean of all rewards. Jung
    et al. 2024 (2404.04656), without its density ratio of the prompts: that weighs bad answers by
    a classifier on embeddings of their prompts, so it needs a second model.

    The mean is over all answers of earlier outer steps, 0 in the first. It lags where all rewards
    move one way, and the loss of one kind of answer then grows: a smaller rate ends that.

    $-\log\sigma(\beta (s_w - \mu))$, $-\log\sigma(\beta (\mu - s_l))$
    """
    desirable, undesirable = _ratios(policy, reference)
    return _of_answers(
        policy,
        _logistic(beta * (desirable - moments.ratio)),
        _logistic(beta * (moments.ratio - undesirable)),
    )


def apo_zero_unpaired(
    policy: PairLogps,
    reference: PairLogps,
    *,
    beta: float,
    desirable_weight: float | None,
    undesirable_weight: float | None,
) -> Tensor:
    r"""Good answers up, bad ones down: for good ones better than the model's own. D'Oosterlinck et
    al. 2024 (2408.06266), eq. 7, an answer at a time.

    $\sigma(-\beta s_w)$, $\sigma(\beta s_l)$
    """
    desirable, undesirable = _ratios(policy, reference)
    return _of_answers(
        policy,
        _weight(desirable_weight) * torch.sigmoid(-beta * desirable),
        _weight(undesirable_weight) * torch.sigmoid(beta * undesirable),
    )


def _of_answers(policy: PairLogps, desirable: Tensor, undesirable: Tensor) -> Tensor:
    """[B] the mean over the answers that a row has."""
    there = policy.counts > 0
    values = torch.stack([desirable, undesirable], 1) * there
    return values.sum(1) / there.sum(1).clamp(min=1)


def _weight(given: float | None) -> float:
    return 1.0 if given is None else given


def balanced(loss: partial, labels: Sequence[bool]) -> tuple[partial, str]:
    """The loss with the weights that are not given, and what is to be said of them.

    All good answers together weigh 1 to ``MOST`` times as much as all bad ones: a weight that is
    not given moves to the nearer end, the rarer label's where neither is. Not every loss weighs.
    """
    names = ("desirable_weight", "undesirable_weight")
    good, bad = sum(labels), len(labels) - sum(labels)
    told = f"{good} desirable rows and {bad} undesirable ones"
    if names[0] not in loss.keywords:
        return loss, told
    given = [loss.keywords[name] for name in names]
    weights = [_weight(one) for one in given]
    if good and bad:
        share = weights[0] * good / (weights[1] * bad)
        off = share / min(max(share, 1.0), MOST)
        if given[0] is None and (off < 1 or given[1] is not None):
            weights[0] /= off
        elif given[1] is None:
            weights[1] *= off
        share = weights[0] * good / (weights[1] * bad)
        told += f", which weigh {weights[0]:.4g} and {weights[1]:.4g} each and so {share:.3g} to 1"
        told += "" if 0.999 < share < MOST + 0.001 else " (1 to 1.33 is usual)"
    return partial(loss.func, **loss.keywords | dict(zip(names, weights))), told
