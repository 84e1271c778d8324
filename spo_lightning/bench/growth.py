"""How our step grows with its tokens and the data: ``python -m spo_lightning.bench what=growth``.

Time is taken from the end of one step to the end of the next, so that whatever a larger data set
costs between steps shows.
"""

import math
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import linear_regression, median
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.bench import asked, output
from spo_lightning.bench.cell import Cell, save_model
from spo_lightning.bench.contestants import race_of
from spo_lightning.bench.measuring import Ends, rounds
from spo_lightning.bench.ours import Ours, device_of
from spo_lightning.config import knobs
from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs

POOL = 1 << 16  # random tokens of which every generated text is a stretch


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json, table.md and the picture; returns bench.json."""
    asked.refuse(cfg, line, {"vocabulary": 8, "sizes": 1, "counts": 1}, ("lr", "beta"))
    cell, mine = asked.cell_of(cfg), asked.trained(cfg)
    stages = asked.begin(cfg, run_dir)
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        room, device = Path(place), device_of(cfg.hardware)
        parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed, device)
        race = race_of(cfg, mine, cell, room)
        ours = Ours.on(race.cfg, race.pairs)
        runs = {
            "tokens": {f"tokens {n}": on(ours, cell, max(cfg.counts), n) for n in cfg.sizes},
            "pairs": {f"pairs {n}": on(ours, cell, n, cfg.batch_size) for n in cfg.counts},
        }
        seconds = rounds(cfg, runs["tokens"] | runs["pairs"], stages, watch=Ends)
    keys = ("vocabulary", "steps", "warmup", "repetitions", "prompt", "completion", "train")
    numbers = {"setting": asked.setting(cfg, *keys, parameters=parameters)}
    for axis, along in runs.items():
        rows = []
        for name, run in along.items():
            size, pairs = run.entry.cfg.batch_size, run.start.train.pairs
            tokens = sum(len(pairs[row]) for row in run.rows[cfg.warmup * size :]) / cfg.steps
            row = {"axis": axis, "pairs_per_step": size, "pairs": len(pairs), "tokens": tokens}
            rows.append(row | {"seconds": seconds[name]})
        numbers[axis] = {"rows": rows, "fit": fit(rows, axis)}
    return output.written(numbers, table(numbers), run_dir, picture(numbers, run_dir))


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

        def text(least: int, most: int) -> tuple[int, ...]:
            begins, length = chance.randrange(POOL - most), chance.randint(least, most)
            return self.pool[begins : begins + length]

        spans = self.cell.prompt, self.cell.completion, self.cell.completion
        prompt, chosen, rejected = (text(*span) for span in spans)
        end = (self.words,)
        return Pair(prompt, chosen[:-1] + end, rejected[:-1] + end, row=place)


class References(Sequence):
    """A reference for every generated pair; what it says costs no time, so it says zero."""

    def __init__(self, pairs: Generated):
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, place: Any) -> Any:
        pair = self.pairs[place]
        return torch.zeros(len(pair.chosen) + len(pair.rejected))


def on(ours: Ours, cell: Cell, count: int, size: int) -> Ours:
    """Our run on ``count`` generated pairs, ``size`` in a step."""
    generated = Generated(cell, count, ours.entry.cfg.seed)
    train = Pairs(generated, References(generated), ours.start.train.pad_id)
    return replace(ours.changed(batch_size=size), start=ours.start._replace(train=train))


def fit(rows: Sequence[Mapping[str, Any]], axis: str) -> dict[str, float] | None:
    """The time as a power of the axis, and as a line: how far off it is at worst, as a share.

    Along the data's size it is the time per token, as drawn lengths differ.
    """
    x = [row[axis] for row in rows]
    if len(set(x)) < 2:
        return None
    y = [median(row["seconds"]) / (row["tokens"] if axis == "pairs" else 1) for row in rows]
    return fitted(x, y)


def fitted(x: Sequence[float], y: Sequence[float]) -> dict[str, float]:
    slope, intercept = linear_regression(x, y)
    worst = max(abs(intercept + slope * one - two) / two for one, two in zip(x, y))
    exponent = linear_regression([math.log(v) for v in x], [math.log(v) for v in y]).slope
    return {"exponent": exponent, "intercept": intercept, "slope": slope, "worst": worst}


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a table along either axis with what was fitted to it, then what was measured."""
    at = numbers["setting"]
    parts = ["# How our step grows"]
    for axis, first in (("tokens", "tokens per step"), ("pairs", "pairs in the data")):
        rows, fit = [], numbers[axis]["fit"]
        for row in numbers[axis]["rows"]:
            ms = output.extremes([1000 * seconds for seconds in row["seconds"]])
            rows.append(
                {
                    first: f"{row[axis]:,.0f}",
                    "pairs per step": row["pairs_per_step"],
                    "ms per step": output.spread(ms, 1),
                    "us per token": f"{1000 * ms['median'] / row['tokens']:.1f}",
                }
            )
        parts.append(output.table(rows))
        if fit is None:
            parts.append("One size: nothing to fit.")
        elif axis == "pairs":
            parts.append(f"Exponent of time in the data's size: {fit['exponent']:.3f}.")
        else:
            parts.append(
                f"Exponent of time in tokens: {fit['exponent']:.3f}; a line through them: "
                f"{1000 * fit['intercept']:.1f} ms + {1e6 * fit['slope']:.1f} us per token, "
                f"off by at most {100 * fit['worst']:.1f}%."
            )
    lines = [
        f"{at['device']}, {at['threads']} threads, {at['precision']}, {at['parameters']:,} "
        f"parameters, vocabulary {at['vocabulary']}",
        f"prompts of {at['prompt'][0]} to {at['prompt'][1]} tokens, responses of "
        f"{at['completion'][0]} to {at['completion'][1]}",
        f"time: from the end of a step to the end of the next, {at['steps']} steps after "
        f"{at['warmup']}, median of {at['repetitions']} rounds (least..most)",
        "exponent: of time as a power of the first column, by least squares of the logarithms; 1 "
        "is linear, 0 is flat. Along the data's size it is of time per token, as lengths differ",
    ]
    lines += [f"with {' '.join(at['train'])}"] * bool(at["train"])
    return "\n\n".join([*parts, output.bullets(lines)]) + "\n"


def picture(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """growth.svg and growth.png: both axes logarithmic, a dot with extremes per size."""
    said = {
        "tokens": {"title": "with its tokens", "xlabel": "unique tokens per step"},
        "pairs": {"title": "with the data", "xlabel": "pairs in the data set"},
    }
    panels = []
    for axis, words in said.items():
        rows, first = numbers[axis]["rows"], axis == "tokens"
        scales = {"xscale": "log", "yscale": "log", "ylabel": "ms per step" if first else ""}
        panels.append(
            output.Panel(
                [row[axis] for row in rows],
                [output.extremes([1000 * s for s in row["seconds"]]) for row in rows],
                output.BLUE,
                {**words, **scales},
                joined=True,
                linear=first,
                marks=((1, 2, 5) if first else (1,), (1, 2, 5)),
            )
        )
    title = "Our step's time: median and extremes of the rounds"
    return output.draw([panels], title, size=(7.6, 3.4), directory=directory, name="growth")
