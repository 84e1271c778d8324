"""A probability evolution's files in; table.md and three figures (svg, png) beside them out."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_lightning.report.evolution_figures import drawn
from spo_lightning.report.settings import table

PARTS = ("chosen", "rejected", "others", "rare", "likely")
CHANGES = {"chosen": "log π(y_w)", "rejected": "log π(y_l)", "others": "π(others)"}
TRAINED = (
    *("policy", "method", "π(y_w)", "π(y_l)", "π(others)", "rare π(y_w)", "likely π(y_w)"),
    *("fell", "deepest fall (nats)", "margin (nats)"),
)


def report(directory: Path) -> list[Path]:
    """Write table.md, evolution, trajectories and theory; returns what was written."""
    numbers = json.loads((directory / "numbers.json").read_text(encoding="utf-8"))
    told = directory / "table.md"
    told.write_text(markdown(numbers), encoding="utf-8")
    return [told, *drawn(numbers, directory)]


def markdown(numbers: Mapping[str, Any]) -> str:
    """Where the mass went, how the theory agrees, and whether the condition holds."""
    trained = [
        [row["policy"], row["method"]]
        + [f"{row[f'{part}_before']:.3g} -> {row[f'{part}_after']:.3g}" for part in PARTS]
        + [f"{row['fell']:.1%}", f"{row['lowest']:.2f}", f"{row['margin']:+.2f}"]
        for row in numbers["trained"]
    ]
    theory: dict[tuple[str, ...], list[str]] = {}  # of the small rate, then of the method's own
    for row in sorted(numbers["theory"], key=lambda row: row["own"]):
        if row["form"] == "idealised":
            key = (row["policy"], row["method"], CHANGES[row["quantity"]])
            rate = [f"{row['lr']:g}"] if row["own"] else []
            slope = f"{row['slope']:.{4 if row['own'] else 6}f}"
            theory.setdefault(key, []).extend([*rate, f"{row['correlation']:.6f}", slope])
    condition = [
        [row["method"], *(f"{row[name]:.1%}" for name in ("holds", "fell", "alike"))]
        for row in numbers["condition"]
    ]
    rate = f"{numbers['theory_lr']:g}"
    lines = [
        f"# Probability evolution: {numbers['starts']} starts, {numbers['steps']} steps, "
        f"seed {numbers['seed']}",
        "",
        "Means over starts, before -> after training. Rare and likely: the third of starts with "
        "the lowest and the highest π(y_w). Fell: share of starts whose π(y_w) ended below its "
        "start. Deepest fall: of log π(y_w), any start at any step. Margin: change of "
        "log π(y_w) - log π(y_l).",
        "",
        *table(TRAINED, trained),
        "",
        "First-order theory, lr (p_w <g(y), g_w> + p_l <g(y), g_l>), against the measured change "
        f"of one step; the first {numbers['theory_steps']} steps of all starts. Correlation and "
        f"slope at lr {rate}, then at the method's own lr.",
        "",
        *table(
            ["policy", "method", "change of", "correlation", f"slope at {rate}"]
            + ["own lr", "correlation", "slope at own lr"],
            [[*key, *told] for key, told in theory.items()],
        ),
        "",
        "The first step where similarity varies from start to start. The condition "
        "<g_w, g_l> > |g_w|^2 says that the preference loss alone lowers π(y_w).",
        "",
        *table(["method", "condition holds", "π(y_w) fell", "both say the same"], condition),
    ]
    return "\n".join(lines) + "\n"
