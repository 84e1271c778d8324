"""Whole runs, one after the other, ours beside TRL's: ``python -m spo_lightning.bench what=jobs``.

Every job is a process of its own, from files to a saved model; its wall-clock time is what counts.
"""

import json
import logging
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from spo_lightning import __version__
from spo_lightning.bench import asked, jobs_report, peer
from spo_lightning.bench.cell import Cell, as_text, drawn, save_model
from spo_lightning.bench.processes import clocked
from spo_lightning.bench.table import kept, written
from spo_lightning.config import knobs
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

IMPORTS = {  # what every run of either loads before it does anything
    "ours": "import torch, transformers, datasets, lightning",
    "trl": "import torch, transformers, datasets, trl; trl.DPOTrainer, trl.DPOConfig",
}
TIMES = 3  # the imports are timed


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse_models(line)
    for key in ("pairs", "steps"):
        asked.refuse_below(cfg, key, 1, within=True)
    for key in ("betas", "weights", "lr", "clip_norm"):
        asked.refuse_below(cfg, key, 0, within=False)
    cell = asked.cell_of(cfg)
    stages = asked.begin(cfg, run_dir)
    sides = ["ours", "trl"] if cfg.peer and peer.installed() else ["ours"]
    if cfg.peer and len(sides) == 1:
        log.warning("TRL is not installed: its runs are left out (pip install trl==1.16.0)")
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        bench = Jobs(cfg, cell, Path(place), stages)
        imports, rows = bench.imports(sides), []
        numbers = {"setting": setting(cfg, bench.parameters), "imports": imports, "jobs": rows}
        for row in bench.all(sides):
            rows.append(row)
            numbers["totals"] = totals(rows, imports, sides)
            kept(numbers, run_dir)
    written(numbers, jobs_report.table(numbers), run_dir)
    return numbers


