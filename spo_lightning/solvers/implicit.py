"""The proximal lower level, differentiated through its optimum (as in iMAML, 1909.04630).

phi* = argmin G(phi) + |phi - theta|^2 / (2 gamma); the hypergradient of F(phi*(theta)) solves
(I + gamma H(phi*)) v = grad F(phi*). Run to convergence it ends where phi* minimises F, whatever
G is: use it with a finite budget of steps.
"""

import math
from dataclasses import dataclass

import torch

from spo_lightning.errors import Diverged
from spo_lightning.solvers import Problem, Step, Tensors, dot, lower_terms, moved, upper_terms
from spo_lightning.solvers.linear import LinearSolve
from spo_lightning.solvers.products import Products


@dataclass(frozen=True)
class Implicit:
    """Descend F(phi*(theta)) at theta. Our reading: an alternative to the paper's penalty."""

    gamma: float
    steps: int
    lower_lr: float
    solve: LinearSolve
    hvp: Products

    def __post_init__(self):
        if not self.gamma > 0:
            raise ValueError(f"solver.gamma must be above 0, not {self.gamma}")
        if self.steps < 1:
            raise ValueError(f"solver.steps must be at least 1, not {self.steps}")
        if not self.lower_lr > 0:
            raise ValueError(f"solver.lower_lr must be above 0, not {self.lower_lr}")

    def init(self, theta: Tensors) -> dict:
        return {}

    def step(self, problem: Problem, state: dict) -> Step:
        optimum, gap, before = self._proximal(problem)
        upper = problem.gradient(upper_terms, optimum)
        solved = self.solve(
            lambda vector: self.hvp(problem, optimum, vector), self.gamma, upper.direction
        )
        logged = {
            "lower_before": before,
            "lower_ahead": upper.means["lower"],
            "upper_ahead": upper.means["upper"],
            "proximal_gap": gap,
            "residual": torch.tensor(solved.residual),
            "products": torch.tensor(float(solved.products)),
        }
        return Step(solved.vector, None, state, logged)

    def _proximal(self, problem: Problem) -> tuple[Tensors, torch.Tensor, torch.Tensor]:
        """phi after ``steps`` steps, |phi - previous phi| / |phi - theta|, and G at theta.

        Each step is explicit in G and implicit in the quadratic, so that only G's curvature
        bounds ``lower_lr`` (below 2 / |H|), not 1 / gamma.
        """
        theta = point = last = tuple(t.detach() for t in problem.theta)
        slope = first = problem.gradient(lower_terms, problem.theta)
        share = self.lower_lr / self.gamma
        for step in range(self.steps):
            if step:
                slope = problem.gradient(lower_terms, point)
            last, point = (
                point,
                tuple(
                    (p - self.lower_lr * s + share * t) / (1 + share)
                    for p, s, t in zip(point, slope.direction, theta)
                ),
            )
        change, away = moved(point, last, -1.0), moved(point, theta, -1.0)
        far = dot(away, away)
        gap = (dot(change, change) / far).sqrt() if far else torch.zeros(())
        if not math.isfinite(float(gap)):
            raise Diverged(
                f"the proximal lower level diverged: lower solver.lower_lr (now {self.lower_lr})"
            )
        return point, gap, first.means["lower"]
