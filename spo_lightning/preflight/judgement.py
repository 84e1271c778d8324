"""What a pilot measured in; what is foreseen, how surely and until where, and one line out.

The first pilot is the run's own beginning, and each further stretch of the run as long does, on
other pairs, what the other pilots did: that is likely. The part of a change that is first order
grows with the steps; the rest, where it is curvature, with their square at most: the other end of
what is foreseen. It holds to four times a pilot and within an epoch: docs/evidence.md.
"""

from collections.abc import Mapping, Sequence
from statistics import StatisticsError, correlation, fmean, stdev
from typing import Any

from torch import Tensor

from spo_lightning.preflight.pilot import Split

HOLDS = 4  # pilots
SURE = 1.96  # standard errors


def moved(changes: Sequence[float]) -> dict[str, float]:
    """The mean, its half interval over the pairs, and the share that fell."""
    half = SURE * stdev(changes) / len(changes) ** 0.5
    return {"mean": fmean(changes), "half": half, "displaced": fmean(c < 0 for c in changes)}


def told(changes: Tensor) -> dict[str, float]:
    """Of the [N, 2] of a side; ``margin`` is the change of log pi(y_w) - log pi(y_l)."""
    chosen, rejected = changes.T
    return moved(chosen.tolist()) | {"margin": (chosen - rejected).mean().item()}


def parts(found: Split, side: str) -> dict[str, float]:
    """Of one side, with its split."""
    whole, first = told(found.changes[side]), fmean(found.first[side])
    split = {"first": first, "rest": whole["mean"] - first, "random": fmean(found.random[side])}
    return whole | split


def means(pairs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of the pairs' geometry, and the share whose own step would lower its chosen answer."""
    found = {name: fmean(pair[name] for pair in pairs) for name in pairs[0]}
    return found | {"own_condition": fmean(pair["overlap"] > 1 for pair in pairs)}


def spearman(one: Sequence[float], other: Sequence[float]) -> float | None:
    try:
        return correlation(ranks(one), ranks(other))
    except StatisticsError:  # all values are alike
        return None


def ranks(values: Sequence[float]) -> list[float]:
    """From 0; equal values share the middle of theirs."""
    order = sorted(values)
    return [order.index(v) + (order.count(v) - 1) / 2 for v in values]


def foreseen(
    first: Sequence[float],
    changes: Sequence[float],
    alone: Sequence[float],
    count: int,
    steps: int,
    wanted: int,
) -> dict[str, Any]:
    """Mean change and share displaced of held-out answers after ``wanted`` steps, or as far as
    ``count`` pilots of ``steps`` hold, in which they changed by ``changes``, to first order by
    ``first``, and by ``alone`` in the first of them."""
    until = min(wanted, HOLDS * steps)
    pilots = until / steps
    ends = [
        moved([stretched(c, a, count, pilots) for c, a in zip(changes, alone, strict=True)]),
        moved([f * pilots + (c - f) * pilots**2 for f, c in zip(first, changes, strict=True)]),
    ]
    return {
        "step": until,
        "pilots": pilots,
        "mean": ends[0]["mean"],
        "low": min(end["mean"] - end["half"] for end in ends),
        "high": max(end["mean"] + end["half"] for end in ends),
        "displaced": sorted(end["displaced"] for end in ends),
    }


def stretched(change: float, alone: float, count: int, pilots: float) -> float:
    """What becomes of an answer in a run of so many pilots' length: the first one's change, then
    what the others did in the mean."""
    others = (count * change - alone) / (count - 1) if count > 1 else alone
    return min(1.0, pilots) * alone + max(0.0, pilots - 1) * others


def advice(
    sides: Mapping[str, Mapping[str, float]],
    ahead: Mapping[str, Any],
    tried: Sequence[Mapping[str, float]],
    lr: float,
    steps: int,
) -> str:
    """One line, with the numbers behind it. ``steps``: of the run."""
    held, seen = sides["held"], sides["seen"]
    numbers = (
        f"Held-out log pi(y_w): {held['mean']:+.3g} +- {held['half']:.2g} nats in the pilots, "
        f"{held['displaced']:.0%} fall (first order {held['first']:+.3g}, rest "
        f"{held['rest']:+.3g}; seen pairs {seen['mean']:+.3g}); foreseen at step {ahead['step']}: "
        f"{ahead['mean']:+.3g} ({ahead['low']:+.3g} to {ahead['high']:+.3g})."
    )
    if held["mean"] >= 0 and ahead["mean"] >= 0:
        until = "" if ahead["step"] >= steps else f" until step {ahead['step']} of {steps}"
        return f"{numbers} The chosen answers hold: no further solver weight is needed{until}."
    verdict = "They fall" if held["mean"] + held["half"] < 0 else "They may fall"
    return f"{numbers} {verdict}: {'; '.join(_remedies(held, seen, tried, lr))}."


def _remedies(
    held: Mapping[str, float],
    seen: Mapping[str, float],
    tried: Sequence[Mapping[str, float]],
    lr: float,
) -> list[str]:
    """The weight that holds them, then what is cheaper."""
    found = []
    weights = [one for one in tried if one["weight"] > 0]
    enough = next((w for w in weights if w["mean"] >= w["half"] and w["foreseen"] >= 0), None)
    if enough is not None:
        price = f"at a margin of {enough['margin']:+.3g} where the run has {held['margin']:+.3g}"
        found.append(f"solver=penalty solver.weight={enough['weight']:g} holds them, {price}")
    elif weights:
        found.append(f"no weight up to {weights[-1]['weight']:g} holds them beyond chance")
    if 0 < held["first"] < -held["rest"]:
        # a step of k times the length has k times the first order, and k^2 of the rest
        smaller = lr * held["first"] / -held["rest"]
        found.append(
            f"the step is too long, and optimizer.lr={smaller:.1e} or a warm-up would do too"
        )
    if seen["mean"] > 0:
        found.append("seen answers rise, so it is overfitting: more pairs, or fewer epochs")
    if held["first"] <= 0 and seen["mean"] <= 0:
        found.append("the loss itself points down for seen and held-out, at any step size")
    return found
