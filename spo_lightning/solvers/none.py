"""The plain single-level objective: the direction is grad F, and G is only watched."""

from dataclasses import dataclass

from spo_lightning.solvers import Problem, Step, Tensors, Terms


@dataclass(frozen=True)
class NoLower:
    """Descend F alone."""

    def init(self, theta: Tensors) -> dict:
        return {}

    def step(self, problem: Problem, state: dict) -> Step:
        def objective(part: Problem) -> Terms:
            upper, _ = part.both(part.theta)
            return Terms((upper,), {})

        return Step(problem.gradient(objective, problem.theta).direction, None, state, {})
