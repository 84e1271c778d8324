"""How matplotlib's pictures look, and how they are saved: as SVG and PNG, the same each time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Okabe and Ito's palette, which colour-blind readers tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREW, FELL, INK, OTHER = "#0072B2", "#D55E00", "#222222", "#777777"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.titlesize": 11.0,
    "svg.hashsalt": "spo_lightning",  # the same numbers give the same file
}


def saved(
    figure: Any, stem: Path, *, dpi: int, kinds: Sequence[str] = ("svg", "png")
) -> list[Path]:
    """``stem``.svg and .png. Each is laid out anew from the one before, so the order is seen."""
    written = [stem.with_name(f"{stem.name}.{kind}") for kind in kinds]
    for file in written:
        more = {"metadata": {"Date": None}} if file.suffix == ".svg" else {"dpi": dpi}
        figure.savefig(file, **more)
    return written
