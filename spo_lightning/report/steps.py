"""evolution.csv of runs in, steps.svg and steps.png out: each step, predicted and measured."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.report.reading import Run, rows_of
from spo_lightning.report.style import INK, STYLE, saved

SIDES = {  # name, colour and mark
    "chosen": (r"$\log\,\pi(y_w)$", "#0072B2", "o"),
    "rejected": (r"$\log\,\pi(y_l)$", "#E69F00", "s"),
}
TITLED = ("loss", "solver")  # groups that a panel's title names


def report(runs: Sequence[Run], directory: Path) -> list[Path]:
    """A column of panels per run whose steps were watched; what was written."""
    import matplotlib

    watched = [run for run in runs if (run.path / "evolution.csv").is_file()]
    with matplotlib.rc_context(STYLE):
        return saved(draw(watched), directory / "steps", dpi=160) if watched else []


def draw(runs: Sequence[Run]) -> Any:
    """Above: the step's mean change, summed from the first on. Below: pair by pair."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    figure = Figure(figsize=(3.3 * len(runs) + 0.8, 6.2), layout="constrained")
    axes = figure.subplots(2, len(runs), squeeze=False, sharey="row")
    for run, above, below in zip(runs, *axes):
        rows = rows_of(run.path / "evolution.csv")
        sums = rows.groupby("step", sort=False).mean(numeric_only=True).cumsum()
        ends = []
        for side, (_, colour, mark) in SIDES.items():
            above.plot(sums[f"measured_{side}"], color=colour, lw=2.5)
            above.plot(sums[f"predicted_{side}"], color=INK, lw=1, ls="--")
            x, y = (rows[f"{form}_{side}"] for form in ("predicted", "measured"))
            below.scatter(x, y, s=6, lw=0, alpha=0.4, c=colour, marker=mark)
            ends += [x.min(), x.max()]
        above.axhline(0, color=INK, linewidth=0.8)
        below.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, ls="--", lw=1)
        words = " ".join(f"{group}={run.choices.get(group)}" for group in TITLED)
        above.set(title=f"{words}\n{run.path.name}", xlabel="outer step")
        below.set_xlabel("predicted change in a step (nats)")
    axes[0, 0].set_ylabel("change of a step's pairs,\nsummed over steps (nats)")
    axes[1, 0].set_ylabel("measured change in a step (nats)")
    figure.suptitle(
        "Every step's change of log-probability, measured and predicted\n"
        r"(gradient of $\log\,\pi$ times the actual change of the parameters)"
    )
    sides = [
        Line2D([], [], label=label, color=colour, marker=mark, linestyle="-", markersize=5)
        for label, colour, mark in SIDES.values()
    ]
    figure.legend(
        handles=[*sides, Line2D([], [], label="prediction", color=INK, linestyle="--")],
        loc="outside lower center",
        ncols=3,
    )
    return figure
