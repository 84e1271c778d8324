"""A run's configuration and its material in, what a few real steps do to the answers out.

Which pairs come first decides much of what a few steps do, so several pilots start from the same
weights, each on the pairs that come next in the run's order, and their mean is what is told.

The steps are the training command's own: its module, solver, optimizer, schedule and order of the
pairs. Afterwards the weights are what they were, bit for bit.
"""

import gc
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig
from torch import Tensor

from spo_lightning.bench.measuring import MIB, Clock, Memory
from spo_lightning.bench.ours import unmoved
from spo_lightning.data.sets import Pairs
from spo_lightning.preflight.geometry import Advance, slopes, sums
from spo_lightning.run.record import Referenced
from spo_lightning.training.callbacks.evolution import Named
from spo_lightning.training.fit import module_of, steps_alone
from spo_lightning.training.microbatch import trainable
from spo_lightning.training.outer_steps import OuterSteps
from spo_lightning.training.reference import MovingReference


@dataclass(frozen=True)
class Pilot:
    """What the steps did to the pairs of a side, ``seen`` or ``held``."""

    changes: dict[str, Tensor]  # [N, 2] of log pi(y_w) and log pi(y_l), nats
    seconds: float  # of a step
    mib: float  # in use at the peak


@dataclass(frozen=True)
class Split(Pilot):
    """Several: what the first did to the pairs that it saw, and the mean of what all did to the
    held-out ones. ``changes`` of log pi(y_w) less ``first`` is what no gradient sees."""

    first: dict[str, list[float]]  # gradient at the start times the step that was taken
    random: dict[str, list[float]]  # changes by a random step as long in every tensor
    every: list[Tensor]  # [N, 2] of each pilot: the changes of the held-out pairs


@dataclass(frozen=True)
class Pilots:
    """From where all of them start. ``total``: the steps of the run, whose schedule holds;
    ``steps``: those of a pilot; ``count``: how many :meth:`split` takes."""

    cfg: DictConfig
    at: Referenced
    loss: Any
    sides: dict[str, Pairs]
    total: int
    steps: int
    count: int = 1

    @cached_property
    def before(self) -> dict[str, Tensor]:
        return {side: sums(self.at.scorer, pairs) for side, pairs in self.sides.items()}

    def take(self, solver: Any, title: str) -> Pilot:
        """So many steps, and back."""
        start = self.before
        with unmoved(self.at.scorer):
            spent = self._steps(solver, title)
            return Pilot(self._changes(start), *spent)

    def split(self, solver: Any, title: str) -> Split:
        """The same in first order and the rest, beside a random step."""
        start, scorer = self.before, self.at.scorer
        with unmoved(scorer) as kept:
            theta = trainable(scorer)
            here = dict(zip(theta, kept))
            spent = self._steps(solver, title)
            changes = self._changes(start)
            delta = {name: p.detach() - here[name] for name, p in theta.items()}
            first = {"seen": self._first_order("seen", here, delta)}
            _step_at_random(theta, here, delta, self.cfg.seed)
            random = {side: c[:, 0].tolist() for side, c in self._changes(start).items()}
            every, mib = [changes["held"]], [spent[1]]
            for number in range(1, self.count):
                _put_back(theta, here)
                mib.append(self._steps(solver, f"{title} {number + 1}", number * self.steps)[1])
                every.append(self._changes({"held": start["held"]})["held"])
                for name, p in theta.items():  # the first order of a mean is the mean of theirs
                    delta[name] += (p.detach() - here[name] - delta[name]) / (number + 1)
            changes["held"] = torch.stack(every).mean(0)
            first["held"] = self._first_order("held", here, delta)
            return Split(changes, spent[0], max(mib), first, random, every)

    def _first_order(self, side: str, here: Named, delta: Named) -> list[float]:
        pairs = self.sides[side]
        with self.at.stages.stage(f"first order, {side}", len(pairs)) as done:
            return slopes(self.at.scorer, pairs, here, delta, done)

    def _changes(self, start: dict[str, Tensor]) -> dict[str, Tensor]:
        scorer = self.at.scorer
        return {side: sums(scorer, self.sides[side]) - value for side, value in start.items()}

    def _steps(self, solver: Any, title: str, skip: int = 0) -> tuple[float, float]:
        """Take them; seconds of one, and MiB at the peak."""
        at, clock, memory = self.at, Clock(), Memory()
        moving = MovingReference.of(self.cfg.model)
        module = module_of(self.cfg, at.scorer, self.loss, solver, self.total, moving)
        more = {"mismatched": at.mismatched.train, "skip": skip}
        data = OuterSteps.of(self.cfg, module, at.train, at.lower, **more)
        with at.stages.stage(title, self.steps) as advance:
            memory.begin()
            steps_alone(self.cfg, data, self.steps, _watching(clock, advance))
        module.to(at.world.device)  # Lightning leaves it on the CPU
        del module, data
        gc.collect()  # they hold each other, and the optimizer's memory
        # the first step loads the code
        return clock.per_step(warmup=min(1, self.steps - 1)), memory.highest / MIB


def _watching(clock: Clock, advance: Advance) -> LambdaCallback:
    def after(*_: Any) -> None:
        clock.stop()
        advance(1)

    return LambdaCallback(on_train_batch_start=lambda *_: clock.start(), on_train_batch_end=after)


@torch.no_grad()
def _put_back(theta: Mapping[str, Tensor], start: Named) -> None:
    for name, parameter in theta.items():
        parameter.copy_(start[name])


@torch.no_grad()
def _step_at_random(theta: Mapping[str, Tensor], start: Named, delta: Named, seed: int) -> None:
    chance = torch.Generator().manual_seed(seed)
    for name, parameter in theta.items():
        noise = torch.randn(parameter.shape, generator=chance).to(parameter)
        parameter.copy_(start[name] + noise * (delta[name].norm() / noise.norm().clamp(min=1e-30)))
