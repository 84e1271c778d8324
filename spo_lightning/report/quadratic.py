"""The files of a study of solvers on a quadratic in; table.md and solvers (svg, png) out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_lightning.report.reading import rows_of
from spo_lightning.report.settings import table
from spo_lightning.report.style import INK, STYLE, saved

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
    rows = [
        [end["path"], end["steps"], f"({end['x']:.3f}, {end['y']:.3f})"]
        + [f"{end['F']:.3f}", f"{end['G']:.3f}"]
        for end in numbers["ends"]
    ]
    lines = ["# Where each solver ends: two quadratics, one start", ""]
    lines += table(["solver", "steps", "theta", "F", "G"], rows)
    (directory / "table.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    with matplotlib.rc_context(STYLE):
        figure = draw(numbers, directory)
        return [directory / "table.md", *saved(figure, directory / "solvers", dpi=160)]


def draw(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Left: the paths in the plane of theta. Right: where they end, as F against G."""
    from matplotlib.figure import Figure

    paths, curve = (rows_of(directory / f"{name}.csv") for name in ("paths", "curve"))
    figure = Figure(figsize=(9.6, 5.0), layout="constrained")
    plane, levels = figure.subplots(1, 2, width_ratios=[1.35, 1])
    for axes, x, y in ((plane, "x", "y"), (levels, "G", "F")):
        axes.plot(
            curve[x], curve[y], color="#BBBBBB", linewidth=6, zorder=0, solid_capstyle="round"
        )
        for place, end in enumerate(numbers["ends"]):
            size = 11 - 0.6 * place  # several end at the same point
            colour, line, shape = LOOKS.get(end["path"], (INK, "-", "o"))
            trail = paths[paths["path"] == end["path"]]
            if axes is plane:
                axes.plot(trail[x], trail[y], line, color=colour, linewidth=1.2)
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
