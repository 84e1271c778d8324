"""What a setting of the training command is worth: ``python -m spo_lightning.bench what=knobs``.

Every entry of ``knobs`` is the training command with words of its own, from the same weights on
the same pairs as the first entry, which it is divided by. Its losses are compared too: a knob that
changes how a step is computed, not which, leaves them as they are.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from omegaconf import DictConfig

from spo_lightning.bench import asked, output
from spo_lightning.bench.cell import save_model
from spo_lightning.bench.contestants import race_of, twice
from spo_lightning.bench.measuring import named, peaks, rounds
from spo_lightning.bench.ours import Ours, Watch, device_of
from spo_lightning.config import knobs
from spo_lightning.errors import UserError

log = logging.getLogger(__name__)


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse(cfg, line, {"vocabulary": 8}, ("lr", "beta", "clip_norm"))
    cell, settings = asked.cell_of(cfg), composed(cfg)
    stages, steps = asked.begin(cfg, run_dir), cfg.warmup + cfg.steps
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        room, device = Path(place), device_of(cfg.hardware)
        parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed, device)
        races = {name: race_of(cfg, mine, cell, room) for name, mine in settings.items()}
        made, losses, taken = {}, {}, {}
        # whatever only a first run loads or compiles is done here
        with stages.stage("losses", len(races)) as advance:
            for name, race in races.items():
                with named(name):
                    made[name] = Ours.on(race.cfg, race.pairs)
                    losses[name] = made[name].logging().run(steps, Watch())
                advance(1, f"{name} {losses[name][-1]:.6f}")
        seconds = rounds(cfg, made, stages, title=f"time ({cell.name})")
        made.clear()
        if cfg.memory:
            calls = {
                n: (race.cfg.hardware, partial(twice, race, "ours")) for n, race in races.items()
            }
            taken = peaks(calls, steps, stages)
    keys = ("vocabulary", "batch_size", "steps", "warmup", "prompt", "completion", "train")
    rows = compared(seconds, taken, losses)
    numbers = {
        "setting": asked.setting(cfg, *keys, "repetitions", parameters=parameters),
        "knobs": {name: {"words": list(cfg.knobs[name]), **row} for name, row in rows.items()},
    }
    return output.written(numbers, table(numbers), run_dir)


def composed(cfg: DictConfig) -> dict[str, DictConfig]:
    """The training configuration of every entry, the first of the list first."""
    if not cfg.knobs:
        raise UserError("knobs={}: name at least one")
    found = asked.entries(cfg, "knobs", next(iter(cfg.knobs)), partial(asked.trained, cfg))
    for name, mine in list(found.items()):
        library = mine.optimizer._target_.split(".")[0]
        if find_spec(library) is None:
            log.warning("%s is left out, as %s is not installed", name, library)
            del found[name]
    return found


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
            "time": output.ratio(mine, seconds[base]),
            "loss_difference": max(apart),
        }
        if taken.get(base, 0) > 0:  # 0 where the system cannot forget an earlier, higher peak
            found[name] |= {"memory_mib": taken[name], "memory": taken[name] / taken[base]}
    return found


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: what was measured on, then a row per entry."""
    at, entries = numbers["setting"], numbers["knobs"]
    base = next(iter(entries))
    rows = [
        {
            "knob": name,
            "words": " ".join(f"`{word}`" for word in row["words"]),
            "ms per step": f"{1000 * median(row['seconds']):.1f}",
            f"time over {base}": output.spread(row["time"]),
            "MiB at the peak": f"{row['memory_mib']:.0f}" if "memory" in row else "",
            f"memory over {base}": f"{row['memory']:.2f}" if "memory" in row else "",
            "losses differ by": f"{row['loss_difference']:.1e}",
        }
        for name, row in entries.items()
    ]
    prompt, completion = ("{} to {}".format(*at[key]) for key in ("prompt", "completion"))
    lines = [
        f"{at['parameters']:,} parameters, vocabulary {at['vocabulary']:,}, {at['device']}, "
        f"{at['threads']} threads, {at['precision']}",
        f"{at['batch_size']} pairs per step, prompts of {prompt} tokens, responses of "
        f"{completion}",
        f"time: {at['steps']} steps, median of {at['repetitions']} rounds and the extremes; "
        "ratios within a round",
        "memory: the peak above what was in use before the first step",
        f"losses: the largest difference in {at['warmup'] + at['steps']} steps",
    ]
    return f"{output.bullets(lines)}\n\n{output.table(rows)}\n"
