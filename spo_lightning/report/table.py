"""metrics.json in, tables out: one run's init and final; many runs' means over seeds."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import IDLE
from spo_lightning.report.reading import dotted, runs_of, seed_of

# two-sided 95% points of Student's t by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half width of its 95% interval (Student's t); nan for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return mean, t * math.sqrt(variance / len(values))


Run = tuple[Path, dict[str, Any], dict[str, Any]]  # directory, metrics, config


def finished(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories that has come to its final numbers."""
    runs = runs_of(directories)
    return [(run.path, run.numbers, run.config) for run in runs if run.final and run.config]


GROUPS = ("data", "model", "loss", "solver")


def told_apart(runs: Sequence[Run]) -> dict[Path, dict[str, Any]]:
    """By directory, what distinguishes a run besides its seed: options of groups, then keys."""
    leaves = {path: dotted(_telling(config)) for path, _, config in runs}
    chosen = {
        path: {group: numbers.get("choices", {}).get(group) for group in GROUPS}
        for path, numbers, _ in runs
    }
    groups = [group for group in GROUPS if len({c[group] for c in chosen.values()}) > 1]
    seed = {path: seed_of(config) for path, _, config in runs}
    follows = {  # keys that have the run's seed wherever they stand, such as sft.seed
        name
        for name in set().union(*leaves.values())
        if all(found.get(name, seed[path]) == seed[path] for path, found in leaves.items())
    }
    alike: dict[str, list[Path]] = {}
    for path in leaves:
        alike.setdefault(repr(chosen[path]), []).append(path)
    found: dict[Path, dict[str, Any]] = {}
    for paths in alike.values():
        names = set().union(*(leaves[path] for path in paths)) - follows
        columns: dict[tuple[str, ...], str] = {}
        for name in sorted(names):  # of keys that vary alike, as solver.beta does, the first
            column = tuple(repr(leaves[path].get(name)) for path in paths)
            if len(set(column)) > 1:
                columns.setdefault(column, name)
        differing = columns.values()
        for path in paths:
            found[path] = {group: chosen[path][group] for group in groups}
            found[path] |= {name: leaves[path].get(name) for name in differing}
    return {path: found[path] for path in leaves}


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides numbers."""
    hardware = config.get("hardware")
    precision = hardware.get("precision") if isinstance(hardware, dict) else None
    kept = {key: value for key, value in config.items() if key not in IDLE}
    return kept | ({"hardware": {"precision": precision}} if precision else {})


def label(told: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in told.items()) or "run"


def settings(runs: Sequence[Run]) -> dict[str, dict[int, dict[str, Any]]]:
    """Setting -> seed -> metrics; a setting is what distinguishes runs besides their seed."""
    apart = told_apart(runs)
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for path, numbers, config in runs:
        found.setdefault(label(apart[path]), {})[seed_of(config)] = numbers
    return found


def sweep_table(directories: Sequence[Path], names: Sequence[str]) -> str:
    """Markdown: per setting the mean and 95% interval over seeds, then differences by seed."""
    runs = finished(directories)
    found = settings(runs)
    rows = {label: [run["final"] for run in seeds.values()] for label, seeds in found.items()}
    for data in sorted({_data(run) for seeds in found.values() for run in seeds.values()}):
        every = [(seed, run) for seeds in found.values() for seed, run in seeds.items()]
        inits = {seed: run.get("init") or {} for seed, run in every if _data(run) == data}
        rows = {f"init (data={data})": list(inits.values())} | rows
    shown = [name for name in names if any(name in n for some in rows.values() for n in some)]
    head = ["| run | seeds | " + " | ".join(shown) + " |", "|---" * (len(shown) + 2) + "|"]
    lines = list(head)
    for label, some in rows.items():
        cells = [cell([n[name] for n in some if name in n]) for name in shown]
        named = label.replace("|", "\\|")
        lines.append(f"| {named} | {len(some)} | " + " | ".join(cells) + " |")
    differences = _differences(found, shown)
    if differences:
        lines += ["", "Differences between runs of the same seed, mean and 95% interval:", ""]
        lines += [head[0], head[1], *differences]
    return "\n".join(lines) + "\n"


def _data(run: Mapping[str, Any]) -> str:
    return run.get("choices", {}).get("data", "given")


def _differences(found: Mapping[str, Mapping[int, Any]], shown: Sequence[str]) -> list[str]:
    """A row per two settings that share at least two seeds and their data."""
    lines = []
    for (one, left), (other, right) in combinations(found.items(), 2):
        seeds = sorted(left.keys() & right.keys())
        if len(seeds) < 2 or _data(left[seeds[0]]) != _data(right[seeds[0]]):
            continue
        cells = []
        for name in shown:
            pairs = [(left[s]["final"].get(name), right[s]["final"].get(name)) for s in seeds]
            cells.append(cell([b - a for a, b in pairs if a is not None and b is not None]))
        lines.append(f"| {other} less {one} | {len(seeds)} | " + " | ".join(cells) + " |")
    return lines


def cell(values: Sequence[float]) -> str:
    """A mean and its 95% interval."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} ± {half:.3f}"
