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
from statistics import mean, median
from typing import Any

from omegaconf import DictConfig

from spo_lightning.bench import asked, output, peer
from spo_lightning.bench.cell import Cell, as_text, drawn, save_model
from spo_lightning.bench.contestants import CONTESTANTS
from spo_lightning.bench.start import IMPORTS, clocked
from spo_lightning.config import knobs
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

TIMES = 3  # the imports are timed


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    least = {"vocabulary": 8, "pairs": 1, "steps": 1}
    asked.refuse(cfg, line, least, ("betas", "weights", "lr", "clip_norm"))
    cell = asked.cell_of(cfg)
    stages = asked.begin(cfg, run_dir)
    sides = ["ours", "trl"] if cfg.peer and CONTESTANTS["trl"].installed else ["ours"]
    if cfg.peer and len(sides) == 1:
        log.warning("TRL is not installed: its runs are left out (pip install trl==1.16.0)")
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        jobs = Jobs(cfg, cell, Path(place), stages)
        keys = ("vocabulary", "pairs", "steps", "batch_size", "prompt", "completion", "train")
        imports, rows = jobs.imports(sides), []
        setting = asked.setting(cfg, *keys, parameters=jobs.parameters)
        numbers = {"setting": setting, "imports": imports, "jobs": rows}
        for row in jobs.all(sides):
            rows.append(row)
            numbers["totals"] = totals(rows, imports, sides)
            output.kept(numbers, run_dir)
    return output.written(numbers, table(numbers), run_dir)


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
            words = [sys.executable, "-c", IMPORTS[side]]
            _, *taken = (self.run(words, "imports") for _ in range(1 + TIMES))
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
                told = self.room / f"ours-{number}" / "metrics.json"  # of its own stages
                row["stages"] = json.loads(told.read_text(encoding="utf-8"))["seconds"]
                yield row

    def one(self, side: str, name: str, beta: float, weight: float, steps: int) -> float:
        """Seconds of one run."""
        words = self.ours(name, beta, weight, steps)
        if side == "trl":
            words = self.trl(name, beta, steps)
        return self.run([sys.executable, "-m", *words], f"{side}, beta {beta}, weight {weight}")

    def run(self, words: Sequence[str], what: str) -> float:
        how = {"environment": self.environment, "room": self.room, "stages": self.stages}
        return clocked(words, what, **how)

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
        words = [f"{key}={value}" for key, value in said.items()]
        return ["spo_lightning.train", *words, *cfg.train]

    def trl(self, name: str, beta: float, steps: int) -> list[str]:
        """A script of TRL's trainer on the same files."""
        cfg = self.cfg
        words = {
            "model": str(self.model),
            "rows": str(self.rows),
            "dtype": cfg.model.dtype,
            "threads": cfg.hardware.threads,
            "settings": peer.settings(
                cfg,
                output_dir=str(self.room / f"trl-{name}"),
                beta=beta,
                learning_rate=cfg.lr,
                max_length=self.cell.longest,
                use_cpu=cfg.hardware.accelerator == "cpu",
                max_steps=steps,
                weight_decay=0.0,
            ),
        }
        return ["spo_lightning.bench.peer", json.dumps(words)]


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


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a row per job, the totals, then what was run."""
    at, found, jobs = numbers["setting"], numbers["totals"], numbers["jobs"]
    titles = {n: kind.title for n, kind in CONTESTANTS.items() if n in found}
    whole = {"beta": "all", "weight": "", **{side: found[side]["seconds"] for side in titles}}
    rows = []
    for job in [*jobs, whole]:
        row = {"beta": job["beta"], "weight": job["weight"]}
        row |= {f"{title}, s": f"{job[side]:.1f}" for side, title in titles.items()}
        if "trl" in titles:
            row["TRL / ours"] = f"{job['trl'] / job['ours']:.2f}"
        rows.append(row)
    lines = [
        f"imports of {title}: {numbers['imports'][side]:.2f} s a run, "
        f"{100 * found[side]['import_share']:.1f}% of its total"
        for side, title in titles.items()
    ]
    told = {name: mean(job["stages"][name] for job in jobs) for name in jobs[0]["stages"]}
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
    if "trl" in titles:
        lines.append(
            "TRL: a script of DPOTrainer on the same files (it has no second level, so a weight "
            "is a run of DPO again), its reference log-probabilities precomputed once and cached "
            "like ours, no gradient checkpointing, no logging; the model saved at the end"
        )
    lines += [f"ours with {' '.join(at['train'])}"] * bool(at["train"])
    lines.append("seconds: wall-clock of each process from start to end, side by side in turns")
    parts = [f"# {len(jobs)} jobs of {at['steps']} steps", output.table(rows)]
    return "\n\n".join([*parts, output.bullets(lines)]) + "\n"
