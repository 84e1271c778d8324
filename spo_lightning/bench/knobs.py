"""What a setting of the training command is worth: ``python -m spo_lightning.bench what=knobs``.

Every entry of ``knobs`` is the training command with words of its own, from the same weights on
the same pairs as the first entry, which it is divided by. Its losses are compared too: a knob that
changes how a step is computed, not which, leaves them as they are.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig

from spo_lightning import __version__
from spo_lightning.bench import asked, step
from spo_lightning.bench.cell import drawn, save_model
from spo_lightning.bench.contestants import Ours, Race, Watch
from spo_lightning.bench.memory import apart, named
from spo_lightning.bench.table import aligned, ratio, spread, written
from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.records import progress
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse_models(line)
    for key in ("lr", "beta", "clip_norm"):
        asked.refuse_below(cfg, key, 0, within=False)
    cell, settings = asked.cell_of(cfg), composed(cfg)
    stages, device = asked.begin(cfg, run_dir), asked.device_of(cfg)
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        room = Path(place)
        parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed)
        pairs = drawn(cell, step.AGAIN * cfg.batch_size, cfg.seed)
        races = {
            name: Race(
                asked.settled(mine, room / "model", cell, room), room / "model", pairs, (), device
            )
            for name, mine in settings.items()
        }
        made, losses = begun(cfg, races, stages)
        seconds = step.rounds(cfg, cell, made, stages)
        made.clear()
        taken = peaks(cfg, races, stages) if cfg.memory else {}
    numbers = {
        "setting": setting(cfg, parameters),
        "knobs": {
            name: {"words": list(cfg.knobs[name]), **row}
            for name, row in compared(seconds, taken, losses).items()
        },
    }
    written(numbers, table(numbers), run_dir)
    return numbers


def composed(cfg: DictConfig) -> dict[str, DictConfig]:
    """The training configuration of every entry, the first of the list first."""
    for name in cfg.only or ():
        if name not in cfg.knobs:
            raise UserError(f"only: {name} is none of knobs: choose from {', '.join(cfg.knobs)}")
    if not cfg.knobs:
        raise UserError("knobs={}: name at least one")
    found = {}
    for name in dict.fromkeys([next(iter(cfg.knobs)), *(cfg.only or cfg.knobs)]):
        words = cfg.knobs[name]
        if not isinstance(words, ListConfig) or not all(isinstance(w, str) for w in words):
            raise UserError(f"knobs.{name}={words}: it must be a list of overrides, [...]")
        try:
            mine = asked.trained(cfg, list(words))
        except UserError as error:
            raise UserError(f"knobs.{name}: {error}") from error
        library = mine.optimizer._target_.split(".")[0]
        if find_spec(library) is None:
            log.warning("%s is left out, as %s is not installed", name, library)
            continue
        found[name] = mine
    return found


class Threaded:
    """Our steps on as many threads as their configuration asks for."""

    def __init__(self, race: Race):
        self.threads = race.cfg.hardware.threads
        with self.set():
            self.ours = Ours(race)

    @contextmanager
    def set(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads or before)
        try:
            yield
        finally:
            torch.set_num_threads(before)

    def run(self, steps: int, watch: Watch) -> list[float]:
        with self.set():
            return self.ours.run(steps, watch)

    def losses(self, steps: int) -> list[float]:
        with self.set():
            return self.ours.logging().run(steps, step.Nothing())


def begun(
    cfg: DictConfig, races: Mapping[str, Race], stages: Stages
) -> tuple[dict[str, Threaded], dict[str, list[float]]]:
    """Every entry, and its losses; whatever only a first run loads or compiles is done then."""
    made, losses = {}, {}
    with stages.stage("losses", len(races)) as advance:
        for name, race in races.items():
            with named(name):
                made[name] = Threaded(race)
                progress.quiet()  # what was imported since
                losses[name] = made[name].losses(cfg.warmup + cfg.steps)
            advance(1, f"{name} {losses[name][-1]:.6f}")
    return made, losses


def peaks(cfg: DictConfig, races: Mapping[str, Race], stages: Stages) -> dict[str, float]:
    steps = cfg.warmup + cfg.steps
    calls = {name: (step.peak, race, "ours", steps) for name, race in races.items()}
    return apart(calls, stages, shown=lambda mib: f"{mib:.0f} MiB")


def compared(
    seconds: Mapping[str, Sequence[float]],
    taken: Mapping[str, float],
    losses: Mapping[str, Sequence[float]],
) -> dict[str, dict[str, Any]]:
    """Time and memory over the first entry's, and the largest difference of its losses."""
    base = next(iter(seconds))
    found: dict[str, dict[str, Any]] = {}
    for name, mine in seconds.items():
        apart = [abs(one - two) for one, two in zip(losses[name], losses[base], strict=True)]
        found[name] = {
            "seconds": list(mine),
            "time": ratio(mine, seconds[base]),
            "loss_difference": max(apart),
        }
        if taken.get(base, 0) > 0:  # 0 where the system cannot forget an earlier, higher peak
            found[name] |= {"memory_mib": taken[name], "memory": taken[name] / taken[base]}
    return found


def setting(cfg: DictConfig, parameters: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        **asked.machine(cfg),
        "parameters": parameters,
        **{key: cfg[key] for key in ("vocabulary", "batch_size", "steps", "warmup")},
        **{key: list(cfg[key]) for key in ("prompt", "completion", "train")},
        "repetitions": cfg.repetitions,
        "spo_lightning": __version__,
        "torch": torch.__version__,
    }


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: what was measured on, then a row per entry."""
    at, rows = numbers["setting"], numbers["knobs"]
    base = next(iter(rows))
    head = ["knob", "words", "ms per step", f"time over {base}", "MiB at the peak"]
    head += [f"memory over {base}", "losses differ by"]
    cells = [
        [
            name,
            " ".join(f"`{word}`" for word in row["words"]),
            f"{1000 * median(row['seconds']):.1f}",
            spread(row["time"]),
            f"{row['memory_mib']:.0f}" if "memory" in row else "",
            f"{row['memory']:.2f}" if "memory" in row else "",
            f"{row['loss_difference']:.1e}",
        ]
        for name, row in rows.items()
    ]
    prompt, completion = ("{} to {}".format(*at[key]) for key in ("prompt", "completion"))
    return (
        f"- {at['parameters']:,} parameters, vocabulary {at['vocabulary']:,}, {at['device']}, "
        f"{at['threads']} threads, {at['precision']}\n"
        f"- {at['batch_size']} pairs per step, prompts of {prompt} tokens, responses of "
        f"{completion}\n"
        f"- time: {at['steps']} steps, median of {at['repetitions']} rounds and the extremes; "
        "ratios within a round\n"
        "- memory: the peak above what was in use before the first step\n"
        f"- losses: the largest difference in {at['warmup'] + at['steps']} steps\n\n"
        f"{aligned(head, cells)}\n"
    )
