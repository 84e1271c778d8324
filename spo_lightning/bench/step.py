"""One outer step, ours beside a floor and TRL's: ``python -m spo_lightning.bench what=step``.

Per shape and vocabulary: first, that ours and TRL's run the same losses; then seconds per step in
interleaved rounds, and memory at its peak in a process of its own.
"""

import gc
import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from spo_lightning import __version__
from spo_lightning.bench import asked, peer, step_report
from spo_lightning.bench.cell import Cell, drawn, save_model
from spo_lightning.bench.contestants import CONTESTANTS, Contestant, Race
from spo_lightning.bench.costs import Clock
from spo_lightning.bench.memory import MIB, Memory, apart, can_forget, settle
from spo_lightning.bench.table import geometric_mean, kept, ratio, written
from spo_lightning.config import knobs
from spo_lightning.errors import Diverged, UserError
from spo_lightning.records import progress
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

PEERS = peer.NEEDS.keys()
SIDES = ("prompt", "completion")
FEWEST = {"vocabularies": 8, "trajectory": 1}
AGAIN = 4  # steps after which the pairs come again, so that losses fall


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json, table.md and the picture; returns bench.json."""
    refuse(cfg, line)
    wanted, mine = cells(cfg.shapes, cfg.vocabularies, cfg.only), asked.trained(cfg)
    names = [name for name in cfg.contestants if peer.installed(name)]
    absent = [name for name in cfg.contestants if name not in names]
    for name in absent:
        log.warning(
            "%s is left out, as not all of %s is installed", name, " and ".join(peer.NEEDS[name])
        )
    stages = asked.begin(cfg, run_dir)
    found = []
    numbers = {"setting": setting(cfg, names, absent), "cells": found, "mean": {}}
    for number, cell in enumerate(wanted, 1):
        log.info("Cell %d/%d: %s", number, len(wanted), cell.name)
        with tempfile.TemporaryDirectory(dir=run_dir) as room:
            found.append(measured(cfg, mine, cell, names, Path(room), stages))
        numbers["mean"] = means(found)
        kept(numbers, run_dir)
    written(numbers, step_report.table(numbers), run_dir, step_report.picture(numbers, run_dir))
    return numbers


def refuse(cfg: DictConfig, line: knobs.Given) -> None:
    """What this question cannot be asked with."""
    asked.refuse_models(line)
    unknown = [name for name in cfg.contestants if name not in CONTESTANTS]
    if unknown or not cfg.contestants:
        raise UserError(
            f"contestants={list(cfg.contestants)}: some of {', '.join(CONTESTANTS)}, in a list"
        )
    if "ours" not in cfg.contestants:
        raise UserError("contestants: ours must be among them, as it draws the pairs")
    for key in ("vocabularies", "trajectory"):
        asked.refuse_below(cfg, key, FEWEST[key], within=True)
    for key in ("tolerance", "lr", "beta", "clip_norm"):
        asked.refuse_below(cfg, key, 0, within=False)
    if cfg.peak_flops is not None:
        asked.refuse_below(cfg, "peak_flops", 0, within=False)


def cells(
    shapes: DictConfig, vocabularies: Sequence[int], only: Sequence[str] | None
) -> list[Cell]:
    """Every shape at every vocabulary."""
    for name in only or ():
        if name not in shapes:
            raise UserError(f"only: {name} is none of shapes: choose from {', '.join(shapes)}")
    found = {
        name: [asked.span(shapes[name][key], f"shapes.{name}.{key}") for key in SIDES]
        for name in only or shapes
    }
    return [
        Cell(str(name), size, *sides) for name, sides in found.items() for size in vocabularies
    ]


def measured(
    cfg: DictConfig,
    mine: DictConfig,
    cell: Cell,
    names: Sequence[str],
    room: Path,
    stages: Stages,
) -> dict[str, Any]:
    """All numbers of one cell."""
    device = asked.device_of(cfg)
    parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed, device)
    longest = max(cfg.trajectory, cfg.warmup + cfg.steps)
    pairs = drawn(cell, AGAIN * cfg.batch_size, cfg.seed)
    flat = asked.settled(mine, room / "model", cell, room)
    race = Race(flat, room / "model", pairs, (), device)
    made: dict[str, Contestant] = {"ours": CONTESTANTS["ours"](race)}
    watched = made["ours"].logging()  # type: ignore[attr-defined]
    losses = watched.run(longest, Nothing())
    race = replace(race, order=tuple(watched.rows))
    for name in names:
        made.setdefault(name, CONTESTANTS[name](race))
    progress.quiet()  # what was imported since
    differences = []
    for name in PEERS & made.keys():
        theirs = made[name].run(cfg.trajectory, Nothing())
        differences.append(agree(cell, losses[: cfg.trajectory], theirs, cfg.tolerance))
    seconds = rounds(cfg, cell, {name: made[name] for name in names}, stages)
    memory_mib = peaks(cfg, race, made, names, stages) if cfg.memory else {}
    timed = race.drawn[cfg.warmup * cfg.batch_size : (cfg.warmup + cfg.steps) * cfg.batch_size]
    counted = {
        "shape": cell.shape,
        "vocabulary": cell.vocabulary,
        "parameters": parameters,
        "unique_tokens": sum(map(len, timed)) / cfg.steps,
        "scored_tokens": sum(len(p.chosen) + len(p.rejected) for p in timed) / cfg.steps,
        "trajectory_difference": max(differences, default=None),
        "losses": losses[: cfg.trajectory],
    }
    numbers = counted | compared(seconds, memory_mib)
    numbers |= {"seconds": seconds, "memory_mib": memory_mib}
    if cfg.peak_flops is not None:
        work = flops(race, timed) / cfg.steps
        numbers["utilisation"] = {n: work / median(s) / cfg.peak_flops for n, s in seconds.items()}
    log.info("%s: %s", cell.name, step_report.line(numbers))
    return numbers


class Nothing:
    """A watch that looks away."""

    def begin(self) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Seconds(Clock):
    """A watch of the clock."""

    def begin(self) -> None: ...


class Peak(Nothing):
    """A watch of memory, from before the first step."""

    def __init__(self) -> None:
        self.memory = Memory()

    def begin(self) -> None:
        self.memory.start()


def agree(cell: Cell, ours: Sequence[float], theirs: Sequence[float], tolerance: float) -> float:
    """The largest difference of the losses of two runs; one above ``tolerance`` ends this one."""
    apart = [abs(one - other) for one, other in zip(ours, theirs, strict=True)]
    worst = max(apart)
    if not worst <= tolerance:
        raise Diverged(
            f"{cell.name}: our losses and TRL's differ by {worst:.2g} in step "
            f"{apart.index(worst) + 1} of {len(apart)} (tolerance {tolerance:g}): what they "
            "cost cannot be compared"
        )
    log.info("%s: our losses and TRL's differ by %.1e over %d steps", cell.name, worst, len(apart))
    return worst


def rounds(
    cfg: DictConfig, cell: Cell, made: Mapping[str, Contestant], stages: Stages
) -> dict[str, list[float]]:
    """Seconds per step, one per repetition; every round starts one contestant later."""
    names = list(made)
    found: dict[str, list[float]] = {name: [] for name in names}
    with stages.stage(f"time ({cell.name})", cfg.repetitions * len(names)) as advance:
        for number in range(cfg.repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                clock = Seconds()
                made[name].run(cfg.warmup + cfg.steps, clock)
                found[name].append(sum(clock.seconds[cfg.warmup :]) / cfg.steps)
                advance(1, f"{name} {1000 * found[name][-1]:.1f} ms")
    return found


def peaks(
    cfg: DictConfig,
    race: Race,
    made: dict[str, Contestant],
    names: Sequence[str],
    stages: Stages,
) -> dict[str, float]:
    """MiB by contestant. A GPU's memory is counted by the byte; a CPU's is what its process holds,
    so that each has one of its own, and ``made`` is given up before."""
    steps = cfg.warmup + cfg.steps
    if race.device.type == "cuda":
        return {name: above(made[name], steps) for name in names}
    made.clear()
    gc.collect()
    calls = {name: (peak, race, name, steps) for name in names}
    return apart(calls, stages, shown=lambda mib: f"{mib:.0f} MiB")


def peak(race: Race, name: str, steps: int) -> float:
    """MiB of one contestant's steps, once a step has loaded the code. In a process of its own."""
    settle(race.cfg.hardware)
    made = CONTESTANTS[name](race)
    progress.quiet()
    if can_forget():  # else this run's peak would hide the other's
        made.run(1, Nothing())
    return above(made, steps)


