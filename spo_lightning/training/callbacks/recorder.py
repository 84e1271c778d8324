"""Last after each outer step: a row of metrics.csv, checkpoints, the bar, signals."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from lightning import Callback, Trainer

from spo_lightning.evaluation.totals import NAMES
from spo_lightning.records.checkpoints import former, put, remove
from spo_lightning.records.directory import MetricsCsv, RunDir
from spo_lightning.records.progress import Stages
from spo_lightning.training.callbacks.evaluation import EVAL_NAMES
from spo_lightning.training.checkpoint_io import Straight
from spo_lightning.training.module import Preference


class Recorder(Callback):
    """Writes ``module.numbers``, keeps checkpoints, moves the bar, obeys signals.

    Comes after every callback that adds to the numbers. ``columns``: names that these may add
    later than in the first row. ``checkpoint_every``: outer steps; 0 is off.
    """

    def __init__(
        self,
        run: RunDir,
        stages: Stages,
        *,
        columns: Sequence[str],
        max_steps: int,
        checkpoint_every: int,
        monitor: str | None,
        mode: str,
    ):
        self.run, self.stages, self.columns = run, stages, columns
        self.max_steps = max_steps
        self.checkpoint_every, self.monitor, self.mode = checkpoint_every, monitor, mode
        self.best = math.inf if mode == "min" else -math.inf
        self.csv: MetricsCsv | None = None
        self.saved_step = -1
        self.shown = ExitStack()

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def setup(self, trainer: Trainer, module: Preference, stage: str) -> None:
        trainer.strategy.checkpoint_io = Straight()

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        self.stages.stop.install()  # Lightning's own handlers end a run with the wrong exit code
        self.advance = self.shown.enter_context(
            self.stages.stage("training", self.max_steps, module.outer_step)
        )

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step, row = module.outer_step, module.numbers
        if row:
            self._write(trainer, step, row)
        stopping = self._stopping(trainer)
        over = step == self.max_steps or trainer.should_stop
        if over or stopping or (self.checkpoint_every and step % self.checkpoint_every == 0):
            self._save(trainer, step)
        self._keep_best(trainer, row)
        self.advance(1, _said(row), check=False)
        if stopping:
            raise self.stages.stop.raised(self.stages.how_to_go_on)

    def on_exception(self, trainer: Trainer, module: Preference, exception: BaseException) -> None:
        self.shown.close()

    def on_train_end(self, trainer: Trainer, module: Preference) -> None:
        self.shown.close()
        if trainer.is_global_zero:
            remove(former(self.run.last))

    def _stopping(self, trainer: Trainer) -> bool:
        """Ranks agree: a signal may have reached one of them a step earlier than the others."""
        mine = self.stages.stop.signal is not None
        if trainer.world_size == 1:
            return mine
        agreed = trainer.strategy.reduce_boolean_decision(mine, all=False)
        if agreed and not mine:
            self.stages.stop.signal = 15
        return agreed

    def _write(self, trainer: Trainer, step: int, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        if self.csv is None:
            names = [name for name in row if name.startswith("train/")]
            names += [f"train/{name}" for name in NAMES]  # a first batch may have one label alone
            header = list(dict.fromkeys(["step", *names, *EVAL_NAMES, *self.columns]))
            self.csv = MetricsCsv(self.run.path / "metrics.csv", header)
        self.csv.write({"step": step, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
            logger.save()

    def _save(self, trainer: Trainer, step: int) -> None:
        first = trainer.is_global_zero
        put(self.run.last, trainer.save_checkpoint, keep_former=True, first=first)
        self.saved_step = step

    def _keep_best(self, trainer: Trainer, row: dict[str, float]) -> None:
        value = row.get(self.monitor) if self.monitor else None
        if value is None or not (value < self.best if self.mode == "min" else value > self.best):
            return
        self.best = value
        first = trainer.is_global_zero
        put(self.run.best, trainer.save_checkpoint, keep_former=False, first=first)


def _said(row: dict[str, float]) -> str:
    names = {"loss": "train/loss", "margin": "train/rewards/margins"}
    return " ".join(f"{short} {row[name]:.4f}" for short, name in names.items() if name in row)
