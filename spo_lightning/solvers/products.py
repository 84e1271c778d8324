"""Hessian-vector products of the lower level: H v, where H is the Hessian of the mean of G.

``Exact`` differentiates twice; ``FiniteDifference`` takes two gradients; ``Automatic`` takes the
first where the model allows it. All loop over microbatches and ranks through ``Problem.gradient``.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch

from spo_lightning.solvers import Problem, Slope, Tensors, Terms, dot, lower_terms, moved

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Exact:
    """Double backward, with the attention kernel that allows it (eager, or sdpa's math kernel)."""

    def __call__(self, problem: Problem, theta: Tensors, vector: Tensors) -> Tensors:
        def along(part: Problem) -> Terms:
            lower = part.lower(part.theta)
            slope = torch.autograd.grad(
                lower.sum(), part.theta, create_graph=True, materialize_grads=True
            )
            product = torch.stack([(s * v).sum() for s, v in zip(slope, vector)]).sum()
            return Terms((product.expand(len(lower)) / len(lower),), {})

        if problem.twice is None:
            raise ValueError(
                "solver/hvp=exact needs attention that can be differentiated twice: set "
                "model.attention=sdpa or eager and hardware.compile=false, and spread nothing "
                "(hardware=fsdp), or use solver/hvp=finite_difference"
            )
        return problem.twice(along, theta).direction


@dataclass(frozen=True)
class FiniteDifference:
    """(grad G(theta + e v) - grad G(theta - e v)) / 2e, e = size * (1 + |theta|) / |v|.

    Exact on quadratics up to rounding; else wrong by O(e^2), and by rounding / e.
    """

    size: float | None  # null: the cube root of the rounding unit, 5e-3 in float32

    def __post_init__(self):
        if self.size is not None and not self.size > 0:
            raise ValueError(f"solver.hvp.size must be above 0, or null, not {self.size}")

    def __call__(self, problem: Problem, theta: Tensors, vector: Tensors) -> Tensors:
        if theta[0].dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"solver/hvp=finite_difference needs float32 weights, not {theta[0].dtype}: set "
                "hardware.precision=32-true, or bf16-mixed with solver/hvp=exact"
            )
        length = float(dot(vector, vector).sqrt())
        if length == 0:
            return tuple(torch.zeros_like(v) for v in vector)
        size = self.size or torch.finfo(theta[0].dtype).eps ** (1 / 3)
        step = size * (1 + float(dot(theta, theta).sqrt())) / length
        ahead, back = (
            problem.gradient(lower_terms, moved(theta, vector, sign * step)).direction
            for sign in (1, -1)
        )
        return tuple((x - y) / (2 * step) for x, y in zip(ahead, back))


@dataclass(frozen=True)
class Automatic:
    """``Exact`` where the model can be differentiated twice, else ``FiniteDifference``."""

    size: float | None  # of the finite difference

    def __call__(self, problem: Problem, theta: Tensors, vector: Tensors) -> Tensors:
        taken = FiniteDifference(self.size) if problem.twice is None else Exact()
        _say(type(taken).__name__)
        return taken(problem, theta, vector)


@cache
def _say(taken: str) -> None:
    """Once per process."""
    log.info("Hessian-vector products: %s", {"Exact": "exact"}.get(taken, "finite differences"))


Products = Exact | FiniteDifference | Automatic


def apart(
    problem: Problem, theta: Tensors, products: Products
) -> tuple[Slope, Callable[[Tensors], Tensors]]:
    """The gradient of the mean of G at theta, and v -> H v, which computes it anew."""
    return problem.gradient(lower_terms, theta), partial(products, problem, theta)


def linearized(
    problem: Problem, theta: Tensors, products: Products
) -> tuple[Slope, Callable[[Tensors], Tensors]]:
    """The same; where the model can, v -> H v works once and takes what the gradient left."""
    kept = None if isinstance(products, FiniteDifference) else problem.linearized(theta)
    if kept is None:
        return apart(problem, theta, products)
    _say("Exact")
    return kept
