"""The files of a study of solvers on a quadratic in; table.md and solvers (svg, png) out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_lightning.report.evolution_figures import INK, STYLE, read, where

# Okabe and Ito's palette; line and marker tell them apart as well
LOOKS = {
    "none": ("#000000", "-", "X"),
    "penalty, linear": ("#0072B2", "-", "o"),
    "penalty, hinge": ("#56B4E9", "-", "P"),
    "penalty, barrier": ("#009E73", "--", "D"),
    "penalty, BOME": ("#009E73", ":", "v"),
    "alternating, coin": ("#E69F00", "-", "^"),
    "unrolled, adapted": ("#CC79A7", "-.", "p"),
    "unrolled, hypergradient": ("#D55E00", "--", "<"),
    "implicit": ("#D55E00", ":", ">"),
}


def report(directory: Path) -> list[Path]:
    """Write table.md and the figure; returns what was written."""
    import matplotlib

    numbers = json.loads((directory / "numbers.json").read_text(encoding="utf-8"))
    written = [directory / "table.md"]
    written[0].write_text(markdown(numbers), encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure = draw(numbers, directory)
        for ending, more in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
            written.append(directory / f"solvers{ending}")
            figure.savefig(written[-1], **more)
    return written


def markdown(numbers: Mapping[str, Any]) -> str:
    lines = [
        "# Where each solver ends: two quadratics, one start",
        "",
        "| solver | steps | theta | F | G |",
        "|---" * 5 + "|",
    ]
    for end in numbers["ends"]:
        place = f"({end['x']:.3f}, {end['y']:.3f})"
        cells = [end["path"], str(end["steps"]), place, f"{end['F']:.3f}", f"{end['G']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Left: the paths in the plane of theta. Right: where they end, as F against G."""
    from matplotlib.figure import Figure

    paths, curve = read(directory / "paths.csv"), read(directory / "curve.csv")
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    plane, levels = figure.subplots(1, 2, width_ratios=[1.35, 1])
    for axes, x, y in ((plane, "x", "y"), (levels, "G", "F")):
        xs, ys = ([row[name] for row in curve] for name in (x, y))
        axes.plot(xs, ys, color="#BBBBBB", linewidth=6, zorder=0, solid_capstyle="round")
        for place, end in enumerate(numbers["ends"]):
            size = 11 - 0.6 * place  # several end at the same point
            colour, line, shape = LOOKS.get(end["path"], (INK, "-", "o"))
            trail = where(paths, path=end["path"])
            if axes is plane:
                axes.plot(
                    [r[x] for r in trail], [r[y] for r in trail], line, color=colour, linewidth=1.2
                )
            axes.plot(end[x], end[y], shape, color=colour, markersize=size, label=end["path"])
        axes.plot(numbers["start"][x], numbers["start"][y], "s", color=INK, markersize=6)
    named = {"start": (numbers["start"]["x"], numbers["start"]["y"])}
    named |= {"argmin F": numbers["upper"], "argmin G (SFT)": numbers["lower"]}
    for text, at in named.items():
        side = {"xytext": (9, 3)} if text == "start" else {"xytext": (-9, 7), "ha": "right"}
        plane.annotate(text, at, textcoords="offset points", **side)
    plane.margins(0.12)
    plane.set(title="Paths: on the grey curve the lower level has a say", xlabel="theta 1")
    plane.set_ylabel("theta 2")
    levels.set(title="Ends: what F gains, G pays", xlabel="G (SFT level)")
    levels.set_ylabel("F (preference level)")
    handles, labels = plane.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5)
    return figure
