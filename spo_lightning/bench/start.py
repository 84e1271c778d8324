"""How soon a run trains: ``python -m spo_lightning.bench what=start``.

Per round, each in a process of its own: the bare imports, the command until the row of its first
step is in metrics.csv, and ``--help``. One run before them fills the caches.
"""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo_lightning.bench import asked, output
from spo_lightning.config import knobs
from spo_lightning.errors import Diverged, UserError
from spo_lightning.records.progress import Stages

IMPORTS = {  # what every run of either loads before it does anything
    "ours": "import torch, transformers, datasets, lightning",
    "trl": "import torch, transformers, datasets, trl; trl.DPOTrainer, trl.DPOConfig",
}
POLL = 0.02  # seconds between two looks at what a process has done


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse(cfg, line, {"repetitions": 1})
    for word in cfg.run:
        if str(word).split("=")[0].lstrip("+") in ("max_steps", "hydra.run.dir"):
            raise UserError(f"run: {word} is said by the bench: leave it out")
    stages = asked.begin(cfg, run_dir)
    with tempfile.TemporaryDirectory(dir=run_dir) as room:
        rounds = timed(cfg, Path(room), stages)
    numbers = {"setting": asked.setting(cfg, "run"), "rounds": rounds}
    return output.written(numbers, table(numbers), run_dir)


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


def clocked(
    words: Sequence[str],
    what: str,
    *,
    environment: Mapping[str, str],
    room: Path,
    stages: Stages,
    until: Callable[[], bool] | None = None,
) -> float:
    """Wall-clock seconds of a process to its end, or to the first time that ``until`` holds.

    One that fails ends the measurement in one line; ``room`` takes what it says.
    """
    with open(room / "said.txt", "w+", encoding="utf-8") as said:
        began, reached = time.perf_counter(), None
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if reached is None and until is not None and until():
                reached = time.perf_counter() - began
            try:
                # looks cost time of the very process that is timed: none more than is needed
                process.wait(1.0 if until is None or reached else POLL)
            except subprocess.TimeoutExpired:
                if stages.stop.signal is not None:
                    process.terminate()
        taken = time.perf_counter() - began
        said.seek(0)
        lines = said.read().strip().splitlines() or [""]
    if stages.stop.signal is not None:
        raise stages.stop.raised(stages.how_to_go_on)
    if process.returncode:
        raise Diverged(f"{what}: its run ended with {process.returncode}: {lines[-1]}")
    return reached or taken


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a row per kind of process."""
    at, rounds = numbers["setting"], numbers["rounds"]
    titles = {
        "imports": f"`{IMPORTS['ours']}`",
        "first_step": "the command to the end of its first step",
        "beyond": "beyond the imports",
        "help": "`--help`",
    }
    rows = []
    for key, title in titles.items():
        found = output.extremes([each[key] for each in rounds])
        named = zip(("seconds", "least", "most"), found.values())
        rows.append({"": title, **{name: f"{value:.2f}" for name, value in named}})
    return (
        f"# How soon a run trains: {' '.join(at['run'])}\n\n"
        f"{output.table(rows)}\n\n"
        f"- {at['device']}, {at['threads']} threads; median of {len(rounds)} rounds, warm caches\n"
    )
