"""The numbers of ``what=growth`` in; a markdown table and a picture out."""

from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from spo_lightning.bench.table import OURS, STYLE, aligned, save

TICKS = {"tokens": (1, 2, 5), "pairs": (1,)}  # per decade of the horizontal axis


def table(numbers: Mapping[str, Any]) -> str:
    at = numbers["setting"]
    lines = [
        f"{at['device']}, {at['threads']} threads, {at['precision']}, {at['parameters']:,} "
        f"parameters, vocabulary {at['vocabulary']}",
        f"prompts of {at['prompt'][0]} to {at['prompt'][1]} tokens, responses of "
        f"{at['completion'][0]} to {at['completion'][1]}",
        f"time: from the end of a step to the end of the next, {at['steps']} steps after "
        f"{at['warmup']}, median of {at['repetitions']} rounds (least..most)",
        "exponent: of time as a power of the first column, by least squares of the logarithms; 1 "
        "is linear, 0 is flat. Along the data's size it is of time per token, as lengths differ",
    ]
    lines += [f"with {' '.join(at['train'])}"] * bool(at["train"])
    parts = ["# How our step grows", part(numbers, "tokens"), part(numbers, "pairs")]
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in lines)]) + "\n"


def part(numbers: Mapping[str, Any], axis: str) -> str:
    """The rows along one axis, and what was fitted to them."""
    first = "tokens per step" if axis == "tokens" else "pairs in the data"
    head = [first, "pairs per step", "ms per step", "us per token"]
    rows = []
    for row in numbers[axis]["rows"]:
        at = [1000 * seconds for seconds in row["seconds"]]
        rows.append(
            [
                f"{row[axis]:,.0f}",
                row["pairs_per_step"],
                f"{median(at):.1f} ({min(at):.1f}..{max(at):.1f})",
                f"{1000 * median(at) / row['tokens']:.1f}",
            ]
        )
    return aligned(head, rows) + "\n\n" + said(numbers[axis]["fit"], axis)


def said(fit: Mapping[str, float] | None, axis: str) -> str:
    if fit is None:
        return "One size: nothing to fit."
    if axis == "pairs":
        return f"Exponent of time in the data's size: {fit['exponent']:.3f}."
    return (
        f"Exponent of time in tokens: {fit['exponent']:.3f}; a line through them: "
        f"{1000 * fit['intercept']:.1f} ms + {1e6 * fit['slope']:.1f} us per token, "
        f"off by at most {100 * fit['worst']:.1f}%."
    )


def picture(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """growth.svg and growth.png: both axes logarithmic, a dot with extremes per size."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.6, 3.4), layout="constrained")
        tokens, pairs = figure.subplots(1, 2, sharey=True)
        for axes, axis in ((tokens, "tokens"), (pairs, "pairs")):
            rows = numbers[axis]["rows"]
            x = [row[axis] for row in rows]
            y = [1000 * median(row["seconds"]) for row in rows]
            low = [m - 1000 * min(row["seconds"]) for m, row in zip(y, rows)]
            high = [1000 * max(row["seconds"]) - m for m, row in zip(y, rows)]
            axes.errorbar(x, y, [low, high], fmt="o-", color=OURS, capsize=3, markersize=5)
            axes.set(xscale="log", yscale="log")
            for side, marks in ((axes.yaxis, (1, 2, 5)), (axes.xaxis, TICKS[axis])):
                side.set_major_locator(LogLocator(subs=marks))
                side.set_minor_locator(NullLocator())
                side.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        unit = [row["tokens"] for row in numbers["tokens"]["rows"]]
        first = 1000 * median(numbers["tokens"]["rows"][0]["seconds"])
        line = [first * tokens_ / unit[0] for tokens_ in unit]
        tokens.plot(unit, line, "--", color="#888888", linewidth=0.9, label="linear")
        tokens.legend(loc="upper left")
        tokens.set(title="with its tokens", xlabel="unique tokens per step", ylabel="ms per step")
        pairs.set(title="with the data", xlabel="pairs in the data set")
        figure.suptitle("Our step's time: median and extremes of the rounds")
        return save(figure, directory, "growth")
