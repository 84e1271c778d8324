"""Numbers in; ratios within a round, markdown tables and saved figures out."""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

from spo_lightning.records.directory import write_text
from spo_lightning.report import evolution_figures

log = logging.getLogger(__name__)

STYLE = {
    **evolution_figures.STYLE,
    "axes.grid": True,
    "grid.color": "#E5E5E5",
    "axes.axisbelow": True,
}
OURS, TRL = "#0072B2", "#D55E00"


def ratio(mine: Sequence[float], other: Sequence[float]) -> dict[str, float]:
    """Median and extremes of mine over other's, round by round."""
    each = [one / two for one, two in zip(mine, other, strict=True)]
    return {"median": median(each), "min": min(each), "max": max(each)}


def spread(found: dict[str, float] | None, digits: int = 2) -> str:
    """A ratio as its median and, in brackets, its extremes."""
    if found is None:
        return ""
    middle, low, high = (f"{found[name]:.{digits}f}" for name in ("median", "min", "max"))
    return f"{middle} ({low}..{high})"


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def fitted(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    """y as a power of x, and as a line: how far off it is at worst, as a share of y."""
    intercept, slope = _line(x, y)
    worst = max(abs(intercept + slope * one - two) / two for one, two in zip(x, y))
    _, exponent = _line([math.log(v) for v in x], [math.log(v) for v in y])
    return {"exponent": exponent, "intercept": intercept, "slope": slope, "worst": worst}


def _line(x: Sequence[float], y: Sequence[float]) -> tuple[float, float]:
    """Intercept and slope by least squares."""
    found = linear_regression(x, y)
    return found.intercept, found.slope


def aligned(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A markdown table whose columns stand under each other in plain text too."""
    cells = [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(head, *cells)]
    lines = (head, ["-" * width for width in widths], *cells)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in lines
    )


def kept(numbers: Mapping[str, Any], run_dir: Path) -> None:
    """bench.json of what is measured so far: hours are not lost with the last of them."""
    write_text(run_dir / "bench.json", json.dumps(numbers, indent=1) + "\n")


def written(
    numbers: Mapping[str, Any], text: str, run_dir: Path, pictures: Sequence[Path] = ()
) -> None:
    """bench.json and table.md; the table and where all is are said."""
    kept(numbers, run_dir)
    write_text(run_dir / "table.md", text)
    log.info("\n%s", text)
    for path in pictures:
        log.info("Written: %s", path)
    log.info("Numbers and table: %s", run_dir)


def save(figure: Any, directory: Path, name: str) -> list[Path]:
    """The figure as svg and png."""
    paths = [directory / f"{name}.svg", directory / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=160)
    return paths
