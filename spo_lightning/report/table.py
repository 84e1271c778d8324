"""metrics.json in, tables out: one run's init and final; many runs' means over seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# two-sided 95% points of Student's t by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def run_table(numbers: Mapping[str, Any]) -> str:
    """init, final and difference of the held-out numbers, as plain text."""
    lines = [f"{'held-out':<28}{'init':>12}{'final':>12}{'difference':>12}"]
    lines.append("-" * len(lines[0]))
    for name, before in numbers["init"].items():
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


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half width of its 95% interval (Student's t); nan for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return mean, t * math.sqrt(variance / len(values))


def finished(directories: Sequence[Path]) -> list[tuple[Path, dict[str, Any], dict[str, Any]]]:
    """(directory, metrics, config) of every finished run at or below the directories."""
    import yaml

    found = []
    for top in directories:
        for path in sorted(top.rglob("metrics.json")):
            numbers = json.loads(path.read_text(encoding="utf-8"))
            config = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))
            if numbers.get("final"):
                found.append((path.parent, numbers, config))
    return found


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, sub in tree.items()
        for name, leaf in _leaves(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _setting(numbers: Mapping[str, Any], config: dict, differing: set[str]) -> str:
    """What distinguishes a run from the others, its seed left out."""
    leaves = _leaves(config)
    chosen = numbers.get("choices", {})
    parts = [f"{group}={chosen[group]}" for group in ("data", "loss", "solver") if group in chosen]
    hidden = ("loss.", "solver.", "data.")
    parts += [
        f"{name}={leaves.get(name)}"
        for name in sorted(differing)
        if not (
            name.startswith(hidden) and name.split(".")[-1] not in ("weight", "beta", "margin")
        )
    ]
    return " ".join(parts)


def sweep_table(directories: Sequence[Path], names: Sequence[str]) -> str:
    """Markdown: per setting the mean and 95% interval over seeds of the held-out numbers."""
    runs = finished(directories)
    if not runs:
        return "no finished run\n"
    leaves = [_leaves(config) for _, _, config in runs]
    ignored = ("seed", "sft.seed", "hydra", "ckpt_path")
    every = {name for some in leaves for name in some}
    differing = {
        name
        for name in every
        if not name.startswith(ignored) and len({repr(some.get(name)) for some in leaves}) > 1
    }
    rows: dict[str, list[dict[str, Any]]] = {}
    inits: dict[str, dict[str, Any]] = {}
    for _, numbers, config in runs:
        rows.setdefault(_setting(numbers, config, differing), []).append(numbers["final"])
        data = numbers.get("choices", {}).get("data", "data")
        inits.setdefault(data, {})[f"{data} {config['seed']}"] = numbers["init"]
    table = {f"data={data} init": list(some.values()) for data, some in inits.items()} | rows
    shown = [name for name in names if any(name in n for some in table.values() for n in some)]
    lines = ["| run | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    for setting, some in table.items():
        cells = [_cell([n[name] for n in some if name in n]) for name in shown]
        lines.append(f"| {setting} | {len(some)} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"
