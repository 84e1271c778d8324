"""Objectives in, which of two designs is preferred out.

First the non-dominated rank, a front at a time; within a front the crowding distance (Deb et al.
2002), where the lonelier design is preferred, so that what is drawn spreads over the front.
"""

from dataclasses import dataclass

import numpy as np
from pymoo.operators.survival.rank_and_crowding.metrics import calc_crowding_distance
from pymoo.util.nds.non_dominated_sorting import NonDominatedSorting

Array = np.ndarray


@dataclass(frozen=True)
class Order:
    """Of N designs. Less of ``rank`` is better, more of ``crowding`` is."""

    rank: Array  # [N] 0 for what nothing dominates
    crowding: Array  # [N] infinite at the ends of a front

    @classmethod
    def of(cls, objectives: Array) -> "Order":
        rank = np.zeros(len(objectives), dtype=int)
        crowding = np.zeros(len(objectives))
        for place, front in enumerate(NonDominatedSorting().do(objectives)):
            rank[front] = place
            crowding[front] = calc_crowding_distance(objectives[front])
        return cls(rank, crowding)

    @property
    def best_first(self) -> Array:
        """[N] places of the designs; of equals the earlier one comes first."""
        return np.lexsort((-self.crowding, self.rank))

    def take(self, places: Array | slice) -> "Order":
        return Order(self.rank[places], self.crowding[places])

    def prefers(self, first: Array, second: Array, threshold: float) -> Array:
        """1 where the first of two places is preferred, -1 where the second is, 0 where neither:
        equals, and two of one front of which the lonelier is not lonelier than ``threshold``."""
        fronts = np.sign(self.rank[second] - self.rank[first])
        one, other = self.crowding[first], self.crowding[second]
        lonelier = (one > other).astype(int) - (one < other)
        told = np.maximum(one, other) > threshold
        return np.where(fronts != 0, fronts, lonelier * told)
