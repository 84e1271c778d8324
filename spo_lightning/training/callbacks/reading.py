"""Where in its file a streaming run stands: kept in checkpoints, so that it goes on from there."""

from typing import Any

from lightning import Callback, Trainer

from spo_lightning.training.feed import Feed
from spo_lightning.training.module import Preference

KEY = "spo_lightning/stream"


class Reading(Callback):
    """Before each checkpoint is written, the place of the outer step that it is of."""

    def __init__(self, feed: Feed):
        self.feed = feed

    def on_save_checkpoint(
        self, trainer: Trainer, module: Preference, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = self.feed.state(module.outer_step)

    def on_load_checkpoint(
        self, trainer: Trainer, module: Preference, checkpoint: dict[str, Any]
    ) -> None:
        self.feed.load(checkpoint[KEY])
