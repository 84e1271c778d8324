"""A start and a solver in, what its outer steps cost out: seconds, and memory at the peak.

The steps are those of training: ``Preference`` under Lightning's Trainer, on the same batches and
from the same weights whichever solver takes them.
"""

import gc
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from spo_lightning.bench.memory import MIB, Memory, apart, can_forget, named, settle
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import Interrupted
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.progress import Stages, quiet
from spo_lightning.training.fit import OuterSteps, module_of


class Start(NamedTuple):
    """What every solver starts from."""

    scorer: Scorer
    train: Pairs
    lower: Pairs | None  # the lower level's own texts; None: the chosen responses


class Entry(NamedTuple):
    """One solver with the rest of its run."""

    cfg: DictConfig
    loss: Any
    solver: Any


def take(entry: Entry, start: Start, steps: int, watch: Any) -> None:
    """``steps`` outer steps, watched by a callback; the policy is left as it was."""
    cfg = entry.cfg
    parameters = [p for p in start.scorer.parameters() if p.requires_grad]
    kept = [p.detach().clone() for p in parameters]
    module = module_of(cfg, start.scorer, entry.loss, entry.solver, steps)
    trainer = Trainer(
        accelerator=cfg.hardware.accelerator,
        devices=1,
        precision=cfg.hardware.precision,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = OuterSteps.of(cfg, module, start.train, start.lower)
    try:
        trainer.fit(module, DataLoader(data, batch_size=None))
    except SIGTERMException as error:  # Lightning has taken the signal over
        raise Interrupted(143, "stopped by SIGTERM") from error
    with torch.no_grad():
        for p, before in zip(parameters, kept):
            p.copy_(before)
            p.grad = None
    del module, trainer, data
    gc.collect()  # they hold each other, and the solver's and the optimizer's memory


def inner_share(start: Start) -> float:
    """Tokens of a pass of the lower level over those of a pass of both levels."""
    pairs = start.train.pairs
    texts = pairs if start.lower is None else start.lower.pairs
    again = 0 if start.scorer.shared else 1  # the prompt of a pair is encoded twice
    below = sum(len(text.prompt) + len(text.chosen) for text in texts) / len(texts)
    return below * len(pairs) / sum(len(pair) + again * len(pair.prompt) for pair in pairs)


# -- time


@dataclass
class Clock:
    """Seconds of every outer step, from the batch on the device to the parameters moved."""

    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.began)

    def _wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def times(
    entries: Mapping[str, Entry],
    start: Start,
    *,
    steps: int,
    warmup: int,
    repetitions: int,
    stages: Stages,
) -> dict[str, list[float]]:
    """Seconds per step, one per repetition, in rounds over all solvers.

    Every round starts one solver later, so that none always follows the same neighbour's load.
    """
    quiet()  # Lightning, which was imported since
    names = list(entries)
    found: dict[str, list[float]] = {name: [] for name in names}
    take(entries[names[0]], start, 1, LambdaCallback())  # what only the first ever loads
    with stages.stage("time", repetitions * len(names)) as advance:
        for number in range(repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                clock = Clock()
                watch = LambdaCallback(
                    on_train_batch_start=lambda *_, clock=clock: clock.start(),
                    on_train_batch_end=lambda *_, clock=clock: clock.stop(),
                )
                with named(name):
                    take(entries[name], start, warmup + steps, watch)
                found[name].append(sum(clock.seconds[warmup:]) / steps)
                advance(1, f"{name} {1000 * found[name][-1]:.1f} ms")
    return found


# -- memory


def peaks(
    entries: Mapping[str, Entry], base: str, start: Start, room: Path, steps: int, stages: Stages
) -> dict[str, float]:
    """MiB at the peak of ``steps`` steps above what the start takes, by solver.

    Every solver has a process of its own, and the start goes there through a file in ``room``.
    """
    place = room / "start.pt"
    torch.save(start, place)
    calls = {name: (peak, [entries[base], entry], place, steps) for name, entry in entries.items()}
    return apart(calls, stages, shown=lambda mib: f"{mib:.0f} MiB")


def peak(entries: Sequence[Entry], place: Path, steps: int) -> float:
    """MiB that the second entry's steps take, once a step of the first has loaded the code."""
    settle(entries[0].cfg.hardware)
    start = torch.load(place, weights_only=False)  # written just now, by ourselves
    first, second = entries
    if can_forget():  # else its peak would hide the other's
        take(first, start, 1, LambdaCallback())
    memory = Memory()
    take(second, start, steps, LambdaCallback(on_train_start=lambda *_: memory.start()))
    return memory.above() / MIB