@dataclass
class Jobs:
    """The files that all jobs share, and what runs one."""

    cfg: DictConfig
    cell: Cell
    room: Path
    stages: Stages

    def __post_init__(self) -> None:
        cfg, room = self.cfg, self.room
        self.model, self.rows = room / "model", room / "pairs.jsonl"
        self.parameters = save_model(self.model, cfg.model, cfg.vocabulary, cfg.seed)
        rows = as_text(drawn(self.cell, cfg.pairs, cfg.seed))
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        kept = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
        threads = cfg.hardware.threads
        own = {"OMP_NUM_THREADS": str(threads)} if threads else {}
        self.environment = {**kept, "HF_DATASETS_CACHE": str(room / "datasets"), **own}

    def imports(self, sides: Sequence[str]) -> dict[str, float]:
        """Seconds that the bare imports take: the median of a few, after one that warms up."""
        found = {}
        for side in sides:
            self.run([sys.executable, "-c", IMPORTS[side]], "imports")
            taken = [
                self.run([sys.executable, "-c", IMPORTS[side]], "imports") for _ in range(TIMES)
            ]
            found[side] = median(taken)
        return found

    def all(self, sides: list[str]) -> Iterator[dict[str, Any]]:
        """A row per beta and weight; before them a short run of each warms every cache."""
        cfg = self.cfg
        jobs = list(product(cfg.betas, cfg.weights))
        with self.stages.stage("jobs", (1 + len(jobs)) * len(sides)) as advance:
            for side in sides:
                seconds = self.one(side, "warm", *jobs[0], 1)
                advance(1, f"{side}, first: {seconds:.1f} s")
            for number, (beta, weight) in enumerate(jobs):
                row: dict[str, Any] = {"beta": beta, "weight": weight}
                for side in sides[number % 2 :] + sides[: number % 2]:
                    row[side] = self.one(side, str(number), beta, weight, cfg.steps)
                    advance(1, f"{side}, beta {beta}, weight {weight}: {row[side]:.1f} s")
                row["stages"] = self.told(str(number))
                yield row

    def one(self, side: str, name: str, beta: float, weight: float, steps: int) -> float:
        """Seconds of one run."""
        words = self.ours(name, beta, weight, steps)
        if side == "trl":
            words = self.trl(name, beta, steps)
        return self.run([sys.executable, "-m", *words], f"{side}, beta {beta}, weight {weight}")

    def ours(self, name: str, beta: float, weight: float, steps: int) -> list[str]:
        """The training command, without held-out rows."""
        cfg, hardware = self.cfg, self.cfg.hardware
        said = {
            "data": "pairs",
            "data.path": self.rows,
            "data.eval_fraction": 0,
            "model": "pretrained",
            "model.pretrained": self.model,
            "model.attention": cfg.model.attention,
            "model.dtype": cfg.model.dtype,
            "loss": "spo",
            "loss.beta": beta,
            "solver.weight": weight,
            "max_steps": steps,
            "max_length": self.cell.longest,
            "batch_size": cfg.batch_size,
            "clip_norm": cfg.clip_norm,
            "optimizer.lr": cfg.lr,
            "seed": cfg.seed,
            "eval.every_n_steps": 0,
            "checkpoint.every_n_steps": 0,
            "checkpoint.monitor": "null",
            "cache.dir": self.room / "cache",
            "hydra.run.dir": self.room / f"ours-{name}",
            "hardware.accelerator": hardware.accelerator,
            "hardware.precision": hardware.precision,
        }
        if hardware.threads:
            said["hardware.threads"] = hardware.threads
        return [
            "spo_lightning.train",
            *(f"{key}={value}" for key, value in said.items()),
            *cfg.train,
        ]

    def trl(self, name: str, beta: float, steps: int) -> list[str]:
        """A script of TRL's trainer on the same files."""
        cfg = self.cfg
        settings = {
            "output_dir": str(self.room / f"trl-{name}"),
            "beta": beta,
            "max_length": self.cell.longest,
            "max_steps": steps,
            "per_device_train_batch_size": cfg.batch_size,
            "learning_rate": cfg.lr,
            "weight_decay": 0.0,
            "max_grad_norm": cfg.clip_norm,
            "bf16": cfg.hardware.precision.startswith("bf16"),
            "use_cpu": cfg.hardware.accelerator == "cpu",
            "seed": cfg.seed,
        }
        words = {
            "model": str(self.model),
            "rows": str(self.rows),
            "dtype": cfg.model.dtype,
            "threads": cfg.hardware.threads,
            "settings": settings,
        }
        return ["spo_lightning.bench.peer", json.dumps(words)]

    def told(self, name: str) -> dict[str, float]:
        """What our run says of its own stages, in seconds."""
        path = self.room / f"ours-{name}" / "metrics.json"
        return json.loads(path.read_text(encoding="utf-8"))["seconds"]

    def run(self, words: Sequence[str], what: str) -> float:
        how = {"environment": self.environment, "room": self.room, "stages": self.stages}
        return clocked(words, what, **how)


def totals(
    rows: Sequence[Mapping[str, Any]], imports: Mapping[str, float], sides: Sequence[str]
) -> dict[str, Any]:
    """Seconds of all jobs, the share that is imports, and TRL's over ours."""
    found: dict[str, Any] = {}
    for side in sides:
        whole = sum(row[side] for row in rows)
        share = len(rows) * imports[side] / whole
        found[side] = {"seconds": whole, "import_share": share}
    if "trl" in found:
        found["trl_over"] = found["trl"]["seconds"] / found["ours"]["seconds"]
        each = [row["trl"] / row["ours"] for row in rows]
        found["trl_over_job"] = {"min": min(each), "max": max(each)}
    return found


def setting(cfg: DictConfig, parameters: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        **asked.machine(cfg),
        "parameters": parameters,
        **{key: cfg[key] for key in ("vocabulary", "pairs", "steps", "batch_size")},
        **{key: list(cfg[key]) for key in ("prompt", "completion", "train")},
        "spo_lightning": __version__,
    }
