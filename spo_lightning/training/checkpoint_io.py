"""How Lightning writes and reads a checkpoint here: straight to its file, once.

Lightning's own way makes the file in memory, then in the system's temporary folder, then moves it:
a second copy of the model in memory, and a full /tmp ends a run whose own disk has room.
"""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import CheckpointIO

from spo_lightning.records import checkpoints, parts


class Straight(CheckpointIO):
    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        checkpoints.write(checkpoint, Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        if Path(path).is_dir():
            return parts.read(Path(path))
        where = "cpu" if map_location is None else map_location
        return torch.load(path, map_location=where, weights_only=weights_only)

    def remove_checkpoint(self, path: Any) -> None:
        checkpoints.remove(Path(path))
