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
    orders: bool = False  # rows 2n and 2n + 1 ask about the same two answers, in either order

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


def mismatched(pairs: Sequence[Pair], max_length: int) -> list[Pair]:
    """Every prompt with the answer of the row before it, the first with the last one's.

    Answers are cut to ``max_length``. A pair gives one for each of its answers, a row alone none.
    """
    answers = [
        (pair, ids, context)
        for pair in pairs
        for ids, context in (
            (pair.chosen, pair.chosen_context),
            (pair.rejected, pair.rejected_context),
        )
        if ids
    ]
    found = []
    for (pair, *_), (_, ids, context) in zip(answers, [*answers[-1:], *answers[:-1]]):
        ids = ids[: max_length - len(pair.prompt)]
        edges = tuple(min(edge, len(ids)) for edge in context)
        bare = replace(pair, rejected=(), rejected_context=(), margin=None)
        found.append(replace(bare, chosen=ids, chosen_context=edges))
    return found if len(found) > 1 else []
