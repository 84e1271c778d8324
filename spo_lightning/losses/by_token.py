r"""Losses that see more of an answer than its sum: its tokens' distributions, or some of them.

In formulas $D_w$, $D_l$ are the sums over an answer's tokens of the KL divergence of the policy
from the reference, over the whole vocabulary; $P_w$, $P_l$ the log-ratios of some of its tokens;
$s_i$ those of the chosen answer's $K$ sentences.
"""

import torch
from torch import Tensor

from spo_lightning.losses.terms import _logistic, _margin, _ratios
from spo_lightning.models.scorer import PairLogps

ALIKE = 1e-4  # of perplexities, as shares of the largest, and of similarities: that is rounding
LEAST = 0.01  # nats of a weighed reward, below which its ratio is none


def tdpo1(policy: PairLogps, reference: PairLogps, divergences: Tensor, *, beta: float) -> Tensor:
    r"""DPO less what the rejected answer's tokens have diverged more. Zeng et al. 2024
    (2404.11999), eq. 15.

    $-\log\sigma(\beta (h + D_w - D_l))$
    """
    chosen, rejected = divergences.unbind(1)
    return _logistic(beta * (_margin(policy, reference) + chosen - rejected))


def tdpo2(
    policy: PairLogps, reference: PairLogps, divergences: Tensor, *, beta: float, alpha: float
) -> Tensor:
    r"""TDPO that pulls the rejected answer's tokens back alone. Zeng et al. 2024 (2404.11999),
    eq. 17.

    $-\log\sigma(\beta (h + \alpha (D_w - D_l)))$, $D_w$ detached
    """
    chosen, rejected = divergences.unbind(1)
    return _logistic(beta * (_margin(policy, reference) + alpha * (chosen.detach() - rejected)))


def sgdpo(
    policy: PairLogps,
    reference: PairLogps,
    step: int,
    *,
    beta: float,
    r1: float,
    r2: float,
    seed: int,
) -> Tensor:
    r"""DPO of each answer against a part of the other, its pilot, which is not pushed. Zhu et al.
    2025 (2505.12435).

    A pilot's tokens are drawn without replacement, by the seed, the outer step and the row.

    $-\frac12\log\sigma(\beta (s_w - P_l)) - \frac12\log\sigma(\beta (P_w - s_l))$, $P_w$, $P_l$ detached
    """  # noqa: E501 (a formula)
    shorter = policy.lengths.min(1).values.double()
    counts = torch.stack([shorter * r1, shorter * r2], 1).floor().clamp(min=1)
    drawn = _ranks(policy, seed, step) < counts[policy.pair, policy.side.long()]
    moved = (policy.logps - reference.logps).detach()
    of_chosen, of_rejected = policy.summed(moved * drawn).unbind(1)
    chosen, rejected = _ratios(policy, reference)
    pushed = _logistic(beta * (chosen - of_rejected)) + _logistic(beta * (of_chosen - rejected))
    return 0.5 * pushed


def aspo(
    policy: PairLogps,
    reference: PairLogps,
    sentences: Tensor,
    *,
    beta: float,
    alpha: float,
    of_rewards: bool,
) -> Tensor:
    r"""DPO whose chosen answer is weighed sentence by sentence. Wang et al. 2025 (2505.19100), on
    texts: $w_i = \alpha S'_i + (1 - \alpha) P'_i$ with similarities $S$ to the prompt and the
    policy's perplexities $P$, detached, each from 0 (the furthest, the most surprising) to 1
    within the answer.

    The paper has a factor $R_c / R_c^*$ and no code. Two readings: the rewards of the answer
    without and with weights, detached, so that the value is DPO's and the slopes alone are weighed
    (``of_rewards``; 1 where the weighed one is below 0.01 nats, as it is at the start); or what
    the weights alone come to, which is ours. One sentence is DPO.

    $-\log\sigma(\beta (c \sum_i (1 + w_i) s_i - s_l))$ with $c = K / \sum_i (1 + w_i)$, or $c = s_w / \sum_i (1 + w_i) s_i$
    """  # noqa: E501 (a formula)
    slots = 2 * policy.pair + policy.side.long()
    new = (slots.diff() != 0) | (sentences.diff() != 0)
    which = torch.cat([torch.zeros_like(slots[:1]), new.cumsum(0)])  # of all sentences
    held = policy.logps.detach()
    sums, counts = (torch.zeros_like(held).index_add(0, which, x) for x in (held, held * 0 + 1))
    surprise = -sums[which] / counts[which]
    expected = -torch.exp(surprise - _extreme(surprise, slots, policy, "amax"))
    weights = (1 - alpha) * _within(expected, slots, policy)
    if alpha > 0:
        assert policy.similarities is not None
        weights = weights + alpha * _within(policy.similarities.to(held), slots, policy)
    share = 1 / counts[which]  # so that a sentence's tokens count as one
    kept, added = (policy.summed(x)[:, 0] for x in (share, share * weights))
    chosen = policy.chosen - reference.chosen
    weighed = chosen + policy.summed(weights * (policy.logps - reference.logps))[:, 0]
    factor = kept.clamp(min=1e-9) / (kept + added).clamp(min=1e-9)
    if of_rewards:
        factor = torch.where(weighed.abs() > LEAST, chosen / weighed, 1.0).detach()
    # what weighing changes, so that one sentence leaves every bit of DPO
    return _logistic(beta * (_margin(policy, reference) + (factor * weighed - chosen)))


def _within(values: Tensor, slots: Tensor, policy: PairLogps) -> Tensor:
    """[S] from 0 to 1 over an answer's tokens; 0 where they are alike."""
    low, high = (_extreme(values, slots, policy, which) for which in ("amin", "amax"))
    return torch.where(high - low > ALIKE, (values - low) / (high - low), 0.0)


def _extreme(values: Tensor, slots: Tensor, policy: PairLogps, which: str) -> Tensor:
    """[S] the least or the largest value of a token's answer."""
    found = values.new_zeros(2 * policy.pairs)
    return found.scatter_reduce(0, slots, values, which, include_self=False)[slots]


def _ranks(policy: PairLogps, seed: int, step: int) -> Tensor:
    """[S] where a token comes in a random order of its answer's.

    A hash of all that it follows from, and no generator: however pairs are dealt, it is the same.
    """
    assert policy.rows is not None
    keys = torch.zeros_like(policy.pair)
    for part in (seed, step, policy.rows[policy.pair], policy.side.long(), policy.places):
        keys = _mixed(keys + part)
    order = keys.argsort()
    slots = 2 * policy.pair + policy.side.long()
    order = order[slots[order].argsort(stable=True)]  # answer by answer, as the tokens stand
    return torch.empty_like(order).scatter(0, order, policy.places)


def _mixed(keys: Tensor) -> Tensor:
    """SplitMix64 (Steele et al. 2014) on integers whose sign is a bit like the others."""
    keys = keys - 0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        keys = (keys ^ ((keys >> shift) & (2 ** (64 - shift) - 1))) * factor
    return keys ^ ((keys >> 31) & (2**33 - 1))
