"""Solves (I + gamma H) v = g with products H v only, H the lower level's Hessian.

Each refuses what it cannot solve: CG a direction of negative curvature, Neumann and Richardson a
residual that grows. H is symmetric, so the ratio of successive residuals never falls: once it is
above 1 the series diverges.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from spo_lightning.errors import Diverged
from spo_lightning.solvers import Tensors, dot, moved

GROWTH = 1 + 1e-3  # ratio of residuals that is no rounding


class Solved(NamedTuple):
    """v, the products it took and |g - (I + gamma H) v| / |g|."""

    vector: Tensors
    products: int
    residual: float


Product = Callable[[Tensors], Tensors]  # v -> H v


def _norm(vector: Tensors) -> float:
    return math.sqrt(float(dot(vector, vector)))


def _zeros(right: Tensors) -> Tensors:
    """Where to start; not finite where ``right`` is not, so that no iteration hides it."""
    return tuple(0 * r for r in right)


def _check(iterations: int, tolerance: float) -> None:
    if iterations < 1:
        raise ValueError(f"solver.solve.iterations must be at least 1, not {iterations}")
    if not tolerance >= 0:
        raise ValueError(f"solver.solve.tolerance must be at least 0, not {tolerance}")


@dataclass(frozen=True)
class ConjugateGradient:
    """At most as many iterations as H has distinct eigenvalues; needs I + gamma H > 0."""

    iterations: int
    tolerance: float  # relative residual at which it stops early

    def __post_init__(self):
        _check(self.iterations, self.tolerance)

    def __call__(self, product: Product, gamma: float, right: Tensors) -> Solved:
        start = _norm(right)
        found = _zeros(right)
        residual = along = right
        squared, count = start**2, 0
        while count < self.iterations and math.sqrt(squared) > self.tolerance * start:
            turned = product(along)
            count += 1
            length = float(dot(along, along))
            bend = float(dot(along, turned)) / length
            if not 1 + gamma * bend > 0:
                raise Diverged(
                    f"conjugate gradients: I + gamma H has the negative curvature "
                    f"{1 + gamma * bend:.3g} (H has {bend:.3g}): set solver.gamma below "
                    f"{1 / abs(bend):.3g}, now {gamma:.3g}"
                )
            reach = squared / (length * (1 + gamma * bend))
            found = moved(found, along, reach)
            residual = moved(residual, moved(along, turned, gamma), -reach)
            before, squared = squared, float(dot(residual, residual))
            along = moved(residual, along, squared / before)
        return Solved(found, count, math.sqrt(squared) / start if start else 0.0)


@dataclass(frozen=True)
class Neumann:
    """v = sum over j <= iterations of (-gamma H)^j g; converges where gamma |H| < 1."""

    iterations: int
    tolerance: float

    def __post_init__(self):
        _check(self.iterations, self.tolerance)

    def __call__(self, product: Product, gamma: float, right: Tensors) -> Solved:
        start = size = _norm(right)
        found = term = right
        count = 0
        while count < self.iterations and size > self.tolerance * start:
            term = tuple(-gamma * t for t in product(term))
            count += 1
            size, before = _norm(term), size
            _refuse_growth(
                size / before,
                f"Neumann series: gamma |H| is at least {size / before:.3g}, it must be below 1: "
                f"set solver.gamma below {gamma * before / size if size else gamma:.3g}, now "
                f"{gamma:.3g}, or use solver/solve=cg",
            )
            found = moved(found, term, 1.0)
        # g - (I + gamma H) v_J = (-gamma H)^{J+1} g, here bounded by the last term
        return Solved(found, count, size / start if start else 0.0)


@dataclass(frozen=True)
class Richardson:
    """v <- v + step (g - (I + gamma H) v); converges where step < 2 / (1 + gamma |H|), H >= 0."""

    iterations: int
    tolerance: float
    step: float

    def __post_init__(self):
        _check(self.iterations, self.tolerance)
        if not self.step > 0:
            raise ValueError(f"solver.solve.step must be above 0, not {self.step}")

    def __call__(self, product: Product, gamma: float, right: Tensors) -> Solved:
        start = size = _norm(right)
        found = _zeros(right)
        residual, count = right, 0
        while count < self.iterations and size > self.tolerance * start:
            found = moved(found, residual, self.step)
            turned = moved(residual, product(residual), gamma)
            residual = moved(residual, turned, -self.step)
            count += 1
            size, before = _norm(residual), size
            _refuse_growth(
                size / before,
                f"Richardson: the residual grows by {size / before:.3g} an iteration: lower "
                f"solver.solve.step (now {self.step:.3g}) or solver.gamma (now {gamma:.3g}), or "
                "use solver/solve=cg",
            )
        return Solved(found, count, size / start if start else 0.0)


def _refuse_growth(ratio: float, message: str) -> None:
    if not ratio < GROWTH:
        raise Diverged(message)


LinearSolve = ConjugateGradient | Neumann | Richardson
