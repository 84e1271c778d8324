"""One outer step, ours beside a floor and TRL's: ``python -m spo_lightning.bench what=step``.

Per shape and vocabulary: first, that ours and TRL's run the same losses; then seconds per step in
interleaved rounds, and memory at its peak in a process of its own.
"""

import gc
import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import geometric_mean, median
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from spo_lightning import __version__
from spo_lightning.bench import asked, output
from spo_lightning.bench.cell import Cell, save_model
from spo_lightning.bench.contestants import CONTESTANTS, Contestant, flops, race_of, twice
from spo_lightning.bench.measuring import above, peaks, rounds
from spo_lightning.bench.ours import Ours, Watch
from spo_lightning.config import knobs
from spo_lightning.errors import Diverged, UserError
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

PEERS = ("trl", "liger")


class Ratio(NamedTuple):
    """What one contestant takes over another, as it is told and drawn."""

    key: str  # in bench.json
    mine: str
    other: str
    words: str  # how it is told
    colour: str
    quantity: str = "time"
    worst: Callable[[Sequence[float]], float] = min  # of the cells
    digits: int = 2  # in the table
    levels: tuple[float, ...] = (1.0,)  # to compare with in the picture
    lowest: float = 0.0  # of the picture's axis

    @property
    def title(self) -> str:
        return f"{CONTESTANTS[self.mine].title} / {CONTESTANTS[self.other].title}"


