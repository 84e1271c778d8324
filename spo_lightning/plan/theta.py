"""A solver in; out comes how much it holds of theta beside one gradient, and how often it asks.

The solver itself takes two steps on a problem of a few rows, in which tensors as large as theta
are counted.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from spo_lightning.plan.memory import Alive
from spo_lightning.solvers import Problem, Slope, Tensors, Terms

SIZE, PARTS = 2**12, 32  # of theta, and its tensors: what a solver makes of one alone is small


@dataclass(frozen=True)
class Copies:
    """Tensors as large as theta, beside theta and one gradient."""

    during: float  # while a forward and backward runs
    outside: float  # at any time
    kept: float  # from step to step
    passes: int  # forwards and backwards of a step


def copies_of(solver: Any) -> Copies:
    """Of its second step: then what is kept is there."""
    theta = tuple(nn.Parameter(torch.ones(SIZE // PARTS)) for _ in range(PARTS))
    toy = _Toy(theta)
    state = solver.init(theta)
    with toy.alive:
        for _ in range(2):
            toy.passes, toy.during, toy.alive.peak = 0, 0, toy.alive.now
            step = solver.step(toy.problem(), state)
            state = step.state
            del step
    kept = [t for t in tree_leaves(state) if isinstance(t, Tensor)]
    size = 4 * SIZE
    return Copies(
        during=round(toy.during / size),
        outside=round(max(0, toy.alive.peak - size) / size),
        kept=round(sum(t.numel() * 4 for t in kept) / size),
        passes=toy.passes,
    )


class _Toy:
    """Rows whose F and G are parabolas of theta's first numbers, so that a forward of them makes
    nothing as large as theta; moved to and back as the module's parameters are."""

    def __init__(self, theta: Tensors):
        self.theta, self.alive = theta, Alive(theta)
        self.passes, self.during = 0, 0.0

    def problem(self) -> Problem:
        def rows(theta: Tensors, aim: float) -> Tensor:
            return (theta[0][:2] - aim).square()

        return Problem(
            self.theta,
            upper=lambda theta: rows(theta, 2.0),
            lower=lambda theta: rows(theta, -1.0),
            both=lambda theta: (rows(theta, 2.0), rows(theta, -1.0)),
            value=torch.zeros(2),
            size=torch.ones(2),
            gradient=self._gradient,
            twice=self._gradient,
        )

    def _gradient(self, closure: Callable[[Problem], Terms], theta: Tensors) -> Slope:
        moves = theta[0] is not self.theta[0]
        kept = [p.detach().clone() for p in self.theta] if moves else []
        self._write(theta if moves else ())
        self.passes += 1
        self.during = max(self.during, self.alive.now)
        terms = closure(self.problem())
        torch.stack([term.sum() for term in terms.minimise]).sum().backward()
        direction = tuple(torch.zeros_like(p) if p.grad is None else p.grad for p in self.theta)
        for p in self.theta:
            p.grad = None
        self._write(kept)
        return Slope(direction, {name: it.mean() for name, it in terms.watch.items()})

    @torch.no_grad()
    def _write(self, values: Sequence[Tensor]) -> None:
        for p, value in zip(self.theta, values):
            p.copy_(value)
