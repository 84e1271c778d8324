"""The penalty's weight over the outer steps: known before a step, or found from its gradients.

``combine`` gives the direction grad F + weight * grad of the price and the weight it took.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning.solvers import Problem, Slope, Tensors, Terms, dot, lower_terms, moved

State = dict[str, Any]


class Priced(NamedTuple):
    """One microbatch: F, the price of leaving the region at weight 1, and what is watched."""

    upper: Tensor
    price: Tensor
    watch: dict[str, Tensor]


Pricing = Callable[[Problem], Priced]
Judge = Callable[[dict[str, Tensor]], Tensor]  # watched means -> the violation that counts


class Known(ABC):
    """A weight known before the step: one forward and one backward."""

    reads_violation = False
    reads_weight = True

    @abstractmethod
    def weight(self, base: float, state: State) -> float:
        """Of this step; ``base``: solver.weight."""

    def update(self, weight: float, violation: Tensor) -> State:
        return {}

    def combine(
        self, base: float, pricing: Pricing, judge: Judge, problem: Problem, state: State
    ) -> tuple[Slope, float]:
        weight = self.weight(base, state)

        def objective(part: Problem) -> Terms:
            upper, price, watch = pricing(part)
            if weight == 0:  # exactly the plain objective, not plus zero times something
                return Terms((upper,), watch)
            return Terms((upper, weight * price), watch)

        return problem.gradient(objective, problem.theta), weight


@dataclass(frozen=True)
class Constant(Known):
    """The same weight at every step."""

    def weight(self, base: float, state: State) -> float:
        return base


@dataclass(frozen=True)
class Ramp(Known):
    """From 0 to the full weight, linearly. V-PBGD (2302.05185)."""

    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"schedule=ramp: steps must be at least 1, not {self.steps}")

    def weight(self, base: float, state: State) -> float:
        return base * min(1.0, state["step"] / self.steps)


@dataclass(frozen=True)
class DualAscent(Known):
    """weight <- max(0, weight + rate * violation) after each step, from ``solver.weight``.

    At rest the violation is 0 and the weight the constraint's multiplier.
    """

    rate: float  # weight per nat per token and step
    reads_violation = True

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"solver.schedule.rate must be above 0, not {self.rate}")

    def weight(self, base: float, state: State) -> float:
        return float(state.get("weight", base))

    def update(self, weight: float, violation: Tensor) -> State:
        return {"weight": max(0.0, weight + self.rate * float(violation))}


@dataclass(frozen=True)
class SlackBarrier:
    """The smallest weight with which G falls at ``rate`` times the violation, or does not matter.

    weight = max(0, rate * violation - <grad F, grad G>) / |grad G|^2, so that
    dG/dt <= -rate * violation: the region, once entered, is not left. With V from ``inner`` and
    margin 0 it is BOME (2209.08709), which ends at the SFT optimum, whatever F is, where that
    optimum is unique: give it a tolerance (a negative margin). Two forwards and backwards.
    """

    rate: float  # per step and unit of lr
    reads_violation = True
    reads_weight = False

    def __post_init__(self):
        if not self.rate > 0:
            raise ValueError(f"solver.schedule.rate must be above 0, not {self.rate}")

    def update(self, weight: float, violation: Tensor) -> State:
        return {}

    def combine(
        self, base: float, pricing: Pricing, judge: Judge, problem: Problem, state: State
    ) -> tuple[Slope, float]:
        def objective(part: Problem) -> Terms:
            upper, _, watch = pricing(part)
            return Terms((upper,), watch)

        upper = problem.gradient(objective, problem.theta)
        lower: Tensors = problem.gradient(lower_terms, problem.theta).direction
        square = float(dot(lower, lower))
        push = self.rate * float(judge(upper.means)) - float(dot(upper.direction, lower))
        weight = max(0.0, push) / square if square > 0 else 0.0
        with torch.no_grad():
            return Slope(moved(upper.direction, lower, weight), upper.means), weight


Schedule = Constant | Ramp | DualAscent | SlackBarrier
