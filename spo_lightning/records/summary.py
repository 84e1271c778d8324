"""What a run tells of itself in words when it ends: its table, and the card of its model."""

from collections.abc import Mapping
from typing import Any


def run_table(numbers: Mapping[str, Any]) -> str:
    """init, final and difference of the held-out numbers, as plain text."""
    lines = [f"{'held-out':<28}{'init':>12}{'final':>12}{'difference':>12}"]
    lines.append("-" * len(lines[0]))
    for name, before in (numbers.get("init") or {}).items():
        after = numbers["final"].get(name)
        if after is not None:
            lines.append(f"{name:<28}{before:>12.4f}{after:>12.4f}{after - before:>+12.4f}")
    return "\n".join(lines)


def model_card(choices: Mapping[str, str], cfg: Any) -> str:
    """The README.md of a saved policy."""
    start = cfg.model.pretrained or "a model built from its config"
    chosen = "\n".join(f"- {group}: {option}" for group, option in sorted(choices.items()))
    return (
        "---\nlibrary_name: transformers\ntags: [preference-optimization, spo_lightning]\n---\n\n"
        f"Preference-trained with spo_lightning from {start}, seed {cfg.seed}.\n\n{chosen}\n"
    )
