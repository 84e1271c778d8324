"""A policy that moves in, a reference that follows it out: TR-DPO (arXiv 2404.09656)."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from spo_lightning.data.batch import Microbatches, PairBatch
from spo_lightning.models.scorer import Scorer
from spo_lightning.training.microbatch import scored, trainable

log = logging.getLogger(__name__)


class MovingReference:
    """ref <- alpha theta + (1 - alpha) ref after every ``every``-th outer step, 0: never; alpha 1
    is the hard form. Until the first of them the numbers that travel with the pairs hold.

    Only what trains is kept, once. ``value_moves``: the lower level is measured against it too.
    """

    def __init__(self, alpha: float = 1.0, every: int = 0, value_moves: bool = False):
        self.alpha, self.every, self.value_moves = alpha, every, value_moves
        self.weights: list[Tensor] = []
        self.moved = False

    @classmethod
    def of(cls, model: DictConfig) -> "MovingReference":
        """As the configuration says."""
        how = model.get("reference_sync")  # a run that began before there was this key goes on
        if how is None:
            return cls()
        alpha = model.sync.alpha if how == "soft" else 1.0
        return cls(alpha, model.sync.every_n_steps, model.sync.value == "moving")

    def begin(self, scorer: Scorer) -> None:
        """At the start; a run that goes on has its weights by then."""
        if not self.every:
            return
        log.info(
            "Reference: moves to the policy by %g every %d outer steps; held-out numbers and "
            "displacement are told from the start",
            *(self.alpha, self.every),
        )
        if not self.weights:
            self.weights = [p.detach().clone() for p in trainable(scorer).values()]

    @torch.no_grad()
    def follow(self, scorer: Scorer, step: int) -> None:
        """After outer step ``step``."""
        if not self.every or step % self.every:
            return
        self.moved = True
        for mine, theirs in zip(self.weights, trainable(scorer).values()):
            mine.lerp_(theirs, self.alpha)

    def read(self, scorer: Scorer, batch: Microbatches) -> Microbatches:
        """The outer step with what the reference says of its rows now."""
        if not self.moved:
            return batch
        rows, others = (self._all(scorer, some) for some in (batch.parts, batch.mismatched))
        return Microbatches(rows, others, batch.below)

    def _all(self, scorer: Scorer, parts: Sequence[PairBatch]) -> list[PairBatch]:
        return [self._one(scorer, part) for part in parts]

    @torch.no_grad()
    def _one(self, scorer: Scorer, part: PairBatch) -> PairBatch:
        now = scored(scorer, tuple(self.weights), part).logps
        lower = part.lower
        if lower is not None and self.value_moves:
            lower = self._one(scorer, lower)
        home = part.home and replace(part.home, moved=now.to("cpu"))
        return replace(part, moved=now, lower=lower, home=home)

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "moved": self.moved}

    def load_state_dict(self, state: dict[str, Any], scorer: Scorer) -> None:
        own = trainable(scorer).values()
        self.weights = [weight.to(p.device) for weight, p in zip(state["weights"], own)]
        self.moved = state["moved"]