RATIOS = (
    Ratio(
        "over_floor",
        "ours",
        "floor",
        "Ours over the floor",
        output.BLUE,
        worst=max,
        digits=3,
        levels=(1.0, 1.1),
        lowest=0.95,
    ),
    Ratio("trl_over", "trl", "ours", "TRL over ours", output.RED),
    Ratio("liger_over", "liger", "ours", "TRL + Liger over ours", output.PINK),
)
MEMORY = Ratio("memory_over_trl", "ours", "trl", "", output.GREEN, quantity="memory")


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json, table.md and the picture; returns bench.json."""
    names = list(cfg.contestants)
    if not names or any(name not in CONTESTANTS for name in names):
        raise UserError(f"contestants={names}: some of {', '.join(CONTESTANTS)}, in a list")
    if "ours" not in names:
        raise UserError("contestants: ours must be among them, as it draws the pairs")
    given = () if cfg.peak_flops is None else ("peak_flops",)
    positive = ("tolerance", "lr", "beta", "clip_norm", *given)
    asked.refuse(cfg, line, {"vocabularies": 8, "trajectory": 1}, positive, adapters=True)
    cells, mine = cells_of(cfg), asked.trained(cfg)
    absent = [name for name in names if not CONTESTANTS[name].installed]
    names = [name for name in names if name not in absent]
    for name in absent:
        needs = " and ".join(CONTESTANTS[name].needs)
        log.warning("%s is left out, as not all of %s is installed", name, needs)
    stages = asked.begin(cfg, run_dir)
    found: list[dict[str, Any]] = []
    numbers = {"setting": setting(cfg, names, absent), "cells": found, "mean": {}}
    for number, cell in enumerate(cells, 1):
        log.info("Cell %d/%d: %s", number, len(cells), cell.name)
        with tempfile.TemporaryDirectory(dir=run_dir) as room:
            found.append(measured(cfg, mine, cell, names, Path(room), stages))
        numbers["mean"] = means(found)
        output.kept(numbers, run_dir)
    return output.written(numbers, table(numbers), run_dir, picture(numbers, run_dir))


def cells_of(cfg: DictConfig) -> list[Cell]:
    """Every shape at every vocabulary."""
    asked.refuse_strangers(cfg.only or (), "shapes", cfg.shapes, "only")
    spans = {
        name: [asked.span(sides[key], f"shapes.{name}.{key}") for key in ("prompt", "completion")]
        for name, sides in ((name, cfg.shapes[name]) for name in cfg.only or cfg.shapes)
    }
    return [Cell(name, size, *sides) for name, sides in spans.items() for size in cfg.vocabularies]


def setting(cfg: DictConfig, names: Sequence[str], absent: Sequence[str]) -> dict[str, Any]:
    """What the numbers were measured on."""
    others = sorted({package for name in names for package in CONTESTANTS[name].needs})
    return {
        **asked.machine(cfg),
        "contestants": list(names),
        "left_out": list(absent),
        **{key: cfg[key] for key in ("steps", "warmup", "repetitions", "trajectory", "tolerance")},
        "pairs_per_step": cfg.batch_size,
        "peak_flops": cfg.peak_flops,
        "train": list(cfg.train),
        "versions": {
            "spo_lightning": __version__,
            **{name: version(name) for name in ("torch", "transformers", *others)},
        },
    }


# -- one cell


def measured(
    cfg: DictConfig,
    mine: DictConfig,
    cell: Cell,
    names: Sequence[str],
    room: Path,
    stages: Stages,
) -> dict[str, Any]:
    """All numbers of one cell."""
    race = race_of(cfg, mine, cell, room)
    parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed, race.device)
    ours = Ours.on(race.cfg, race.pairs)
    watched = ours.logging()
    losses = watched.run(max(cfg.trajectory, cfg.warmup + cfg.steps), Watch())[: cfg.trajectory]
    # what our run has drawn, the others are given in the same order
    race = replace(race, order=tuple(watched.rows))
    made: dict[str, Contestant] = {"ours": ours}
    del ours, watched
    apart = [["ours"], *([name] for name in names if name != "ours")]
    seconds: dict[str, list[float]] = {}
    memory: dict[str, float] = {}
    differences = []
    for group in apart if cfg.apart else [names]:
        made |= {name: CONTESTANTS[name].make(race) for name in group if name not in made}
        differences += [
            agree(cell, losses, made[name].run(cfg.trajectory, Watch()), cfg.tolerance)
            for name in PEERS
            if name in group
        ]
        ready = {name: made[name] for name in group}
        seconds |= rounds(cfg, ready, stages, title=f"time ({cell.name})")
        if cfg.memory and race.device.type == "cuda":  # which counts its memory by the byte
            memory |= {name: above(one, cfg.warmup + cfg.steps) for name, one in ready.items()}
        made.clear()
        ready.clear()
        gc.collect()
        torch.cuda.empty_cache()
    if cfg.memory and race.device.type != "cuda":
        calls = {name: (race.cfg.hardware, partial(twice, race, name)) for name in names}
        memory = peaks(calls, cfg.warmup + cfg.steps, stages)
    timed = race.drawn[cfg.warmup * cfg.batch_size : (cfg.warmup + cfg.steps) * cfg.batch_size]
    numbers = {
        "shape": cell.shape,
        "vocabulary": cell.vocabulary,
        "parameters": parameters,
        "unique_tokens": sum(map(len, timed)) / cfg.steps,
        "scored_tokens": sum(len(p.chosen) + len(p.rejected) for p in timed) / cfg.steps,
        "trajectory_difference": max(differences, default=None),
        "losses": losses,
        **compared(seconds, memory),
        "seconds": seconds,
        "memory_mib": memory,
    }
    if cfg.peak_flops is not None:
        work = flops(race, timed) / cfg.steps
        numbers["utilisation"] = {n: work / median(s) / cfg.peak_flops for n, s in seconds.items()}
    told = [f"{CONTESTANTS[n].title} {1000 * median(s):.1f} ms" for n, s in seconds.items()]
    told += [f"{r.title} {output.spread(numbers[r.key])}" for r in RATIOS if r.key in numbers]
    log.info("%s: %s", cell.name, ", ".join(told))
    return numbers


def agree(cell: Cell, ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> float:
    """The largest difference of the losses of two runs; one above ``tolerance`` ends this one."""
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    worst = max(apart)
    if not worst <= tolerance:  # so that nan ends it too
        raise Diverged(
            f"{cell.name}: our losses and TRL's differ by {worst:.2g} in step "
            f"{apart.index(worst) + 1} of {len(apart)} (tolerance {tolerance:g}): what they "
            "cost cannot be compared"
        )
    log.info("%s: our losses and TRL's differ by %.1e over %d steps", cell.name, worst, len(apart))
    return worst


def compared(
    seconds: Mapping[str, Sequence[float]], memory: Mapping[str, float]
) -> dict[str, Any]:
    """Every ratio in time of those that ran, and ours over TRL in memory."""
    found: dict[str, Any] = {
        each.key: output.ratio(seconds[each.mine], seconds[each.other])
        for each in RATIOS
        if {each.mine, each.other} <= seconds.keys()
    }
    if memory.get("trl", 0) > 0:  # 0 where the system cannot forget an earlier, higher peak
        found[MEMORY.key] = memory["ours"] / memory["trl"]
    return found


def means(cells: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric means over the cells of the ratios of time, and each one's worst cell."""
    numbers = {}
    for key, worst in ((each.key, each.worst) for each in RATIOS):
        middles = [cell[key]["median"] for cell in cells if key in cell]
        if middles:
            numbers |= {key: geometric_mean(middles), f"{key}_worst": worst(middles)}
    return numbers