def above(contestant: Contestant, steps: int) -> float:
    """MiB at the peak of so many steps, above what was in use before the first."""
    watch = Peak()
    contestant.run(steps, watch)
    return watch.memory.above() / MIB


def compared(
    seconds: Mapping[str, Sequence[float]], memory: Mapping[str, float]
) -> dict[str, Any]:
    """Ours over the floor and TRL over ours in time, ours over TRL in memory."""
    found: dict[str, Any] = {}
    if "floor" in seconds:
        found["over_floor"] = ratio(seconds["ours"], seconds["floor"])
    for name in PEERS & seconds.keys():
        found[f"{name}_over"] = ratio(seconds[name], seconds["ours"])
    if memory.get("trl", 0) > 0:  # 0 where the system cannot forget an earlier, higher peak
        found["memory_over_trl"] = memory["ours"] / memory["trl"]
    return found


def means(found: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Geometric means over the cells of the ratios of time, and each one's worst cell."""
    numbers = {}
    for name, worst in (("over_floor", max), ("trl_over", min), ("liger_over", min)):
        each = [cell[name]["median"] for cell in found if name in cell]
        if each:
            numbers |= {name: geometric_mean(each), f"{name}_worst": worst(each)}
    return numbers


def flops(race: Race, pairs: Sequence[Any]) -> float:
    """Of the model, forward and backward (three forwards), over unique tokens.

    Two per weight of the body and token, two per weight of the head and scored token, and four
    per layer, width and attended position; nothing for recomputation, padding or masked ones.
    """
    lm = race.opened()
    config, head = lm.config, lm.get_output_embeddings().weight.numel()
    embedding = lm.get_input_embeddings().weight
    tied = lm.get_output_embeddings().weight is embedding
    body = sum(p.numel() for p in lm.parameters()) - embedding.numel() - (0 if tied else head)
    total = 0.0
    for pair in pairs:
        p, sides = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        attended = p * (p + 1) / 2 + sum(r * p + r * (r + 1) / 2 for r in sides)
        total += 2 * body * len(pair) + 2 * head * sum(sides)
        total += 4 * config.num_hidden_layers * config.hidden_size * attended
    return 3 * total


def setting(cfg: DictConfig, names: Sequence[str], absent: Sequence[str]) -> dict[str, Any]:
    """What the numbers were measured on."""
    others = sorted({package for name in names for package in peer.NEEDS.get(name, ())})
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
