"""Log-probabilities of single tokens in, sums, lengths and means of pairs of answers out."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class PairLogps:
    """One log-probability per scored token of an answer, with its pair and its side."""

    logps: Tensor  # [S] nats
    pair: Tensor  # [S] which of the B pairs
    side: Tensor  # [S] bool: False chosen, True rejected
    pairs: int  # B
    margins: Tensor | None = None  # [B] the data's score differences, where it has them
    reference_sides: Tensor | None = None  # [B] 0, 1 or nan: whose the reference's own answer is
    squares: Tensor | None = None  # [S] log sum of squared probabilities, where asked for
    divergences: Tensor | None = None  # [S] KL(reference || policy), where one is read beside
    rows: Tensor | None = None  # [B] Pair.row
    sentences: Tensor | None = None  # [S] as of PairBatch
    similarities: Tensor | None = None
    rewards: bool = False  # they are rewards, one an answer, and no log-probabilities

    def summed(self, values: Tensor) -> Tensor:
        """[B, 2] what the tokens of each answer come to."""
        # float64: the sum of a long answer must not depend on the order of its tokens
        wide = torch.zeros(2 * self.pairs, dtype=torch.float64, device=values.device)
        slot = 2 * self.pair + self.side.long()
        return wide.index_add(0, slot, values.double()).to(values.dtype).view(-1, 2)

    @cached_property
    def sums(self) -> Tensor:
        """[B, 2] log pi(y_w | x) and log pi(y_l | x)."""
        return self.summed(self.logps)

    @cached_property
    def counts(self) -> Tensor:
        """[B, 2] scored tokens; 0 of a response that a row has not."""
        return self.summed(torch.ones_like(self.logps.detach()))

    @cached_property
    def lengths(self) -> Tensor:
        """[B, 2] scored tokens; an absent response counts as one, so means stay finite."""
        return self.counts.clamp(min=1)

    @property
    def places(self) -> Tensor:
        """[S] where a token stands in its answer, from 0."""
        counts = self.counts.long().flatten()
        starts = (counts.cumsum(0) - counts)[2 * self.pair + self.side.long()]
        return torch.arange(len(starts), device=starts.device) - starts

    @property
    def diverged(self) -> Tensor | None:
        """[B, 2] the divergences' sums."""
        return None if self.divergences is None else self.summed(self.divergences)

    @property
    def chosen(self) -> Tensor:
        return self.sums[:, 0]

    @property
    def rejected(self) -> Tensor:
        return self.sums[:, 1]

    @property
    def chosen_length(self) -> Tensor:
        return self.lengths[:, 0]

    @property
    def rejected_length(self) -> Tensor:
        return self.lengths[:, 1]

    @property
    def gap(self) -> Tensor:
        """[B] log pi(y_w | x) - log pi(y_l | x)."""
        return self.chosen - self.rejected

    @property
    def mean_chosen(self) -> Tensor:
        """[B] nats per token."""
        return self.chosen / self.chosen_length

    @property
    def mean_rejected(self) -> Tensor:
        return self.rejected / self.rejected_length

    @property
    def mean_gap(self) -> Tensor:
        """[B] the gap of the two per-token means."""
        return self.mean_chosen - self.mean_rejected
