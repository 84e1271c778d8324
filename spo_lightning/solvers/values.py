"""V, the value the lower level can reach, from which the penalty reads G - V + margin.

``ahead`` runs once per outer step before the gradient, ``of`` per microbatch, ``update`` after.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_lightning.solvers import Problem, lower_terms, moved

State = dict[str, Any]


def check_decay(owner: str, decay: float) -> None:
    if not 0 <= decay < 1:
        raise ValueError(f"{owner}: decay must be at least 0 and below 1, not {decay}")


@dataclass(frozen=True)
class Reference:
    """V is the row's own NLL under the reference."""

    def ahead(self, problem: Problem, state: State) -> State:
        return {}

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
        check_decay("value=running_min", self.decay)

    def ahead(self, problem: Problem, state: State) -> State:
        return {}

    def of(self, part: Problem, lower: Tensor, state: State) -> Tensor:
        return state["value"].to(lower).expand_as(lower) if "value" in state else lower

    def update(self, state: State, means: dict[str, Tensor]) -> State:
        lower = means["lower"]
        if "value" not in state:
            return {"smoothed": lower, "value": lower}
        smoothed = torch.lerp(lower, state["smoothed"].to(lower), self.decay)
        return {"smoothed": smoothed, "value": torch.minimum(state["value"].to(lower), smoothed)}


@dataclass(frozen=True)
class Inner:
    """V is G, on the same rows, of a shadow copy that takes K SFT steps before each outer step.

    The shadow starts at theta and goes on from where it stood (V-PBGD, 2302.05185), or with
    ``restart`` begins every outer step at theta (BOME, 2209.08709).
    """

    steps: int
    lower_lr: float
    restart: bool

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(f"solver.value.steps must be at least 1, not {self.steps}")
        if not self.lower_lr > 0:
            raise ValueError(f"solver.value.lower_lr must be above 0, not {self.lower_lr}")

    def ahead(self, problem: Problem, state: State) -> State:
        shadow = problem.theta if self.restart else state.get("shadow", problem.theta)
        shadow = tuple(s.to(t.device) for s, t in zip(shadow, problem.theta))
        for _ in range(self.steps):
            slope = problem.gradient(lower_terms, shadow).direction
            shadow = moved(shadow, slope, -self.lower_lr)
        return {"shadow": shadow}

    @torch.no_grad()
    def of(self, part: Problem, lower: Tensor, state: State) -> Tensor:
        return part.lower(state["shadow"])

    def update(self, state: State, means: dict[str, Tensor]) -> State:
        return {} if self.restart else {"shadow": state["shadow"]}


Value = Reference | RunningMin | Inner
