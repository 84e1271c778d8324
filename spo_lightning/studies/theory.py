"""The change of probabilities in one step, to first order in the step, beside the measured one.

For one pair, a step of length eta and pulls p_w, p_l on the two log-probabilities (DPO: c, -c),

    d log pi(y) = <g(y), d theta> = eta (p_w <g(y), g_w> + p_l <g(y), g_l>)
    d pi(y)     = pi(y) d log pi(y)
    d pi(O)     = -d pi(y_w) - d pi(y_l)

where g(y) is the gradient of log pi(y). So pi(y_w) falls under DPO if <g_w, g_l> > |g_w|^2.
"""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from spo_lightning.studies.descent import Method, Move, descend, pulls
from spo_lightning.studies.policies import LogLinear

QUANTITIES = ("chosen", "rejected", "others")  # d log pi(y_w), d log pi(y_l), d pi(O)


class Changes(NamedTuple):
    """Of one step or of several, in the order of ``QUANTITIES``."""

    measured: Tensor  # [..., N, 3]
    along: Tensor  # [..., N, 3] from the actual change of theta
    idealised: Tensor  # [..., N, 3] from the pulls and the inner products of gradients


def masses(logps: Tensor) -> Tensor:
    """[N, 3] pi(y_w), pi(y_l), pi(O) from [N, K]."""
    p = logps.exp()
    return torch.cat([p[:, :2], p[:, 2:].sum(1, keepdim=True)], dim=1)


def excess(scores: Tensor) -> Tensor:
    """[N] <g_w, g_l> - |g_w|^2 from [N, K, D]; above 0, DPO lowers pi(y_w)."""
    return (scores[:, 0] * (scores[:, 1] - scores[:, 0])).sum(-1)


def along(policy: LogLinear, move: Move) -> Tensor:
    """[N, 3] <g(y), theta after - theta before>."""
    moved = policy.scores(move.before) @ (move.after - move.before)[:, :, None]
    return _changes(policy, move, moved[:, :2, 0])


def idealised(policy: LogLinear, move: Move, pulled: Tensor, lr: float) -> Tensor:
    """[N, 3] lr (p_w <g(y), g_w> + p_l <g(y), g_l>)."""
    pair = policy.scores(move.before)[:, :2]
    gram = pair @ pair.transpose(1, 2)
    return _changes(policy, move, lr * (gram @ pulled[:, :, None]).squeeze(-1))


def _changes(policy: LogLinear, move: Move, moved: Tensor) -> Tensor:
    """[N, 3] from the changes [N, 2] of the two log-probabilities."""
    before = policy.logps(move.before)[:, :2].exp()
    return torch.cat([moved, -(before * moved).sum(1, keepdim=True)], dim=1)


def measured(policy: LogLinear, move: Move) -> Tensor:
    """[N, 3] the policy after the step less the policy before it."""
    before, after = policy.logps(move.before), policy.logps(move.after)
    others = (masses(after) - masses(before))[:, 2:]
    return torch.cat([(after - before)[:, :2], others], dim=1)


def changes(policy: LogLinear, method: Method, move: Move) -> Changes:
    """[N, 3] of one step of the method."""
    pulled = pulls(policy, method, move)
    return Changes(
        measured(policy, move), along(policy, move), idealised(policy, move, pulled, method.lr)
    )


def stacked(steps: Iterable[Changes]) -> Changes:
    """[T, N, 3] of several steps."""
    return Changes(*(torch.stack(column) for column in zip(*steps)))


def compare(policy: LogLinear, method: Method, *, lr: float, steps: int) -> Changes:
    """[T, N, 3] of the first ``steps`` steps, were they of length ``lr``."""
    method = replace(method, lr=lr)
    return stacked(changes(policy, method, move) for move in descend(policy, method, steps))


def agreement(predicted: Tensor, seen: Tensor) -> tuple[float, float]:
    """Correlation of the two, and the slope of the line that gives ``seen`` from ``predicted``."""
    x, y = (values.flatten() - values.mean() for values in (predicted, seen))
    covariance = (x * y).sum()
    spread = x.square().sum() * y.square().sum()
    return (covariance / spread.sqrt()).item(), (covariance / x.square().sum()).item()
