"""Numbers in; ratios within a round, markdown tables, figures and the files of a run out."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from spo_lightning.records.directory import write_text
from spo_lightning.report import evolution_figures

log = logging.getLogger(__name__)

STYLE = {
    **evolution_figures.STYLE,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
}
BLUE, RED, PINK, GREEN, GREY = "#0072B2", "#D55E00", "#CC79A7", "#009E73", "#888888"


def kept(numbers: Mapping[str, Any], run_dir: Path) -> None:
    """bench.json of what is measured so far: hours are not lost with the last of them."""
    write_text(run_dir / "bench.json", json.dumps(numbers, indent=1) + "\n")


def written(
    numbers: dict[str, Any], text: str, run_dir: Path, pictures: Sequence[Path] = ()
) -> dict[str, Any]:
    """bench.json and table.md; the table and where all is are said. Returns the numbers."""
    kept(numbers, run_dir)
    write_text(run_dir / "table.md", text)
    log.info("\n%s", text)
    for path in pictures:
        log.info("Written: %s", path)
    log.info("Numbers and table: %s", run_dir)
    return numbers


# -- ratios


def extremes(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and extremes of mine over other's, round by round: load that comes and goes on a
    shared machine falls on both."""
    return extremes([one / two for one, two in zip(mine, other, strict=True)])


def spread(found: Mapping[str, float], digits: int = 2) -> str:
    """The median and, in brackets, the extremes."""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low}..{high})"


# -- markdown


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of title: cell, in columns that stand under each other in plain text too."""
    cells = [list(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in cells
    )


def bullets(lines: Sequence[str]) -> str:
    return "\n".join(f"- {line}" for line in lines)


# -- figures


class Panel(NamedTuple):
    """Dots with their extremes, and what they are compared with."""

    x: Sequence[float]
    y: Sequence[Mapping[str, float]]  # median, min and max
    colour: str
    axes: Mapping[str, Any]  # titles, scales and ticks, as matplotlib's Axes.set takes them
    joined: bool = False  # by a line; else each has its value beside it
    levels: Sequence[float] = ()  # dashed lines across
    lowest: float | None = None  # of the vertical axis, unless a dot is lower
    linear: bool = False  # a dashed line from the first dot, as if y grew as x does
    marks: tuple[Sequence[int], Sequence[int]] | None = None  # of a decade, along x and y


def draw(
    panels: Sequence[Sequence[Panel]],
    title: str,
    *,
    size: tuple[float, float],
    directory: Path,
    name: str,
) -> list[Path]:
    """A grid of panels as svg and png; a row shares its vertical axis."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = [directory / f"{name}.svg", directory / f"{name}.png"]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        shape = len(panels), len(panels[0])
        grid = figure.subplots(*shape, squeeze=False, sharex="col", sharey="row")
        for row, across in zip(panels, grid):
            for panel, axes in zip(row, across):
                fill(panel, axes)
            if row[0].lowest is not None:
                low, high = across[0].get_ylim()
                across[0].set_ylim(min(low, row[0].lowest), high * 1.06)
        figure.suptitle(title)
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=160)
    return paths


def fill(panel: Panel, axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    middle = [each["median"] for each in panel.y]
    bars = [
        [each["median"] - each["min"] for each in panel.y],
        [each["max"] - each["median"] for each in panel.y],
    ]
    how = "o-" if panel.joined else "o"
    axes.errorbar(panel.x, middle, bars, fmt=how, color=panel.colour, capsize=3, markersize=5)
    if not panel.joined:
        for place in zip(panel.x, middle):
            beside = {"xytext": (6, 3), "textcoords": "offset points", "size": 8}
            axes.annotate(f"{place[1]:.2f}", place, **beside)
    for level in panel.levels:
        axes.axhline(level, color=GREY, linewidth=0.8, linestyle="--")
    if panel.linear:
        line = [middle[0] * x / panel.x[0] for x in panel.x]
        axes.plot(panel.x, line, "--", color=GREY, linewidth=0.9, label="linear")
        axes.legend(loc="upper left")
    axes.set(**panel.axes)
    for axis, marks in zip((axes.xaxis, axes.yaxis), panel.marks or ()):
        axis.set_major_locator(LogLocator(subs=marks))
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
