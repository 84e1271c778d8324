"""How soon a run trains: ``python -m spo_lightning.bench what=start``.

Per round, each in a process of its own: the bare imports, the command until the row of its first
step is in metrics.csv, and ``--help``. One run before them fills the caches.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from spo_lightning import __version__
from spo_lightning.bench import asked
from spo_lightning.bench.jobs import IMPORTS
from spo_lightning.bench.processes import clocked
from spo_lightning.bench.table import aligned, written
from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.records.progress import Stages

ROWS = {
    "imports": f"`{IMPORTS['ours']}`",
    "first_step": "the command to the end of its first step",
    "beyond": "beyond the imports",
    "help": "`--help`",
}


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse_below(cfg, "repetitions", 1, within=True)
    for word in cfg.run:
        if str(word).split("=")[0].lstrip("+") in ("max_steps", "hydra.run.dir"):
            raise UserError(f"run: {word} is said by the bench: leave it out")
    stages = asked.begin(cfg, run_dir)
    with tempfile.TemporaryDirectory(dir=run_dir) as room:
        rounds = timed(cfg, Path(room), stages)
    setting = {**asked.machine(cfg), "run": list(cfg.run), "spo_lightning": __version__}
    numbers = {"setting": setting, "rounds": rounds}
    written(numbers, table(numbers), run_dir)
    return numbers


def timed(cfg: DictConfig, room: Path, stages: Stages) -> list[dict[str, float]]:
    """Seconds of every round."""
    train = [sys.executable, "-m", "spo_lightning.train"]
    common = {"environment": dict(os.environ), "room": room, "stages": stages}

    def first_step(name: str) -> float:
        words = [*train, *cfg.run, "max_steps=1", f"hydra.run.dir={room / name}"]
        rows = room / name / "metrics.csv"
        return clocked(words, "the run", until=lambda: has_row(rows), **common)

    found = []
    with stages.stage("start", 1 + cfg.repetitions) as advance:
        first_step("warm")
        advance(1)
        for number in range(cfg.repetitions):
            imports = [sys.executable, "-c", IMPORTS["ours"]]
            row = {
                "imports": clocked(imports, "imports", **common),
                "first_step": first_step(str(number)),
                "help": clocked([*train, "--help"], "--help", **common),
            }
            found.append({**row, "beyond": row["first_step"] - row["imports"]})
            advance(1, ", ".join(f"{name} {value:.1f} s" for name, value in found[-1].items()))
    return found


def has_row(path: Path) -> bool:
    """Whether a csv file has a row below its head."""
    return path.exists() and path.read_bytes().count(b"\n") > 1


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a row per kind of process."""
    at, rounds = numbers["setting"], numbers["rounds"]
    rows = []
    for key, title in ROWS.items():
        values = [each[key] for each in rounds]
        rows.append([title, *(f"{v:.2f}" for v in (median(values), min(values), max(values)))])
    return (
        f"# How soon a run trains: {' '.join(at['run'])}\n\n"
        f"{aligned(['', 'seconds', 'least', 'most'], rows)}\n\n"
        f"- {at['device']}, {at['threads']} threads; median of {len(rounds)} rounds, warm caches\n"
    )
