"""What a pilot measured in; what is foreseen, how surely and until where, and one line out.

A part of the change that is first order grows with the steps, the rest at least as fast and, where
it is curvature, with their square: the two ends of what is foreseen. It holds to four times the
pilot (five steps of a real model rank the pairs of step 20 with .86) and within an epoch.
"""

from collections.abc import Mapping, Sequence
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any

from spo_lightning.preflight.pilot import Pilot

HOLDS = 4  # pilots
SURE = 1.96  # standard errors


def moved(changes: Sequence[float]) -> dict[str, float]:
    """The mean, its half interval over the pairs, and the share that fell."""
    half = SURE * stdev(changes) / len(changes) ** 0.5
    return {"mean": fmean(changes), "half": half, "displaced": fmean(c < 0 for c in changes)}


def told(found: Pilot, side: str) -> dict[str, float]:
    """Of one side, with its split."""
    first = fmean(found.first[side])
    mean = moved(found.measured[side])
    split = {"first": first, "rest": mean["mean"] - first}
    return mean | split | {"random": fmean(found.random[side])}


def geometry_of(pairs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means, and the share whose own step would lower its chosen answer."""
    means = {name: fmean(pair[name] for pair in pairs) for name in pairs[0]}
    return means | {"own_condition": fmean(pair["overlap"] > 1 for pair in pairs)}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    try:
        return correlation(ranks(one), ranks(other))
    except StatisticsError:  # all values are alike
        return None


def ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the middle of theirs."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def foreseen(found: Pilot, steps: int, wanted: int) -> dict[str, Any]:
    """Mean change and share displaced of held-out answers at the run's length, or as far as it
    holds."""
    until = min(wanted, HOLDS * steps)
    ratio = until / steps
    both = list(zip(found.first["held"], found.measured["held"]))
    linear = [m * ratio for _, m in both]
    curved = [f * ratio + (m - f) * ratio**2 for f, m in both]
    ends = [moved(linear), moved(curved)]
    return {
        "step": until,
        "mean": fmean(end["mean"] for end in ends),
        "low": min(end["mean"] - end["half"] for end in ends),
        "high": max(end["mean"] + end["half"] for end in ends),
        "displaced": sorted(end["displaced"] for end in ends),
    }


def advice(
    sides: Mapping[str, Mapping[str, float]],
    seen_ahead: Mapping[str, Any],
    tried: Sequence[Mapping[str, float]],
    lr: float,
) -> str:
    """One line, with the numbers behind it."""
    held, seen = sides["held"], sides["seen"]
    said = (
        f"Held-out log pi(y_w) changes by {held['mean']:+.2f} +- {held['half']:.2f} nats in the "
        f"pilot ({held['displaced']:.0%} fall; first order {held['first']:+.2f}, rest "
        f"{held['rest']:+.2f}; seen pairs {seen['mean']:+.2f}), foreseen at step "
        f"{seen_ahead['step']}: {seen_ahead['low']:+.2f} to {seen_ahead['high']:+.2f}. "
    )
    if held["mean"] >= 0:
        return f"{said}The chosen answers hold: no solver weight is needed that far."
    enough = next((one["weight"] for one in tried if one["mean"] >= 0), None)
    if enough is not None:
        remedy = f"solver=penalty solver.weight={enough:g} holds them"
    else:
        remedy = f"no weight of {[one['weight'] for one in tried]} holds them"
    if held["first"] > 0:
        smaller = lr * held["first"] / -held["rest"]
        remedy += (
            f"; it is the step's curvature, for which optimizer.lr={smaller:.1e} "
            "or a warm-up would do too"
        )
    elif seen["mean"] > 0:
        remedy += "; seen answers rise, so it is overfitting: fewer epochs or more pairs"
    else:
        remedy += "; the loss itself points down for them, and a smaller step falls more slowly"
    return f"{said}They fall: {remedy}."
