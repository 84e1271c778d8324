"""One level per step: the preference gradient or the SFT gradient (2410.15483).

In the mean a coin descends F + weight * scale * G, as the linear penalty does; the larger gap ends
where both weighted gaps are equal. scale: see ``penalty``.
"""

from dataclasses import dataclass
from typing import Any

import torch

from spo_lightning.solvers import Problem, Step, Tensors, Terms
from spo_lightning.solvers.penalty import check_unit, check_weight, scale_of

State = dict[str, Any]  # "step", and what the pick remembers


@dataclass(frozen=True)
class Coin:
    """ALRIGHT: the upper level with probability 1 / (1 + weight), by a coin of seed and step."""

    seed: int

    def lower(self, weight: float, state: State) -> bool:
        mixed = torch.Generator().manual_seed(self.seed * 1_000_003 + state["step"])
        return torch.rand((), generator=mixed).item() * (1 + weight) < weight

    def update(self, lower: bool, state: State, means: dict[str, torch.Tensor]) -> State:
        return {}


@dataclass(frozen=True)
class LargerGap:
    """MAXRIGHT: the lower level where weight * (G - lower_best) exceeds F - upper_best.

    Both values are taken anew every ``every`` steps, in between only that of the level stepped
    on; the first step, which knows neither, is the upper level's.
    """

    every: int
    upper_best: float
    lower_best: float  # nats per token

    def __post_init__(self):
        if self.every < 1:
            raise ValueError(f"solver.pick.every must be at least 1, not {self.every}")

    def lower(self, weight: float, state: State) -> bool:
        if "upper" not in state:
            return False
        upper, lower = float(state["upper"]), float(state["lower"])
        return weight * (lower - self.lower_best) > upper - self.upper_best

    def update(self, lower: bool, state: State, means: dict[str, torch.Tensor]) -> State:
        fresh = {name: means[name] for name in ("upper", "lower")}
        if state["step"] % self.every == 0:
            return fresh
        return {"lower": fresh["lower"]} if lower else {"upper": fresh["upper"]}


@dataclass(frozen=True)
class Alternating:
    """Descend F, or scale * G, a whole step at a time; one forward, one backward."""

    pick: Coin | LargerGap
    weight: float
    unit: str  # of the loss's margin: sequence or token
    beta: float  # the loss's

    def __post_init__(self):
        check_weight(self.weight)
        check_unit(self.unit)

    def init(self, theta: Tensors) -> State:
        return {"step": 0}

    def step(self, problem: Problem, state: State) -> Step:
        lower_turn = self.pick.lower(self.weight, state)

        def objective(part: Problem) -> Terms:
            upper, lower = part.both(part.theta)
            scaled = scale_of(self.unit, self.beta, part.size) * lower
            watch = {"upper": upper.detach(), "lower": lower.detach()}
            return Terms((scaled if lower_turn else upper,), watch)

        direction, means = problem.gradient(objective, problem.theta)
        after = {
            **state,
            **self.pick.update(lower_turn, state, means),
            "step": state["step"] + 1,
        }
        logged = {
            "lower_turn": torch.tensor(float(lower_turn)),
            "weight": torch.tensor(self.weight),
        }
        return Step(direction, None, after, logged)
