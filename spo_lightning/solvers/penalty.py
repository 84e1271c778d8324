"""Descend F plus a price for leaving the region where G <= V - margin; one forward, one backward.

Per lower row i, in nats per token: violation_i = G_i - V_i + margin. Its price is
weight * scale_i * phi(violation_i), where scale_i = beta * tokens_i for losses that sum over
tokens (so weight 1 pulls as strongly as DPO ever pushes, at every length) and 1 for
length-normalised ones. Add a variant of phi, level, value or schedule: a record here, its yaml.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.solvers import Problem, Step, Tensors, Terms

BORDER = 256  # units of rounding that count as 0: 3e-5 nats per token in float32
State = dict[str, Any]  # "step", and what value and level remember as 0-d tensors


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

    def update(self, running: Tensor, means: dict[str, Tensor]) -> State:
        return {}


@dataclass(frozen=True)
class RunningMean:
    """All rows are judged by the running mean of the violation over earlier outer steps.

    The running mean starts at the margin: a run that starts at V violates by that much.
    """

    decay: float

    def __post_init__(self):
        _check_decay("level=mean", self.decay)

    def price(self, phi: Any, lower: Tensor, violation: Tensor, running: Tensor) -> Tensor:
        return phi.slope(running) * lower

    def update(self, running: Tensor, means: dict[str, Tensor]) -> State:
        return {"violation": torch.lerp(means["violation"], running, self.decay)}


@dataclass(frozen=True)
class Reference:
    """V is the row's own NLL under the reference."""

    def of(self, part: Problem, lower: Tensor, state: State) -> Tensor:
        if part.value is None:
            raise ValueError(
                "solver.value=reference needs the reference's NLL of the lower rows, and there is "
                "none; use solver/value=running_min"
            )
        return part.value

    def update(self, state: State, means: dict[str, Tensor]) -> State:
        return {}


@dataclass(frozen=True)
class RunningMin:
    """V is the lowest value that the smoothed mean of G has had so far in this run.

    Before the first outer step ends, V is each row's present G: only a margin is violated.
    """

    decay: float

    def __post_init__(self):
        _check_decay("value=running_min", self.decay)

    def of(self, part: Problem, lower: Tensor, state: State) -> Tensor:
        return state["value"].to(lower).expand_as(lower) if "value" in state else lower

    def update(self, state: State, means: dict[str, Tensor]) -> State:
        lower = means["lower"]
        if "value" not in state:
            return {"smoothed": lower, "value": lower}
        smoothed = torch.lerp(lower, state["smoothed"].to(lower), self.decay)
        return {"smoothed": smoothed, "value": torch.minimum(state["value"].to(lower), smoothed)}


@dataclass(frozen=True)
class Constant:
    """The same weight at every step."""

    def __call__(self, step: int) -> float:
        return 1.0


@dataclass(frozen=True)
class Ramp:
    """From 0 to the full weight, linearly. V-PBGD (2302.05185)."""

    steps: int

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"schedule=ramp: steps must be at least 1, not {self.steps}")

    def __call__(self, step: int) -> float:
        return min(1.0, step / self.steps)


def _check_decay(owner: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{owner}: decay must be at least 0 and below 1, not {decay}")


@dataclass(frozen=True)
class Penalty:
    """Descend F + weight * scale * phi(G - V + margin). Our reading of SPO (2507.07723): its
    lower-level constraint as a penalty on the value function."""

    phi: Linear | Hinge | Softplus
    level: PerPair | RunningMean
    value: Reference | RunningMin
    schedule: Constant | Ramp
    weight: float
    margin: float  # nats per token; positive demands improvement, negative tolerates loss
    unit: str  # of the loss's margin: sequence or token
    beta: float  # the loss's

    def __post_init__(self):
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"solver.weight must be finite and at least 0, not {self.weight}")
        if self.unit not in ("sequence", "token"):
            raise ValueError(f"solver.unit must be sequence or token, not {self.unit}")
        if isinstance(self.phi, Linear):
            self._refuse_inert()

    def _refuse_inert(self) -> None:
        inert = {
            f"solver.margin={self.margin}": self.margin != 0,
            "solver/value=running_min": isinstance(self.value, RunningMin),
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
        weight = self.weight * self.schedule(state["step"])
        running = state.get("violation", torch.tensor(self.margin, dtype=torch.float64))

        def objective(part: Problem) -> Terms:
            upper, lower = part.both(part.theta)
            held = lower.detach()
            value = self.value.of(part, held, state)
            violation = lower - value + self.margin
            watch = {"lower": held, "violation": violation.detach(), "value": value}
            watch["active"] = (watch["violation"] > 0).to(lower.dtype)
            if weight == 0:  # exactly the plain objective, not plus zero times something
                return Terms((upper,), watch)
            scale = self.beta * part.size if self.unit == "sequence" else 1.0
            price = self.level.price(self.phi, lower, violation, running.to(lower))
            return Terms((upper, weight * scale * price), watch)

        direction, means = problem.gradient(objective, problem.theta)
        after = {
            "step": state["step"] + 1,
            **self.value.update(state, means),
            **self.level.update(running.to(means["violation"]), means),
        }
        logged = {name: means[name] for name in ("violation", "active", "value")}
        logged["weight"] = torch.tensor(weight)
        return Step(direction, None, after, logged)
