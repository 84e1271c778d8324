"""evolution.csv of runs in, steps.svg and steps.png out: each step, predicted and measured."""

from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from spo_lightning.report.evolution_figures import COLOURS, INK, STYLE, Rows, column, read

SIDES = {"chosen": r"$\log\,\pi(y_w)$", "rejected": r"$\log\,\pi(y_l)$"}
MARKS = {"chosen": "o", "rejected": "s"}


def report(runs: Mapping[str, Path], directory: Path) -> list[Path]:
    """``runs``: title -> run directory that holds an evolution.csv; returns what was written."""
    import matplotlib

    written = [directory / "steps.svg", directory / "steps.png"]
    with matplotlib.rc_context(STYLE):
        figure = steps({title: read(run / "evolution.csv") for title, run in runs.items()})
        figure.savefig(written[0], metadata={"Date": None})
        figure.savefig(written[1], dpi=160)
    return written


def steps(runs: Mapping[str, Rows]) -> Any:
    """Above: the step's mean change, summed from the first on. Below: pair by pair."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(3.3 * len(runs) + 0.8, 6.2), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for (title, rows), above, below in zip(runs.items(), *axes):
        _summed(above, rows)
        _pairs(below, rows)
        above.set(title=title, xlabel="outer step")
        below.set_xlabel("predicted change in a step (nats)")
    axes[0, 0].set_ylabel("change of a step's pairs,\nsummed over steps (nats)")
    axes[1, 0].set_ylabel("measured change in a step (nats)")
    figure.suptitle(
        "Every step's change of log-probability, measured and predicted\n"
        r"(gradient of $\log\,\pi$ times the actual change of the parameters)"
    )
    look: dict[str, Any] = {"linestyle": "-", "markersize": 5}
    sides = [
        Line2D([], [], label=SIDES[s], color=COLOURS[s], marker=MARKS[s], **look) for s in SIDES
    ]
    figure.legend(
        handles=[*sides, Line2D([], [], label="prediction", color=INK, linestyle="--")],
        loc="outside lower center",
        ncols=3,
    )
    return figure


def _summed(axis: Any, rows: Rows) -> None:
    by_step: dict[float, Rows] = {}
    for row in rows:
        by_step.setdefault(row["step"], []).append(row)
    for side in SIDES:
        for form, look in (("measured", {"lw": 2.5}), ("predicted", {"lw": 1, "ls": "--"})):
            means = [sum(column(some, f"{form}_{side}")) / len(some) for some in by_step.values()]
            colour = COLOURS[side] if form == "measured" else INK
            axis.plot(list(by_step), list(accumulate(means)), color=colour, **look)
    axis.axhline(0, color=INK, linewidth=0.8)


def _pairs(axis: Any, rows: Rows) -> None:
    ends = []
    for side in SIDES:
        x, y = (column(rows, f"{form}_{side}") for form in ("predicted", "measured"))
        axis.scatter(x, y, s=6, lw=0, alpha=0.4, c=COLOURS[side], marker=MARKS[side])
        ends += [min(x), max(x)]
    axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, ls="--", lw=1)
