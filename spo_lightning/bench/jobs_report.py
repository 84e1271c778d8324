"""The numbers of ``what=jobs`` in, a markdown table out."""

from collections.abc import Mapping
from statistics import mean
from typing import Any

from spo_lightning.bench.table import aligned

NAMES = {"ours": "ours", "trl": "TRL"}


def table(numbers: Mapping[str, Any]) -> str:
    """A row per job, the totals, then what was run."""
    at, found, rows = numbers["setting"], numbers["totals"], numbers["jobs"]
    sides = [side for side in NAMES if side in found]
    head = ["beta", "weight", *(f"{NAMES[side]}, s" for side in sides)]
    head += ["TRL / ours"] * ("trl" in sides)
    whole = {side: found[side]["seconds"] for side in sides}
    body = [line(row, row["beta"], row["weight"]) for row in rows] + [line(whole, "all", "")]
    parts = [f"# {len(rows)} jobs of {at['steps']} steps", aligned(head, body)]
    return "\n\n".join([*parts, notes(numbers, sides)]) + "\n"


def line(seconds: Mapping[str, Any], *first: Any) -> list[Any]:
    """The cells of one row of the table."""
    cells = [*first, *(f"{seconds[side]:.1f}" for side in NAMES if side in seconds)]
    if "trl" in seconds:
        cells.append(f"{seconds['trl'] / seconds['ours']:.2f}")
    return cells


def notes(numbers: Mapping[str, Any], sides: list[str]) -> str:
    at, found = numbers["setting"], numbers["totals"]
    lines = []
    for side in sides:
        share, seconds = found[side]["import_share"], numbers["imports"][side]
        lines.append(
            f"imports of {NAMES[side]}: {seconds:.2f} s a run, {100 * share:.1f}% of its total"
        )
    stages = numbers["jobs"][0]["stages"]
    told = {name: mean(row["stages"][name] for row in numbers["jobs"]) for name in stages}
    means = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in told.items())
    lines += [
        f"stages of our runs by their own account, means: {means}",
        f"{at['parameters']:,} parameters, vocabulary {at['vocabulary']}, {at['pairs']} pairs "
        f"with prompts of {at['prompt'][0]} to {at['prompt'][1]} tokens and responses of "
        f"{at['completion'][0]} to {at['completion'][1]}, {at['batch_size']} per step; "
        f"{at['device']}, {at['threads']} threads, {at['precision']}",
        "ours: the training command with loss=spo, no held-out rows; reference log-probabilities "
        "from a cache that a run of one step has filled",
    ]
    if "trl" in sides:
        lines.append(
            "TRL: a script of DPOTrainer on the same files (it has no second level, so a weight "
            "is a run of DPO again), its reference log-probabilities precomputed once and cached "
            "like ours, no gradient checkpointing, no logging; the model saved at the end"
        )
    lines += [f"ours with {' '.join(at['train'])}"] * bool(at["train"])
    lines.append("seconds: wall-clock of each process from start to end, side by side in turns")
    return "\n".join(f"- {line}" for line in lines)
