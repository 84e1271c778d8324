"""After each outer step: a row of metrics.csv, held-out log-probabilities, checkpoints, stops."""

import logging
import math
import multiprocessing
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from lightning import Callback, Trainer

from spo_lightning import losses
from spo_lightning.evals import Pairs, pair_totals
from spo_lightning.module import Preference
from spo_lightning.progress import Stages
from spo_lightning.rundir import MetricsCsv, RunDir

log = logging.getLogger(__name__)

EVAL_NAMES = (
    "loss",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
    "nll/chosen",
    "preference/accuracy",
    "preference/accuracy_norm",
    "displacement/rate",
    "displacement/chosen",
    "entropy/top10",
    "mass/top10",
)


class Recorder(Callback):
    """After each outer step: evaluate, write a row, keep a checkpoint, move the bar, obey signals.

    ``every``: outer steps between evaluations and between checkpoints; 0 is off.
    """

    def __init__(
        self,
        run: RunDir,
        stages: Stages,
        held: Pairs,
        *,
        max_steps: int,
        pairs: int,
        eval_every: int,
        eval_batch: int,
        checkpoint_every: int,
        monitor: str | None,
        mode: str,
        precision: Callable[[], AbstractContextManager],
    ):
        self.run, self.stages, self.held = run, stages, held
        self.max_steps, self.pairs = max_steps, pairs
        self.eval_every, self.eval_batch = eval_every, eval_batch
        self.checkpoint_every, self.monitor, self.mode = checkpoint_every, monitor, mode
        self.precision = precision
        self.best = math.inf if mode == "min" else -math.inf
        self.csv: MetricsCsv | None = None
        self.saved_step = -1

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        self.stages.stop.install()  # Lightning's own handlers end a run with the wrong exit code
        if multiprocessing.parent_process() is not None:  # a rank started by ddp_spawn
            logging.basicConfig(level=logging.INFO, format="%(message)s")
        self.shown = ExitStack()
        stages = self.stages if trainer.is_global_zero else _quiet(self.stages)
        self.advance = self.shown.enter_context(
            stages.stage("training", self.max_steps, module.outer_step)
        )
        self.clock, self.tokens = time.monotonic(), 0

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = module.outer_step
        self.tokens += sum(part.tokens for part in batch) * trainer.world_size
        row = dict(module.numbers)
        if row:
            row |= self._pace(module)
        if self._due(step, self.eval_every):
            row |= self._evaluate(trainer, module)
        if row:
            self._write(trainer, step, row)
        stopping = self._stopping(trainer)
        if self._due(step, self.checkpoint_every) or step == self.max_steps or stopping:
            self._save(trainer, step)
        self._keep_best(trainer, row)
        if trainer.is_global_zero:
            self.advance(1, _said(row), check=False)
        if stopping:
            raise self.stages.stop.raised(self.stages.how_to_go_on)

    def on_exception(self, trainer: Trainer, module: Preference, exception: BaseException) -> None:
        self.shown.close()

    def on_train_end(self, trainer: Trainer, module: Preference) -> None:
        self.shown.close()

    def _due(self, step: int, every: int) -> bool:
        return every > 0 and step % every == 0

    def _stopping(self, trainer: Trainer) -> bool:
        """Ranks agree: a signal may have reached one of them a step earlier than the others."""
        mine = self.stages.stop.signal is not None
        if trainer.world_size == 1:
            return mine
        agreed = trainer.strategy.reduce_boolean_decision(mine, all=False)
        if agreed and not mine:
            self.stages.stop.signal = 15
        return agreed

    def _pace(self, module: Preference) -> dict[str, float]:
        now = time.monotonic()
        rate = self.tokens / max(now - self.clock, 1e-9)
        self.clock, self.tokens = now, 0
        epoch = module.pairs_seen / self.pairs
        return {"train/epoch": epoch, "train/time/tokens_per_second": rate}

    @torch.no_grad()
    def _evaluate(self, trainer: Trainer, module: Preference) -> dict[str, float]:
        began = time.monotonic()
        batches = self.held.batches(self.eval_batch)
        mine = batches[trainer.global_rank :: trainer.world_size]
        with self.precision():
            totals = pair_totals(
                module.scorer,
                self.held,
                mine or batches[:1],
                loss=module.loss,
                moments=losses.moments_of(module.moments_state),
                beta=module.beta,
                top=True,
            )
        if not mine:  # more ranks than batches: zeros, under the names the other ranks reduce
            totals.sums = {name: (0 * total, 0 * n) for name, (total, n) in totals.sums.items()}
        means = module._reduce(totals).means()
        self.clock += time.monotonic() - began  # evaluation is not training's pace
        return {f"eval/{name}": value.item() for name, value in means.items()}

    def _write(self, trainer: Trainer, step: int, row: dict[str, float]) -> None:
        if not trainer.is_global_zero:
            return
        if self.csv is None:
            names = [name for name in row if name.startswith("train/")]
            header = ["step", *names, *(f"eval/{name}" for name in EVAL_NAMES)]
            self.csv = MetricsCsv(self.run.path / "metrics.csv", header)
        self.csv.write({"step": step, **row})
        for logger in trainer.loggers:
            logger.log_metrics(row, step=step)
            logger.save()

    def _save(self, trainer: Trainer, step: int) -> None:
        beside = self.run.last.with_suffix(".tmp")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            beside.replace(self.run.last)
        self.saved_step = step

    def _keep_best(self, trainer: Trainer, row: dict[str, float]) -> None:
        value = row.get(self.monitor) if self.monitor else None
        if value is None or not (value < self.best if self.mode == "min" else value > self.best):
            return
        self.best = value
        beside = self.run.best.with_suffix(".best.tmp")
        trainer.save_checkpoint(beside)
        if trainer.is_global_zero:
            beside.replace(self.run.best)


def _said(row: dict[str, float]) -> str:
    names = {"loss": "train/loss", "margin": "train/rewards/margins"}
    return " ".join(f"{short} {row[name]:.4f}" for short, name in names.items() if name in row)


def _quiet(stages: Stages) -> Stages:
    """Ranks other than the first show and write nothing."""
    return Stages(lambda *_: None, stages.stop, stages.how_to_go_on)
