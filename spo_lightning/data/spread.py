"""Values in, where they lie out: quantiles, and the bars of a histogram."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

BINS = 50  # bars of a histogram, about


@dataclass(frozen=True)
class Spread:
    """Where values lie, by nearest rank. The last of ``bars`` also holds all that lie above it."""

    count: int
    lowest: float
    median: float
    p90: float
    p99: float
    highest: float
    start: float  # of the first bar
    width: float  # of each
    bars: list[int]


def spread(values: Sequence[float], width: float | None = None) -> Spread:
    """Bars of ``width`` reach to the 99th percentile: one row of great length flattens nothing."""
    ordered = sorted(values)
    width = width or bar_width(ordered)
    start = math.floor(ordered[0] / width) * width
    last = int((rank(ordered, 0.99) - start) / width)
    bars = Counter(min(int((value - start) / width), last) for value in ordered)
    return Spread(
        count=len(ordered),
        lowest=ordered[0],
        median=rank(ordered, 0.5),
        p90=rank(ordered, 0.9),
        p99=rank(ordered, 0.99),
        highest=ordered[-1],
        start=start,
        width=width,
        bars=[bars[number] for number in range(last + 1)],
    )


def rank(ordered: Sequence[float], share: float) -> float:
    """The value below or at which that share of them lies."""
    return ordered[max(math.ceil(share * len(ordered)) - 1, 0)]


def bar_width(ordered: Sequence[float]) -> float:
    """About as many bars as the root of the values, whole numbers in bars of whole numbers."""
    bars = min(max(math.isqrt(len(ordered)), 10), BINS)
    reach = rank(ordered, 0.99) - ordered[0]
    if all(float(value).is_integer() for value in ordered):
        return max(1, math.ceil((reach + 1) / bars))
    return reach / bars or 1.0
