"""An outer step's pairs in, the same with draws and with what the reference says at them out."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from spo_lightning.data.batch import Microbatches
from spo_lightning.diffusion.batch import Draws, ImageBatch
from spo_lightning.models.logps import PairLogps


class Beside:
    """A reference that stays, whose numbers move: every outer step has other times and noise, so
    they are computed beside the policy's and nothing is cached. The training module takes it in
    the place of a ``MovingReference``.
    """

    value_moves = False

    def __init__(self, draws: Draws, reference: Callable[[ImageBatch], PairLogps]):
        self.draws, self.reference, self.step = draws, reference, 0

    def begin(self, scorer: Any) -> None:
        pass

    def follow(self, scorer: Any, step: int) -> None:
        """After outer step ``step``."""
        self.step = step

    def read(self, scorer: Any, batch: Microbatches) -> Microbatches:
        """The outer step, drawn and compared."""
        parts, others = (self._all(some) for some in (batch.parts, batch.mismatched))
        return Microbatches(parts, others, batch.below)

    def _all(self, parts: Sequence[ImageBatch]) -> list[ImageBatch]:
        drawn = (self.draws.of(part, self.step) for part in parts)
        return [replace(part, reference=self.reference(part).logps) for part in drawn]

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step, "draws": tuple(self.draws)}

    def load_state_dict(self, state: dict[str, Any], scorer: Any) -> None:
        self.step, self.draws = state["step"], Draws(*state["draws"])
