"""How our step grows with its tokens and the data: ``python -m spo_lightning.bench what=growth``.

Time is taken from the end of one step to the end of the next, so that whatever a larger data set
costs between steps shows.
"""

import random
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning import __version__
from spo_lightning.bench import asked, growth_report
from spo_lightning.bench.cell import Cell, drawn, save_model
from spo_lightning.bench.contestants import Ours, Race
from spo_lightning.bench.table import fitted, written
from spo_lightning.config import knobs
from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.records import progress
from spo_lightning.records.progress import Stages

POOL = 1 << 16  # random tokens of which every generated text is a stretch


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json, table.md and the picture; returns bench.json."""
    asked.refuse_models(line)
    for key in ("sizes", "counts"):
        asked.refuse_below(cfg, key, 1, within=True)
    for key in ("lr", "beta"):
        asked.refuse_below(cfg, key, 0, within=False)
    cell, mine = asked.cell_of(cfg), asked.trained(cfg)
    stages = asked.begin(cfg, run_dir)
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        room = Path(place)
        parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed)
        flat = asked.settled(mine, room / "model", cell, room)
        ours = Ours(Race(flat, room / "model", drawn(cell, 2, cfg.seed), (), asked.device_of(cfg)))
        progress.quiet()
        runs = {("tokens", size): ours_on(ours, cell, max(cfg.counts), size) for size in cfg.sizes}
        runs |= {("pairs", n): ours_on(ours, cell, n, cfg.batch_size) for n in cfg.counts}
        found = timed(cfg, runs, stages)
    numbers = {"setting": setting(cfg, parameters)}
    for axis, by in (("tokens", "tokens"), ("pairs", "pairs")):
        rows = [row for row in found if row["axis"] == axis]
        per = 1.0 if axis == "tokens" else None
        numbers[axis] = {"rows": rows, "fit": fit(rows, by, per)}
    written(
        numbers, growth_report.table(numbers), run_dir, growth_report.picture(numbers, run_dir)
    )
    return numbers


class Generated(Sequence):
    """``count`` pairs that exist only while they are looked at, each a function of its place."""

    def __init__(self, cell: Cell, count: int, seed: int):
        self.cell, self.size, self.seed = cell, count, seed
        chance, self.words = random.Random(seed), cell.vocabulary - 2
        self.pool = tuple(chance.randrange(self.words) for _ in range(POOL))

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, place: Any) -> Any:
        if not 0 <= place < self.size:
            raise IndexError(place)
        chance = random.Random(self.seed * 1_000_003 + place)
        prompt, chosen, rejected = (
            self._text(chance, *span)
            for span in (self.cell.prompt, self.cell.completion, self.cell.completion)
        )
        end = (self.words,)
        return Pair(prompt, chosen[:-1] + end, rejected[:-1] + end, row=place)

    def _text(self, chance: random.Random, least: int, most: int) -> tuple[int, ...]:
        begins, length = chance.randrange(POOL - most), chance.randint(least, most)
        return self.pool[begins : begins + length]


class References(Sequence):
    """A reference for every generated pair; what it says costs no time, so it says zero."""

    def __init__(self, pairs: Generated):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: Any) -> Any:
        pair = self.pairs[place]
        return torch.zeros(len(pair.chosen) + len(pair.rejected))


def ours_on(ours: Ours, cell: Cell, count: int, size: int) -> Ours:
    """Our run on ``count`` generated pairs, ``size`` in a step."""
    generated = Generated(cell, count, ours.entry.cfg.seed)
    train = Pairs(generated, References(generated), ours.start.train.pad_id)
    cfg = OmegaConf.merge(ours.entry.cfg, {"batch_size": size})
    return ours.twin(cfg, ours.start._replace(train=train))


class Ends:
    """A watch that notes when each step ended."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def begin(self) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
        self.at.append(time.perf_counter())


def timed(
    cfg: DictConfig, runs: Mapping[tuple[str, int], Ours], stages: Stages
) -> list[dict[str, Any]]:
    """A row per run; rounds over all runs, each a run later."""
    names = list(runs)
    seconds: dict[Any, list[float]] = {name: [] for name in names}
    tokens = {}
    with stages.stage("time", cfg.repetitions * len(names)) as advance:
        for number in range(cfg.repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                run, ends = runs[name], Ends()
                run.run(cfg.warmup + cfg.steps, ends)
                seconds[name].append((ends.at[-1] - ends.at[cfg.warmup - 1]) / cfg.steps)
                size = run.entry.cfg.batch_size
                rows = run.rows[cfg.warmup * size :]
                pairs = run.start.train.pairs
                tokens[name] = sum(len(pairs[row]) for row in rows) / cfg.steps
                advance(1, f"{name[0]} {name[1]}: {1000 * seconds[name][-1]:.1f} ms")
    return [
        {
            "axis": axis,
            "pairs_per_step": runs[axis, n].entry.cfg.batch_size,
            "pairs": len(runs[axis, n].start.train),
            "tokens": tokens[axis, n],
            "seconds": seconds[axis, n],
        }
        for axis, n in names
    ]


def fit(rows: Sequence[Mapping[str, Any]], by: str, per: float | None) -> dict[str, float] | None:
    """The exponent of the time in ``by``; of the time per token where ``per`` is None."""
    if len({row[by] for row in rows}) < 2:
        return None
    times = [median(row["seconds"]) / (per or row["tokens"]) for row in rows]
    return fitted([row[by] for row in rows], times)


def setting(cfg: DictConfig, parameters: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        **asked.machine(cfg),
        "parameters": parameters,
        **{key: cfg[key] for key in ("vocabulary", "steps", "warmup", "repetitions")},
        **{key: list(cfg[key]) for key in ("prompt", "completion", "train")},
        "spo_lightning": __version__,
        "torch": torch.__version__,
    }
