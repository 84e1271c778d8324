"""A probability evolution's files in; table.md and three figures (svg, png) beside them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_lightning.report import evolution_figures as figures

PARTS = {"chosen": "π(y_w)", "rejected": "π(y_l)", "others": "π(others)"}
CHANGES = {"chosen": "log π(y_w)", "rejected": "log π(y_l)", "others": "π(others)"}


def report(directory: Path) -> list[Path]:
    """Write table.md, evolution, trajectories and theory; returns what was written."""
    import matplotlib

    numbers = json.loads((directory / "numbers.json").read_text(encoding="utf-8"))
    table = directory / "table.md"
    table.write_text(markdown(numbers), encoding="utf-8")
    written = [table]
    for draw in (figures.evolution, figures.trajectories, figures.theory):
        with matplotlib.rc_context(figures.STYLE):
            figure = draw(numbers, directory)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out; once is enough
            for ending, more in ((".svg", {"metadata": {"Date": None}}), (".png", {"dpi": 160})):
                written.append(directory / f"{draw.__name__}{ending}")
                figure.savefig(written[-1], **more)
    return written


def markdown(numbers: Mapping[str, Any]) -> str:
    """Where the mass went, how the theory agrees, and whether the condition holds."""
    lines = [
        f"# Probability evolution: {numbers['starts']} starts, {numbers['steps']} steps, "
        f"seed {numbers['seed']}",
        "",
        "Means over starts, before -> after training. Rare and likely: the third of starts with "
        "the lowest and the highest π(y_w). Fell: share of starts whose π(y_w) ended below its "
        "start. Deepest fall: of log π(y_w), any start at any step. Margin: change of "
        "log π(y_w) - log π(y_l).",
        "",
        "| policy | method | π(y_w) | π(y_l) | π(others) | rare π(y_w) | likely π(y_w) "
        "| fell | deepest fall (nats) | margin (nats) |",
        "|---" * 10 + "|",
    ]
    for row in numbers["trained"]:
        moved = [
            f"{row[f'{part}_before']:.3g} -> {row[f'{part}_after']:.3g}"
            for part in (*PARTS, "rare", "likely")
        ]
        told = [f"{row['fell']:.1%}", f"{row['lowest']:.2f}", f"{row['margin']:+.2f}"]
        lines.append(_row(row["policy"], row["method"], *moved, *told))
    lines += ["", *_theory(numbers), "", *_condition(numbers)]
    return "\n".join(lines) + "\n"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _theory(numbers: Mapping[str, Any]) -> list[str]:
    rate = numbers["theory_lr"]
    lines = [
        "First-order theory, lr (p_w <g(y), g_w> + p_l <g(y), g_l>), against the measured change "
        f"of one step; the first {numbers['theory_steps']} steps of all starts. Correlation and "
        f"slope at lr {rate:g}, then at the method's own lr.",
        "",
        f"| policy | method | change of | correlation | slope at {rate:g} | own lr "
        "| correlation | slope at own lr |",
        "|---" * 8 + "|",
    ]
    found = figures.where(numbers["theory"], form="idealised")
    for small in figures.where(found, own=False):
        keys = {name: small[name] for name in ("policy", "method", "quantity")}
        (own,) = figures.where(found, own=True, **keys)
        cells = [small["policy"], small["method"], CHANGES[small["quantity"]]]
        cells += [f"{small['correlation']:.6f}", f"{small['slope']:.6f}", f"{own['lr']:g}"]
        lines.append(_row(*cells, f"{own['correlation']:.6f}", f"{own['slope']:.4f}"))
    return lines


def _condition(numbers: Mapping[str, Any]) -> list[str]:
    lines = [
        "The first step where similarity varies from start to start. The condition "
        "<g_w, g_l> > |g_w|^2 says that the preference loss alone lowers π(y_w).",
        "",
        "| method | condition holds | π(y_w) fell | both say the same |",
        "|---" * 4 + "|",
    ]
    for row in numbers["condition"]:
        shares = [f"{row[name]:.1%}" for name in ("holds", "fell", "alike")]
        lines.append(_row(row["method"], *shares))
    return lines
