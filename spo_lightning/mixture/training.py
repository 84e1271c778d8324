"""A method, a denoiser and pairs in, the denoiser one step further out.

The surrogate, the losses and the solvers are the package's own: a point is an image of two
numbers, and an outer step is what it is for images, with the same times and noise for both points
of a pair, policy and reference.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning import losses
from spo_lightning.diffusion.batch import ImageBatch
from spo_lightning.diffusion.objective import Schedule
from spo_lightning.diffusion.scorer import ImageScorer
from spo_lightning.errors import Diverged
from spo_lightning.losses.around import assembled
from spo_lightning.mixture.likelihood import Flow, Predict
from spo_lightning.solvers import Problem, Slope, Solver, Tensors, Terms
from spo_lightning.solvers.none import NoLower
from spo_lightning.studies.denoiser import Timed
from spo_lightning.studies.fitting import CLIPPED
from spo_lightning.training.microbatch import problem_of

TOLD = 10.0  # the net's times run from 0 to this: its quickest wave then turns 1.6 times
# what a loss may ask for, and what that is: points have none, and no method keeps any
LACKING = {
    "divergences": "a distribution over tokens",
    "sentences": "sentences",
    "squares": "the probabilities of other tokens",
    "margins": "score differences",
    "reference_sides": "answers of a reference",
    "moments": "earlier batches",
    "kl": "how far the policy has moved on other prompts",
}


@dataclass(frozen=True)
class Method:
    """A preference loss and the solver that adds the lower level."""

    loss: losses.Loss
    solver: Solver

    def __post_init__(self):
        try:
            object.__setattr__(self, "loss", assembled(self.loss))  # pyright: ignore
        except TypeError as error:
            raise ValueError(f"loss: {error}; see conf/loss for its keys") from error
        for name, what in LACKING.items():
            if losses.asks(self.loss, name):
                raise ValueError(f"this loss reads {what}, which points lack: take another")

    @property
    def title(self) -> str:
        """Of one that has no name in the yaml: its loss, without what stands around it."""
        loss: Any = self.loss
        while len(inside := getattr(loss, "keywords", {}).get("losses", ())) == 1:
            (loss,) = inside
        name = getattr(loss, "func", loss).__name__
        return name if self.solver == NoLower() else f"{name}, {type(self.solver).__name__}"

    def equals(self, other: "Method") -> bool:
        mine, theirs = (
            (getattr(it.loss, "func", it.loss), getattr(it.loss, "keywords", {}), it.solver)
            for it in (self, other)
        )
        return mine == theirs


class Denoiser(nn.Module):
    """A net as a scorer asks it, and as a flow does."""

    def __init__(self, net: Timed, flow: Flow):
        super().__init__()
        self.net, self.flow = net, flow

    def forward(self, noisy: Tensor, times: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=self.net(noisy, times))

    def predict(self, points: Tensor, u: float) -> Tensor:
        return self.net(points, points.new_full((len(points),), told(u, self.flow)))


def told(u: Any, flow: Flow) -> Any:
    """What a net is told of the log of noise over image, so that it knows places between places
    as well."""
    return TOLD * (u - flow.low) / (flow.high - flow.low)


def batch_of(pairs: Tensor, rows: Tensor) -> ImageBatch:
    """Pairs [B, 2, D], the chosen one first, for the scorer."""
    points = torch.arange(2 * len(pairs))
    return ImageBatch(pairs.flatten(0, 1), {}, points // 2, points % 2 == 1, rows)


class Learner:
    """One method's policy, its optimizer and what its solver remembers."""

    def __init__(
        self, method: Method, start: Denoiser, schedule: Schedule, lr: float, **surrogate: Any
    ):
        self.method, self.denoiser = method, deepcopy(start).requires_grad_()
        self.scorer: Any = ImageScorer(self.denoiser, schedule, **surrogate)
        self.theta: Tensors = tuple(self.scorer.parameters())
        self.optimizer = torch.optim.AdamW(self.theta, lr=lr, weight_decay=0.0, fused=True)
        self.memory = method.solver.init(self.theta)

    @property
    def predict(self) -> Predict:
        return self.denoiser.predict

    def step(self, batch: ImageBatch, number: int) -> dict[str, Tensor]:
        """One outer step on pairs with draws and with what the reference says at them."""
        found: dict[str, Tensor] = {}
        step = self.method.solver.step(self._problem(batch, number, found), self.memory)
        if not torch.stack([it.isfinite().all() for it in step.direction]).all():
            raise Diverged(f"step {number + 1}: a direction is not finite; lower study.lr")
        with torch.no_grad():
            for unknown, along in zip(self.theta, step.direction):
                unknown.grad = along.detach().clone()
            for unknown, by in zip(self.theta, step.displacement or ()):
                unknown.add_(by)
        nn.utils.clip_grad_norm_(self.theta, CLIPPED)
        self.optimizer.step()
        self.memory = step.state
        return found

    def _problem(self, batch: Any, number: int, found: dict[str, Tensor]) -> Problem:
        """F and G of the outer step, which is one microbatch. ``found``: takes F's mean."""
        none = losses.Moments(0.0, 1.0)  # no loss that would read them comes here
        part = problem_of(
            batch, self.scorer, self.method.loss, none, number, lambda _: None, None, False
        )

        def both(theta: Tensors) -> tuple[Tensor, Tensor]:
            upper, lower = part.both(theta)
            found["loss"] = upper.detach().mean()
            return upper, lower

        def gradient(closure: Callable[[Problem], Terms], at: Tensors) -> Slope:
            own = all(mine is given for mine, given in zip(self.theta, at))
            leaves = at if own else tuple(it.detach().requires_grad_() for it in at)
            terms = closure(replace(whole, theta=leaves))
            summed = torch.stack([term.mean() for term in terms.minimise]).sum()
            means = {name: value.mean() for name, value in terms.watch.items()}
            return Slope(torch.autograd.grad(summed, leaves), means)

        whole = replace(part, theta=self.theta, both=both, gradient=gradient, twice=gradient)
        return whole

    def state(self) -> dict[str, Any]:
        return {
            "net": self.denoiser.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "memory": self.memory,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.denoiser.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.memory = state["memory"]
