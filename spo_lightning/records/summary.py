"""What a run tells of itself in words when it ends: its table, and the card of its model."""

from collections.abc import Mapping
from typing import Any

# numbers of each group of held-out rows that a terminal shows; metrics.json has all
BRIEF = (
    *("exact_match", "win_rate", "rewards/accuracies", "nll/chosen", "displacement/rate"),
    "answers/refused",
)


def flat(numbers: Mapping[str, Any]) -> dict[str, float]:
    """Held-out numbers over all rows, then a few of each group."""
    found = {name: value for name, value in numbers.items() if not isinstance(value, Mapping)}
    for group, some in numbers.get("by", {}).items():
        found |= {f"{group}: {name}": some[name] for name in BRIEF if name in some}
    return found


def run_table(numbers: Mapping[str, Any]) -> str:
    """init, final and difference of the held-out numbers, as plain text; the 95% interval of the
    difference where the prompts are the same ones."""
    paired = numbers.get("paired", {})
    init, final = flat(numbers.get("init") or {}), flat(numbers["final"])
    wide = max([28, *(len(name) + 1 for name in init)])
    lines = [f"{'held-out':<{wide}}{'init':>12}{'final':>12}{'difference':>12}"]
    lines.append("-" * len(lines[0]))
    for name, before in init.items():
        after = final.get(name)
        if after is not None:
            sure = paired.get(name)
            told = f"   [{sure['low']:+.4f}, {sure['high']:+.4f}]" if sure else ""
            numbers_of = f"{before:>12.4f}{after:>12.4f}{after - before:>+12.4f}"
            lines.append(f"{name:<{wide}}{numbers_of}{told}")
    return "\n".join(lines)


def model_card(choices: Mapping[str, str], cfg: Any) -> str:
    """The README.md of a saved policy."""
    start = cfg.model.pretrained or "a model built from its config"
    bits = cfg.model.get("quantize")
    start += f", its linear layers in {bits}" if bits else ""
    chosen = "\n".join(f"- {group}: {option}" for group, option in sorted(choices.items()))
    return (
        "---\nlibrary_name: transformers\ntags: [preference-optimization, spo_lightning]\n---\n\n"
        f"Preference-trained with spo_lightning from {start}, seed {cfg.seed}.\n\n{chosen}\n"
    )
