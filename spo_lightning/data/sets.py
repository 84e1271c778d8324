"""Token pairs in, batches of near-equal length out, with the reference's numbers where known."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from spo_lightning.data.batch import Pair, PairBatch, collate

TOKENS = 8_192  # of one scoring batch: long rows come in smaller ones


@dataclass(frozen=True)
class Pairs:
    """Tokenised pairs with the reference's per-token log-probabilities, [tokens] each.

    A row that is never read may have an empty one.
    """

    pairs: Sequence[Pair]
    references: Sequence[Tensor] | None
    pad_id: int
    groups: Sequence[Sequence[str]] = ()  # of each held-out pair, where there are any

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: Sequence[int]) -> "Pairs":
        scored = self.references
        return replace(
            self,
            pairs=[self.pairs[i] for i in indices],
            references=None if scored is None else [scored[i] for i in indices],
            groups=[self.groups[i] for i in indices] if self.groups else (),
        )

    def batch(self, indices: Sequence[int]) -> PairBatch:
        scored = self.references
        return collate(
            [self.pairs[i] for i in indices],
            self.pad_id,
            None if scored is None else [scored[i] for i in indices],
        )

    def batches(self, size: int) -> list[list[int]]:
        """Indices in batches of near-equal length, longest first, so that memory fails early."""
        order = sorted(range(len(self.pairs)), key=lambda i: -len(self.pairs[i]))
        found: list[list[int]] = []
        while order:
            fits = max(1, min(size, TOKENS // len(self.pairs[order[0]])))
            found.append(order[:fits])
            order = order[fits:]
        return found
