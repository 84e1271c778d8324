"""Descend F plus a price for leaving the region where G <= V - margin; one forward, one backward.

Per lower row i, in nats per token: violation_i = G_i - V_i + margin. Its price is
weight * scale_i * phi(violation_i), where scale_i = beta * tokens_i for losses that sum over
tokens (so weight 1 pulls as strongly as DPO ever pushes, at every length) and 1 for
length-normalised ones. V stands in ``values``, the weight over the steps in ``weights``. Add a
variant of phi, level, value or schedule: a record in its file, and its yaml.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.solvers import Problem, Step, Tensors
from spo_lightning.solvers.values import Inner, RunningMin, Value, check_decay
from spo_lightning.solvers.weights import Priced, Schedule

BORDER = 256  # units of rounding that count as 0: 3e-5 nats per token in float32
State = dict[str, Any]  # "step", and what value, level and schedule remember


@dataclass(frozen=True)
class Linear:
    """phi(v) = v: F + weight * G, also inside the region."""

    def __call__(self, violation: Tensor) -> Tensor:
        return violation

    def slope(self, violation: Tensor) -> Tensor:
        return torch.ones_like(violation)


@dataclass(frozen=True)
class Hinge:
    """phi(v) = max(0, v): an exact penalty, nothing inside the region; slope 0 at the border."""

    def __call__(self, violation: Tensor) -> Tensor:
        return violation * self.slope(violation.detach())

    def slope(self, violation: Tensor) -> Tensor:
        # at policy = reference G - V is 0 up to rounding, which must not decide who is pulled
        return (violation > BORDER * torch.finfo(violation.dtype).eps).to(violation.dtype)


@dataclass(frozen=True)
class Softplus:
    """phi(v) = temperature * softplus(v / temperature): the hinge with a rounded corner."""

    temperature: float  # nats per token

    def __post_init__(self):
        if not self.temperature > 0:
            raise ValueError(f"softplus: temperature must be above 0, not {self.temperature}")

    def __call__(self, violation: Tensor) -> Tensor:
        return -self.temperature * F.logsigmoid(-violation / self.temperature)

    def slope(self, violation: Tensor) -> Tensor:
        return torch.sigmoid(violation / self.temperature)


@dataclass(frozen=True)
class PerPair:
    """Every row is judged by its own violation."""

    def price(self, phi: Any, lower: Tensor, violation: Tensor, running: Tensor) -> Tensor:
        return phi(violation)

    def judged(self, running: Tensor, means: dict[str, Tensor]) -> Tensor:
        return means["violation"]

    def update(self, running: Tensor, means: dict[str, Tensor]) -> State:
        return {}


@dataclass(frozen=True)
class RunningMean:
    """All rows are judged by the running mean of the violation over earlier outer steps.

    The running mean starts at the margin: a run that starts at V violates by that much.
    """

    decay: float

    def __post_init__(self):
        check_decay("level=mean", self.decay)

    def price(self, phi: Any, lower: Tensor, violation: Tensor, running: Tensor) -> Tensor:
        return phi.slope(running) * lower

    def judged(self, running: Tensor, means: dict[str, Tensor]) -> Tensor:
        return torch.lerp(means["violation"], running, self.decay)

    def update(self, running: Tensor, means: dict[str, Tensor]) -> State:
        return {"violation": self.judged(running, means)}


def check_weight(weight: float) -> None:
    if not 0 <= weight < math.inf:
        raise ValueError(f"solver.weight must be finite and at least 0, not {weight}")


def check_unit(unit: str) -> None:
    if unit not in ("sequence", "token"):
        raise ValueError(f"solver.unit must be sequence or token, not {unit}")


def scale_of(unit: str, beta: float, size: Tensor) -> Tensor | float:
    """[N] beta * tokens for losses that sum over tokens, 1 for length-normalised ones."""
    return beta * size if unit == "sequence" else 1.0


@dataclass(frozen=True)
class Penalty:
    """Descend F + weight * scale * phi(G - V + margin). Our reading of SPO (2507.07723): its
    lower-level constraint as a penalty on the value function."""

    phi: Linear | Hinge | Softplus
    level: PerPair | RunningMean
    value: Value
    schedule: Schedule
    weight: float
    margin: float  # nats per token; positive demands improvement, negative tolerates loss
    unit: str  # of the loss's margin: sequence or token
    beta: float  # the loss's

    def __post_init__(self):
        check_weight(self.weight)
        check_unit(self.unit)
        if self.schedule.reads_violation:
            if not isinstance(self.phi, Linear):
                raise ValueError(
                    "a weight that follows the violation (solver/schedule=dual, barrier) prices "
                    "it by itself: add solver/phi=linear"
                )
        elif isinstance(self.phi, Linear):
            self._refuse_inert()

    def _refuse_inert(self) -> None:
        inert = {
            f"solver.margin={self.margin}": self.margin != 0,
            "solver/value=running_min": isinstance(self.value, RunningMin),
            "solver/value=inner": isinstance(self.value, Inner),
            "solver/level=mean": isinstance(self.level, RunningMean),
        }
        for knob in (knob for knob, set_ in inert.items() if set_):
            raise ValueError(
                f"{knob} has no effect with solver/phi=linear: the violation drops out of a "
                "linear penalty's direction; use phi=hinge or softplus, or leave it out"
            )

    def init(self, theta: Tensors) -> State:
        return {"step": 0}

    def step(self, problem: Problem, state: State) -> Step:
        state = {**state, **self.value.ahead(problem, state)}
        running = state.get("violation", torch.tensor(self.margin, dtype=torch.float64))

        def pricing(part: Problem) -> Priced:
            upper, lower = part.both(part.theta)
            held = lower.detach()
            value = self.value.of(part, held, state)
            violation = lower - value + self.margin
            watch = {"lower": held, "violation": violation.detach(), "value": value}
            watch["active"] = (watch["violation"] > 0).to(lower.dtype)
            price = self.level.price(self.phi, lower, violation, running.to(lower.dtype))
            return Priced(upper, scale_of(self.unit, self.beta, part.size) * price, watch)

        def judged(means: dict[str, Tensor]) -> Tensor:
            return self.level.judged(running.to(means["violation"]), means)

        slope, weight = self.schedule.combine(self.weight, pricing, judged, problem, state)
        means = slope.means
        after = {
            "step": state["step"] + 1,
            **self.value.update(state, means),
            **self.level.update(running.to(means["violation"]), means),
            **self.schedule.update(weight, judged(means)),
        }
        logged = {name: means[name] for name in ("violation", "active", "value")}
        logged["weight"] = torch.tensor(weight, dtype=torch.float64)
        return Step(slope.direction, None, after, logged)
