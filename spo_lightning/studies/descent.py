"""A policy, a loss and a solver in, the steps of plain gradient descent out.

The losses and solvers are the package's own: an answer is one token of a ``PairLogps``, and a
start is one row of a ``Problem``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning import losses
from spo_lightning.models.scorer import PairLogps
from spo_lightning.solvers import Problem, Slope, Solver, Tensors, Terms
from spo_lightning.studies.policies import LogLinear


@dataclass(frozen=True)
class Method:
    """A preference loss, the solver that adds the lower level, and the length of a step."""

    loss: losses.Loss
    solver: Solver
    lr: float

    def __post_init__(self):
        if not self.lr > 0:
            raise ValueError(f"lr must be above 0, not {self.lr}")


class Move(NamedTuple):
    """One step of all starts."""

    before: Tensor  # [N, D] theta
    after: Tensor
    state: Any  # the solver's, before the step


def pairs(logps: Tensor) -> PairLogps:
    """y_w and y_l, the first two of [N, K], as answers of one token."""
    token = torch.arange(2 * len(logps))
    return PairLogps(logps[:, :2].flatten(), token // 2, token % 2 == 1, len(logps))


def of_rows(
    levels: Callable[[Tensor], tuple[Tensor, Tensor]], theta: Tensor, value: Tensor, size: Tensor
) -> Problem:
    """The problem of theta -> F and G, [N] each.

    No row sees another: each is an outer step of its own, so its averages are its values.
    """

    def gradient(closure: Callable[[Problem], Terms], at: Tensors) -> Slope:
        leaf = at[0].detach().requires_grad_()
        terms = closure(replace(whole, theta=(leaf,)))
        summed = torch.stack([term.sum() for term in terms.minimise]).sum()
        return Slope(torch.autograd.grad(summed, (leaf,)), terms.watch)

    whole = Problem(
        theta=(theta,),
        upper=lambda at: levels(at[0])[0],
        lower=lambda at: levels(at[0])[1],
        both=lambda at: levels(at[0]),
        value=value,
        size=size,
        gradient=gradient,
        twice=gradient,
    )
    return whole


def problem(
    loss: losses.Loss, logps: Callable[[Tensor], Tensor], theta: Tensor, reference: PairLogps
) -> Problem:
    """F and G of N starts at once. ``logps``: theta [N, D] to [N, K]."""

    def levels(at: Tensor) -> tuple[Tensor, Tensor]:
        policy = pairs(logps(at))
        return losses.evaluate(loss, policy, reference, None), -policy.mean_chosen

    return of_rows(levels, theta, -reference.mean_chosen, reference.chosen_length)


def descend(policy: LogLinear, method: Method, steps: int) -> Iterator[Move]:
    """Gradient descent from the policy's start, which is also the reference."""
    theta, state = policy.start, method.solver.init((policy.start,))
    reference = pairs(policy.logps(theta))
    for _ in range(steps):
        here = problem(method.loss, policy.logps, theta, reference)
        step = method.solver.step(here, state)
        after = theta - method.lr * step.direction[0]
        if step.displacement is not None:
            after = after + step.displacement[0]
        yield Move(theta, after, state)
        theta, state = after, step.state


def pulls(policy: LogLinear, method: Method, move: Move) -> Tensor:
    """[N, 2] how hard the step pulls log pi(y_w) and log pi(y_l) upwards.

    The solver is asked for its direction with the two log-probabilities as the unknowns. DPO
    pulls by c and -c; a solver's price on the lower level adds lambda to the first.
    """
    reference = pairs(policy.logps(policy.start))
    logps = policy.logps(move.before)[:, :2]
    here = problem(method.loss, lambda logps: logps, logps, reference)
    return -method.solver.step(here, move.state).direction[0]


def apart(policy: LogLinear, method: Method) -> bool:
    """Whether the first start moves as it would alone; a solver may look at all rows at once."""
    first = policy.only(slice(1))
    together, alone = ([*descend(some, method, 3)][-1].after[0] for some in (policy, first))
    return torch.allclose(together, alone, rtol=0, atol=1e-12)
