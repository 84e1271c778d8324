"""Our side of every measurement: a configuration and pairs in, the training command's steps out.

All that the bench takes from ``run/`` goes through this file.
"""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from spo_lightning.bench.cell import as_text
from spo_lightning.data.batch import Pair
from spo_lightning.data.rows import Task
from spo_lightning.data.sets import Pairs
from spo_lightning.models import device
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sources import check_sources
from spo_lightning.records.progress import Stages, hushed, silent
from spo_lightning.run.job import objective
from spo_lightning.run.training import prepared
from spo_lightning.training.fit import module_of, steps_alone
from spo_lightning.training.outer_steps import OuterSteps
from spo_lightning.training.reference import MovingReference
from spo_lightning.world import World


def device_of(hardware: DictConfig) -> torch.device:
    with hushed():  # it says what it took, and here it is asked again for every cell
        return device.device_of(hardware)


class Entry(NamedTuple):
    """A loss and a solver with the rest of their run; ``cfg`` is the training command's."""

    cfg: DictConfig
    loss: Any
    solver: Any


def entry_of(cfg: DictConfig) -> Entry:
    """Built before anything slow, so that bad knobs and paths end at once."""
    check_sources(cfg.model)
    return Entry(cfg, *objective(cfg))


class Start(NamedTuple):
    """What the steps start from, whichever solver takes them."""

    scorer: Scorer
    train: Pairs
    lower: Pairs | None  # the lower level's own texts; None: the chosen responses


def start_of(cfg: DictConfig, task: Task, stages: Stages) -> Start:
    """The policy and its pairs, tokenised and scored, as the training command prepares them."""
    given = prepared(cfg, task, stages, World(place=lambda: device.device_of(cfg.hardware)))
    return Start(given.scorer, given.train, given.lower)


class Watch:
    """Looks at a run before its first step and around every step; this one looks away."""

    def begin(self) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


@dataclass
class Ours:
    """``Preference`` under Lightning's Trainer on ``OuterSteps``, as in training."""

    entry: Entry
    start: Start
    rows: list[int] = field(init=False, default_factory=list)  # of the last run, as drawn

    @classmethod
    def on(cls, cfg: DictConfig, pairs: Sequence[Pair]) -> "Ours":
        task = Task(train=as_text(pairs), held_out=[])
        with hushed(), threads_of(cfg.hardware):
            return cls(entry_of(cfg), start_of(cfg, task, silent()))

    def changed(self, **values: Any) -> "Ours":
        """The same with other values of the configuration."""
        cfg = OmegaConf.merge(self.entry.cfg, values)
        return replace(self, entry=self.entry._replace(cfg=cfg))

    def logging(self) -> "Ours":
        """The same, and the numbers of every step are computed."""
        return self.changed(log={"every_n_steps": 1})

    def run(self, steps: int, watch: Watch) -> list[float]:
        """Take so many steps; the loss of each, where it was computed."""
        cfg, scorer = self.entry.cfg, self.start.scorer
        losses: list[float] = []
        self.rows = []

        def before(trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.rows += [row for part in batch for row in part.rows.tolist()]
            watch.start()

        def after(trainer: Any, module: Any, *_: Any) -> None:
            watch.stop()
            losses.append(module.numbers.get("train/loss", float("nan")))

        look = LambdaCallback(
            on_train_start=lambda *_: watch.begin(),
            on_train_batch_start=before,
            on_train_batch_end=after,
        )
        with threads_of(cfg.hardware), unmoved(scorer):
            moving = MovingReference.of(cfg.model)
            module = module_of(cfg, scorer, self.entry.loss, self.entry.solver, steps, moving)
            data = OuterSteps.of(cfg, module, self.start.train, self.start.lower)
            steps_alone(cfg, data, steps, look)
        del module, data
        gc.collect()  # they hold each other, and the solver's and the optimizer's memory
        return losses


@contextmanager
def unmoved(module: nn.Module) -> Iterator[list[Tensor]]:
    """Afterwards the weights are as they were, so that every run starts from the same ones; a copy
    of these."""
    parameters = [p for p in module.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in parameters]
    yield before
    with torch.no_grad():
        for p, value in zip(parameters, before):
            p.copy_(value)
            p.grad = None


@contextmanager
def threads_of(hardware: DictConfig) -> Iterator[None]:
    """As many threads as a configuration asks for; one of ``what=knobs`` asks for its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(hardware.threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
