"""Values per answer before and after training in, their mean difference and how sure it is out."""

import math
from collections.abc import Sequence

from spo_lightning.evaluation.shares import Items

DRAWS, SEED = 2000, 0  # of the bootstrap
AT_ONCE = 2**20  # values drawn at once: 16 MB
Change = dict[str, float]  # difference, low, high; p where a value is right or wrong


def changes(before: Items, after: Items) -> dict[str, Change]:
    """Of every number that both have, on the same prompts."""
    both = [n for n, values in before.items() if values and len(after.get(n, ())) == len(values)]
    return {name: change(before[name], after[name]) for name in both}


def change(before: Sequence[float], after: Sequence[float]) -> Change:
    """Its 95% interval is a bootstrap's over prompts; ``p`` is McNemar's exact test's."""
    import numpy as np

    moved = np.asarray(after) - np.asarray(before)
    chance = np.random.default_rng(SEED)
    many = max(1, AT_ONCE // len(moved))
    drawn = [
        moved[chance.integers(len(moved), size=(min(many, DRAWS - done), len(moved)))].mean(-1)
        for done in range(0, DRAWS, many)
    ]
    low, high = np.percentile(np.concatenate(drawn), [2.5, 97.5])
    found = {"difference": float(moved.mean()), "low": float(low), "high": float(high)}
    if {*before, *after} <= {0.0, 1.0}:
        found["p"] = mcnemar(int((moved > 0).sum()), int((moved < 0).sum()))
    return found


def mcnemar(gained: int, lost: int) -> float:
    """How probable so uneven a split of the prompts that changed is where either way is as likely
    (exact, two-sided)."""
    count = gained + lost
    tail = sum(math.comb(count, k) for k in range(min(gained, lost) + 1))
    return min(1.0, 2 * tail / 2**count)
