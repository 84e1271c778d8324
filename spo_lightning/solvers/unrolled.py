"""K gradient steps on G lead from theta to theta'; there the preference gradient is taken.

Applied at theta' (``Adapted``) it is an SFT step followed by a preference step, whose fixed point
tends to that of the linear penalty with weight lower_lr / lr as both steps shrink. Pulled back to
theta (``Hypergradient``) and run to convergence it ends where theta' minimises F, whatever G is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from spo_lightning.solvers import Problem, Slope, Step, Tensors, moved, upper_terms
from spo_lightning.solvers.products import Products, apart, linearized

State = dict[str, Any]


@dataclass(frozen=True)
class Plain:
    """Inner steps follow -grad G."""

    def scale(self, state: State, slope: Tensors) -> Tensors | None:
        """The diagonal P of the inner steps of this outer step; None is the identity."""
        return None

    def update(self, state: State, slope: Tensors) -> State:
        return state


@dataclass(frozen=True)
class Preconditioned:
    """Inner steps follow -P grad G, P = 1 / (sqrt(running mean of squares) + eps), diagonal.

    The mean is over outer steps, the present one included: a parameter that had no gradient before
    would else take a step of 1 / eps. P is a constant of the inner steps, so that I - lower_lr H P
    is their exact Jacobian (transposed).
    """

    decay: float
    eps: float

    def __post_init__(self):
        if not 0 <= self.decay < 1:
            raise ValueError(
                f"solver.inner.decay must be at least 0 and below 1, not {self.decay}"
            )
        if not self.eps > 0:
            raise ValueError(f"solver.inner.eps must be above 0, not {self.eps}")

    def scale(self, state: State, slope: Tensors) -> Tensors:
        return tuple(1 / (square.sqrt() + self.eps) for square in self._squares(state, slope))

    def update(self, state: State, slope: Tensors) -> State:
        return {**state, "squares": self._squares(state, slope)}

    def _squares(self, state: State, slope: Tensors) -> Tensors:
        squares = tuple(s.square() for s in slope)
        if "squares" not in state:
            return squares
        kept = zip(squares, state["squares"])
        return tuple(torch.lerp(new, old.to(new), self.decay) for new, old in kept)


@dataclass(frozen=True)
class Path:
    """The inner steps: v -> H v at theta_0 .. theta_{K-1}."""

    products: Sequence[Callable[[Tensors], Tensors]]
    lower_lr: float
    scale: Tensors | None

    def pulled_back(self, slope: Tensors) -> Tensors:
        """v <- v - lower_lr H(theta_k) P v, backwards: no graph through more than one step."""
        for product in reversed(self.products):
            turned = product(_scaled(self.scale, slope))
            slope = moved(slope, turned, -self.lower_lr)
        return slope


@dataclass(frozen=True)
class Adapted:
    """Move theta to theta', then follow grad F(theta') from there."""

    second = False  # whether Hessian products are asked for

    def __call__(
        self, theta: Tensors, ahead: Tensors, slope: Tensors, path: Path
    ) -> tuple[Tensors, Tensors | None]:
        """The direction and the displacement."""
        return slope, tuple(a - t.detach() for a, t in zip(ahead, theta))


@dataclass(frozen=True)
class Hypergradient:
    """Stay at theta and follow the gradient of F(theta'(theta)): whole, or its first order."""

    order: str  # second: through the inner steps; first: as if theta' moved with theta

    def __post_init__(self):
        if self.order not in ("first", "second"):
            raise ValueError(f"solver.apply.order must be first or second, not {self.order}")

    @property
    def second(self) -> bool:
        return self.order == "second"

    def __call__(
        self, theta: Tensors, ahead: Tensors, slope: Tensors, path: Path
    ) -> tuple[Tensors, Tensors | None]:
        return (path.pulled_back(slope) if self.second else slope), None


@dataclass(frozen=True)
class Unrolled:
    """Descend F at theta_K, K gradient steps on G away from theta. methods: K-step unroll."""

    steps: int
    lower_lr: float
    inner: Plain | Preconditioned
    apply: Adapted | Hypergradient
    hvp: Products

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(
                f"solver.steps must be at least 1, not {self.steps}; 0 is solver=none"
            )
        if not self.lower_lr > 0:
            raise ValueError(f"solver.lower_lr must be above 0, not {self.lower_lr}")

    def init(self, theta: Tensors) -> State:
        return {}

    def step(self, problem: Problem, state: State) -> Step:
        ahead, products = problem.theta, []
        first = scale = None
        # beside the points of several steps a graph would take too much
        look = linearized if self.apply.second and self.steps == 1 else apart
        for _ in range(self.steps):
            slope, product = look(problem, ahead, self.hvp)
            if first is None:
                first, scale = slope, self.inner.scale(state, slope.direction)
            products.append(product)
            ahead = moved(ahead, _scaled(scale, slope.direction), -self.lower_lr)
        assert first is not None  # there is one step at least
        upper = problem.gradient(upper_terms, ahead)
        path = Path(products, self.lower_lr, scale)
        direction, displacement = self.apply(problem.theta, ahead, upper.direction, path)
        after = self.inner.update(state, first.direction)
        return Step(direction, displacement, after, _logged(first, upper))


def _logged(first: Slope, upper: Slope) -> dict:
    return {
        "lower_before": first.means["lower"],
        "lower_ahead": upper.means["lower"],
        "upper_ahead": upper.means["upper"],
    }


def _scaled(scale: Tensors | None, vector: Tensors) -> Tensors:
    return vector if scale is None else tuple(p * v for p, v in zip(scale, vector))
