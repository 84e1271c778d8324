"""K plain gradient steps on G lead from theta to theta'; there the preference gradient is taken.

Applied at theta' (``Adapted``) it is an SFT step followed by a preference step, whose fixed point
tends to that of the linear penalty with weight lower_lr / lr as both steps shrink. Pulled back to
theta and run to convergence it would end where theta' minimises F, whatever G is. To add a way to
apply it: a record here with the same call, and its yaml.
"""

from dataclasses import dataclass

from spo_lightning.solvers import Problem, Step, Tensors, Terms


def _lower(part: Problem) -> Terms:
    lower = part.lower(part.theta)
    return Terms((lower,), {"lower": lower.detach()})


def _upper(part: Problem) -> Terms:
    upper, lower = part.both(part.theta)
    return Terms((upper,), {"upper": upper.detach(), "lower": lower.detach()})


@dataclass(frozen=True)
class Adapted:
    """Move theta to theta', then follow grad F(theta') from there."""

    def __call__(
        self, theta: Tensors, ahead: Tensors, slope: Tensors
    ) -> tuple[Tensors, Tensors | None]:
        """The direction and the displacement."""
        return slope, tuple(a - t.detach() for a, t in zip(ahead, theta))


@dataclass(frozen=True)
class Unrolled:
    """Descend F at theta_K, K gradient steps on G away from theta."""

    steps: int
    lower_lr: float
    apply: Adapted

    def __post_init__(self):
        if self.steps < 1:
            raise ValueError(
                f"solver.steps must be at least 1, not {self.steps}; 0 is solver=none"
            )
        if not self.lower_lr > 0:
            raise ValueError(f"solver.lower_lr must be above 0, not {self.lower_lr}")

    def init(self, theta: Tensors) -> dict:
        return {}

    def step(self, problem: Problem, state: dict) -> Step:
        ahead, lower = problem.theta, []
        for _ in range(self.steps):
            slope, means = problem.gradient(_lower, ahead)
            lower.append(means["lower"])
            ahead = tuple(t.detach() - self.lower_lr * s for t, s in zip(ahead, slope))
        slope, means = problem.gradient(_upper, ahead)
        direction, displacement = self.apply(problem.theta, ahead, slope)
        logged = {
            "lower_before": lower[0],
            "lower_ahead": means["lower"],
            "upper_ahead": means["upper"],
        }
        return Step(direction, displacement, state, logged)