# -- what is shown


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: times, rates and memory, then what they were measured on and what they mean."""
    at, mean = numbers["setting"], numbers["mean"]
    titles = {name: CONTESTANTS[name].title for name in at["contestants"]}
    times, rates, memory = [], [], []
    for cell in numbers["cells"]:
        where = {"shape": cell["shape"], "vocabulary": cell["vocabulary"]}
        tokens, mib = cell["unique_tokens"], cell["memory_mib"]
        seconds = {title: median(cell["seconds"][name]) for name, title in titles.items()}
        row = {"unique tokens": f"{tokens:.0f}", "scored": f"{cell['scored_tokens']:.0f}"}
        row |= {f"{title}, ms": f"{1000 * s:.1f}" for title, s in seconds.items()}
        shown = [each for each in RATIOS if each.key in cell]
        row |= {each.title: output.spread(cell[each.key], each.digits) for each in shown}
        if cell["trajectory_difference"] is not None:
            row["losses differ by"] = f"{cell['trajectory_difference']:.1e}"
        times.append(where | row)
        pairs = at["pairs_per_step"]
        row = {f"{title}, pairs/s": f"{pairs / s:.2f}" for title, s in seconds.items()}
        row |= {f"{title}, unique tokens/s": f"{tokens / s:.0f}" for title, s in seconds.items()}
        for name, share in cell.get("utilisation", {}).items():
            row[f"{titles[name]}, utilisation"] = f"{share:.3f}"
        rates.append(where | row)
        if mib:
            row = {f"{title}, MiB": f"{mib[name]:.0f}" for name, title in titles.items()}
            if "trl" in mib:
                row[MEMORY.title] = f"{cell[MEMORY.key]:.2f}" if MEMORY.key in cell else ""
            memory.append(where | row)
    said = [
        f"{each.words}: geometric mean {mean[each.key]:.{each.digits}f}, at "
        f"{'most' if each.worst is max else 'least'} "
        f"{mean[f'{each.key}_worst']:.{each.digits}f} in a cell."
        for each in RATIOS
        if each.key in mean
    ]
    parts = ["# One outer step of DPO", output.table(times), " ".join(said), output.table(rates)]
    parts += [output.table(memory)] if memory else []
    return "\n\n".join(part for part in [*parts, output.bullets(notes(numbers))] if part) + "\n"


def notes(numbers: Mapping[str, Any]) -> list[str]:
    at, cells = numbers["setting"], numbers["cells"]
    sizes = sorted({cell["parameters"] for cell in cells})
    versions = ", ".join(f"{name} {number}" for name, number in at["versions"].items())
    lines = [
        f"{at['device']}, {at['threads']} threads, {at['precision']}; {versions}",
        f"{' to '.join(f'{size:,}' for size in dict.fromkeys((sizes[0], sizes[-1])))} parameters, "
        f"{at['pairs_per_step']} pairs per step, the same pairs in the same order",
        f"time: {at['steps']} steps after {at['warmup']}, median of {at['repetitions']} rounds "
        "(least..most); ratios within a round. From the batch at hand to the weights moved",
        "unique tokens: prompt once, both responses; rates count those, for every contestant",
    ]
    if at["train"]:
        lines.append(f"ours with {' '.join(at['train'])}")
    if any(cell["trajectory_difference"] is not None for cell in cells):
        lines.append(
            f"losses differ by: the largest difference over the first {at['trajectory']} steps "
            f"(above {at['tolerance']:g} the measurement ends)"
        )
    if any(cell["memory_mib"] for cell in cells):
        apart = ", in a process each" if at["device"] == "cpu" else ""
        lines.append(
            "memory: the peak above what was in use before the first step (weights and data; "
            f"gradients and the optimizer's memory count){apart}"
        )
    ran = [kind for name, kind in CONTESTANTS.items() if name in at["contestants"]]
    lines += [kind.note for kind in ran if kind.note]
    absent = [CONTESTANTS[name].title for name in at["left_out"]]
    return lines + [f"{title} is left out: it is not installed here" for title in absent]


def picture(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """step.svg and step.png: a row per ratio, a panel per shape, a dot with extremes per cell."""
    cells = numbers["cells"]
    shapes = list(dict.fromkeys(cell["shape"] for cell in cells))
    rows = [r for r in (*RATIOS, MEMORY) if any(r.key in cell for cell in cells)]
    panels = []
    for ratio in rows:
        across = []
        for shape in shapes:
            mine = [cell for cell in cells if cell["shape"] == shape and ratio.key in cell]
            sizes = [cell["vocabulary"] for cell in mine]
            found = [cell[ratio.key] for cell in mine]
            values = [v if isinstance(v, dict) else output.extremes([v]) for v in found]
            axes = {
                "xticks": range(len(mine)),
                "xticklabels": [f"{n // 1024}k" if n % 1024 == 0 else f"{n:,}" for n in sizes],
                "xlim": (-0.5, max(len(mine), 1) - 0.3),
                "title": shape if ratio is rows[0] else "",
                "xlabel": "vocabulary" if ratio is rows[-1] else "",
                "ylabel": "" if across else f"{ratio.quantity}, {ratio.title}",
            }
            panel = output.Panel(range(len(mine)), values, ratio.colour, axes)
            across.append(panel._replace(levels=ratio.levels, lowest=ratio.lowest))
        panels.append(across)
    if not panels:
        return []
    title = "One outer step of DPO: median and extremes of the rounds"
    size = (1.6 + 2.2 * max(2, len(shapes)), 0.8 + 1.9 * len(rows))
    return output.draw(panels, title, size=size, directory=directory, name="step")
