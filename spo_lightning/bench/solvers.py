"""What each solver costs: ``python -m spo_lightning.bench what=solvers [key=value]``.

Time per outer step and memory at its peak, as ratios to a base solver on the same batches.
"""

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from spo_lightning.bench import asked, output
from spo_lightning.bench.measuring import peaks, rounds
from spo_lightning.bench.ours import Entry, Ours, Start, Watch, entry_of, start_of
from spo_lightning.config import knobs
from spo_lightning.data.load import load
from spo_lightning.errors import UserError


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Prepare once, then measure every solver from there; returns bench.json."""
    for key in line.touched:
        if key.split(".")[0] == "solver":
            where = "say it in solvers, as conf/what/solvers.yaml does"
            raise UserError(f"{key} has no effect: {where}")
    asked.refuse_strangers([cfg.base], "solvers", cfg.solvers, "base")
    runs = asked.entries(cfg, "solvers", cfg.base, composed)
    task = replace(load(cfg.data), held_out=[])
    entries = {name: entry_of(mine) for name, mine in runs.items()}
    stages = asked.begin(cfg, run_dir)
    start = start_of(cfg, task, stages)
    with tempfile.TemporaryDirectory(dir=run_dir) as room:
        place = Path(room) / "start.pt"  # through which the start comes to other processes
        torch.save(start, place)
        pairs = {name: (entries[cfg.base], entry) for name, entry in entries.items()}
        calls = {name: (cfg.hardware, partial(loaded, place, two)) for name, two in pairs.items()}
        taken = peaks(calls, cfg.warmup + cfg.steps, stages)
    made = {name: Ours(entry, start) for name, entry in entries.items()}
    made[cfg.base].run(1, Watch())  # what only the first ever loads
    seconds = rounds(cfg, made, stages)
    choices = {g: name for g, name in line.choices.items() if "solver" not in g and g != "what"}
    rows = ratios(seconds, taken, cfg.base)
    numbers = {
        "choices": choices,
        "setting": setting(cfg, start),
        "inner_share": inner_share(start),
        "base": cfg.base,
        "solvers": {n: row | {"overrides": list(cfg.solvers[n])} for n, row in rows.items()},
    }
    return output.written(numbers, table(numbers), run_dir)


def composed(words: list[str]) -> DictConfig:
    """This command line and a solver's own words."""
    settings = HydraConfig.get()
    return compose(settings.job.config_name, [*settings.overrides.task, *words])


def loaded(place: Path, entries: tuple[Entry, Entry]) -> tuple[Ours, Ours]:
    start = torch.load(place, weights_only=False)  # written just now, by ourselves
    return Ours(entries[0], start), Ours(entries[1], start)


def setting(cfg: DictConfig, start: Start) -> dict[str, Any]:
    """What the numbers were measured on."""
    pairs, weights = start.train.pairs, list(start.scorer.parameters())
    return asked.setting(
        cfg,
        "steps",
        "warmup",
        "repetitions",
        parameters=sum(p.numel() for p in weights),
        trainable=sum(p.numel() for p in weights if p.requires_grad),
        pairs_per_step=cfg.batch_size,
        pairs_per_forward=cfg.micro_batch_size,
        tokens_per_pair=sum(len(pair) for pair in pairs) / len(pairs),
    )


def inner_share(start: Start) -> float:
    """Tokens of a pass of the lower level over those of a pass of both levels."""
    pairs = start.train.pairs
    texts = pairs if start.lower is None else start.lower.pairs
    again = 0 if start.scorer.shared else 1  # the prompt of a pair is encoded twice
    below = sum(len(text.prompt) + len(text.chosen) for text in texts) / len(texts)
    return below * len(pairs) / sum(len(pair) + again * len(pair.prompt) for pair in pairs)


def ratios(
    seconds: Mapping[str, Sequence[float]], taken: Mapping[str, float], base: str
) -> dict[str, dict[str, Any]]:
    """Time over the base's in the same round, its median and extremes; memory over the base's."""
    found = {}
    for name, mine in seconds.items():
        time = output.ratio(mine, seconds[base])
        found[name] = {
            "seconds": list(mine),
            "time_ratio": time["median"],
            "time_ratio_min": time["min"],
            "time_ratio_max": time["max"],
            "memory_mib": taken[name],
            # 0 where the system cannot forget an earlier, higher peak
            "memory_ratio": taken[name] / taken[base] if taken[base] else None,
        }
    return found


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: what was measured on, then a row per solver."""
    at, base = numbers["setting"], numbers["base"]
    rows = [
        {
            "solver": name,
            "ms per step": f"{1000 * median(row['seconds']):.1f}",
            f"time over {base}": f"{row['time_ratio']:.3f}",
            "min to max": f"{row['time_ratio_min']:.3f} to {row['time_ratio_max']:.3f}",
            "MiB at the peak": f"{row['memory_mib']:.1f}",
            f"memory over {base}": ""
            if row["memory_ratio"] is None
            else f"{row['memory_ratio']:.2f}",
        }
        for name, row in numbers["solvers"].items()
    ]
    what = ", ".join(f"{group}={name}" for group, name in sorted(numbers["choices"].items()))
    lines = [
        f"{at['trainable']:,} of {at['parameters']:,} parameters train, {at['precision']}",
        f"{at['pairs_per_step']} pairs per step, {at['pairs_per_forward']} per forward, "
        f"{at['tokens_per_pair']:.1f} tokens each",
        f"a pass of the lower level has {numbers['inner_share']:.3f} of the tokens of a pass of "
        "both",
        f"{at['device']}, {at['threads']} threads",
        f"time: {at['steps']} steps, median of {at['repetitions']} rounds; ratios within a round",
        "memory: the peak above what was in use before the first step",
    ]
    return f"{what}\n\n{output.bullets(lines)}\n\n{output.table(rows)}\n"
