"""Two quadratics and the solvers in, where each solver ends out: files in the run directory.

``paths.csv``: theta along the steps. ``curve.csv``: theta(mu) = argmin F + mu G, on which every
solution of the constrained problem lies. ``numbers.json``: where each path ended.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_lightning.errors import Diverged
from spo_lightning.records.disk import write_csv, write_text
from spo_lightning.solvers import Problem, Solver
from spo_lightning.studies.descent import of_rows

SHOWN = 200  # points of a path in paths.csv
Numbers = Sequence[float]


@dataclass(frozen=True)
class Bowl:
    """0.5 (theta - centre)^T matrix (theta - centre), theta in the plane."""

    matrix: Sequence[Numbers]
    centre: Numbers

    def __post_init__(self):
        if not bool((torch.linalg.eigvalsh(self.curvature) > 0).all()):
            raise ValueError(f"study: the matrix {self.matrix} is not positive definite")

    @property
    def curvature(self) -> Tensor:
        return torch.tensor(self.matrix, dtype=torch.float64)

    @property
    def bottom(self) -> Tensor:
        return torch.tensor(self.centre, dtype=torch.float64)

    def __call__(self, theta: Tensor) -> Tensor:
        off = theta - self.bottom
        return 0.5 * off @ self.curvature @ off


@dataclass(frozen=True)
class Path2d:
    """A solver, the length of its outer steps and their number."""

    solver: Solver
    lr: float
    steps: int

    def __post_init__(self):
        if not (self.lr > 0 and self.steps >= 1):
            raise ValueError(f"study: lr {self.lr} and steps {self.steps} must be above 0")


@dataclass(frozen=True)
class Study:
    """Every solver from the same start, by plain gradient descent on the same F and G."""

    upper: Bowl
    lower: Bowl
    start: Numbers
    weights: Numbers
    paths: Mapping[str, Path2d]
    report: Callable[[Path], Any]  # reads the files; called by the command after ``run``

    @property
    def total(self) -> int:
        """Steps of all paths together."""
        return sum(path.steps for path in self.paths.values())

    def problem(self, theta: Tensor) -> Problem:
        """One row of F and of G; V is 0, the least G can be."""
        none, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        return of_rows(
            lambda at: (self.upper(at)[None], self.lower(at)[None]), theta, value=none, size=one
        )

    def walked(self, path: Path2d, advance: Callable[[], Any]) -> Tensor:
        """[steps + 1, 2] theta from the start to the end."""
        theta = torch.tensor(self.start, dtype=torch.float64)
        state, points = path.solver.init((theta,)), [theta]
        for _ in range(path.steps):
            step = path.solver.step(self.problem(theta), state)
            theta, state = theta - path.lr * step.direction[0].detach(), step.state
            if step.displacement is not None:
                theta = theta + step.displacement[0]
            points.append(theta)
            advance()
        return torch.stack(points)

    def run(self, directory: Path, advance: Callable[[], Any]) -> dict[str, Any]:
        """Write the files and return numbers.json; ``advance`` is called after every step."""
        curve = [{"weight": w, **self.told(self.optimum(w))} for w in self.weights]
        rows, ends = [], []
        for name, path in self.paths.items():
            points = self.walked(path, advance)
            if not bool(points.isfinite().all()):
                raise Diverged(f"study.paths.{name}: theta is not finite; lower its lr")
            every = max(1, path.steps // SHOWN)
            rows += [
                {"path": name, "step": step, **self.told(points[step])}
                for step in sorted({*range(0, path.steps + 1, every), path.steps})
            ]
            ends.append({"path": name, "steps": path.steps, **self.told(points[-1])})
        write_csv(directory / "paths.csv", rows)
        write_csv(directory / "curve.csv", curve)
        numbers = {"start": self.told(torch.tensor(self.start, dtype=torch.float64))}
        numbers |= {"upper": self.upper.centre, "lower": self.lower.centre, "ends": ends}
        write_text(directory / "numbers.json", json.dumps(numbers, indent=1) + "\n")
        return numbers

    def optimum(self, weight: float) -> Tensor:
        """theta(weight) = (B + weight A)^-1 (B b + weight A a)."""
        B, A = self.upper.curvature, self.lower.curvature
        return torch.linalg.solve(
            B + weight * A, B @ self.upper.bottom + weight * A @ self.lower.bottom
        )

    def told(self, theta: Tensor) -> dict[str, float]:
        x, y = theta.tolist()
        return {"x": x, "y": y, "F": self.upper(theta).item(), "G": self.lower(theta).item()}
