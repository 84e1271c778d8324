"""Lightning's W&B logger for runs that stop and go on."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import WandbLogger

from spo_lightning.records.directory import write_text


class StepwiseLogger(WandbLogger):
    """Logs a step once, though a run that goes on repeats those after its checkpoint.

    ``record`` keeps the run's id and ``last``, the last step that was logged.
    """

    def __init__(self, *, last: int, record: Path, **kwargs: Any):
        super().__init__(**kwargs)
        self.last, self.record = last, record

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        if step is not None and step <= self.last:
            return
        super().log_metrics(metrics, step=step)
        if step is None:
            return
        self.last = step
        self.record.parent.mkdir(parents=True, exist_ok=True)  # W&B may be disabled
        kept = {"id": self.experiment.id, "step": step}  # an agent has an id of its own
        write_text(self.record, json.dumps(kept) + "\n")
