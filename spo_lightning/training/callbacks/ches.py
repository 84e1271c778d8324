"""Writes ches.csv: how alike the two answers of every training pair are to the policy."""

from typing import Any

from lightning import Callback, Trainer

from spo_lightning.evaluation import ches
from spo_lightning.records.directory import MetricsCsv, cut_after
from spo_lightning.training.callbacks.setting import Setting
from spo_lightning.training.module import Preference

HEADER = ["step", "row", "ches", "ches_normalised"]


class Ches(Callback):
    """CHES of every training pair at the start (step 0) and after every n-th outer step.

    The score that ``data.drop_high_ches`` filters by is that of step 0; later rows show how
    training changes it. The first process scores all pairs.
    """

    def __init__(self, setting: Setting, *, every_n_steps: int):
        self.every, self.setting = every_n_steps, setting
        self.path = setting.directory / "ches.csv"
        self.names: list[str] = []

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if not trainer.is_global_zero:
            return
        if module.outer_step > 0:
            cut_after(self.path, module.outer_step)
            return
        self.path.unlink(missing_ok=True)
        self._write(module)

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.is_global_zero and module.outer_step % self.every == 0:
            self._write(module)

    def _write(self, module: Preference) -> None:
        pairs = self.setting.train
        found = ches.scores(
            module.scorer,
            pairs,
            batch_size=self.setting.batch_size,
            precision=self.setting.precision,
        )
        file = MetricsCsv(self.path, HEADER)
        for pair, values in zip(pairs.pairs, found.tolist()):
            named = dict(zip(HEADER, (module.outer_step, pair.row, *values)))
            file.write(named)
