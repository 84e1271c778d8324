"""What each solver costs: ``python -m spo_lightning.bench what=solvers [key=value]``.

Time per outer step and memory at its peak, as ratios to a base solver on the same batches.
"""

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from spo_lightning.bench.table import aligned, written
from spo_lightning.config import knobs
from spo_lightning.config.build import one_line

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def measure(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Print the table, write config.yaml, bench.json and table.md; returns bench.json."""
    refuse(cfg, line)
    return bench(cfg, composed(cfg), run_dir, line.choices)


def refuse(cfg: "DictConfig", line: knobs.Given) -> None:
    """What this command alone cannot do."""
    from spo_lightning.errors import UserError

    for key in line.touched:
        if key.split(".")[0] == "solver":
            raise UserError(
                f"{key} has no effect: say it in solvers, as conf/what/solvers.yaml does"
            )
    for name in [cfg.base, *(cfg.only or ())]:
        if name not in cfg.solvers:
            raise UserError(f"{name} is none of solvers: choose from {', '.join(cfg.solvers)}")


def composed(cfg: "DictConfig") -> dict[str, Any]:
    """The configuration of every solver, the base first: this command line and its own words."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from omegaconf import ListConfig
    from omegaconf.errors import OmegaConfBaseException

    from spo_lightning.errors import UserError

    settings = HydraConfig.get()
    found = {}
    for name in dict.fromkeys([cfg.base, *(cfg.only or cfg.solvers)]):
        words = cfg.solvers[name]
        if not isinstance(words, ListConfig) or not all(isinstance(w, str) for w in words):
            raise UserError(f"solvers.{name}={words}: it must be a list of overrides, [...]")
        try:
            found[name] = compose(
                settings.job.config_name, overrides=[*settings.overrides.task, *words]
            )
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(f"solvers.{name}: {one_line(error)}") from error
    return found


def bench(
    cfg: "DictConfig", runs: "Mapping[str, DictConfig]", run_dir: Path, choices: Mapping[str, str]
) -> dict[str, Any]:
    """Prepare once, then measure every run's solver from there."""
    from omegaconf import OmegaConf

    from spo_lightning.data.load import load
    from spo_lightning.records.directory import without_secrets, write_text
    from spo_lightning.records.progress import Stages, Stop

    stages = Stages(lambda *_: None, Stop(), "Run the command again.")
    stages.stop.install()
    task = replace(load(cfg.data), held_out=[])

    from spo_lightning.bench import costs
    from spo_lightning.records import progress
    from spo_lightning.run import prepare
    from spo_lightning.train import Run

    prepare.check_checkpoints(cfg.model)
    device = prepare.device_of(cfg.hardware)
    entries = {
        name: costs.Entry(mine, *Run(mine, None, stages, {}).objective())
        for name, mine in runs.items()
    }
    progress.quiet()
    prepare.set_threads(cfg.hardware)
    precision = prepare.precision_of(cfg.hardware, device)
    log.info("Run directory: %s", run_dir)
    given = prepare.prepare(cfg, task, device, precision, stages)
    start = costs.Start(given.scorer, given.train, given.lower)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(without_secrets(resolved)))
    with tempfile.TemporaryDirectory(dir=run_dir) as room:
        taken = costs.peaks(entries, cfg.base, start, Path(room), cfg.warmup + cfg.steps, stages)
    seconds = costs.times(
        entries,
        start,
        steps=cfg.steps,
        warmup=cfg.warmup,
        repetitions=cfg.repetitions,
        stages=stages,
    )
    numbers = {
        "choices": {g: name for g, name in choices.items() if "solver" not in g and g != "what"},
        "setting": setting(cfg, start, device),
        "inner_share": costs.inner_share(start),
        "base": cfg.base,
        "solvers": ratios(seconds, taken, cfg.base),
    }
    for name in runs:
        numbers["solvers"][name]["overrides"] = list(cfg.solvers[name])
    written(numbers, table(numbers), run_dir)
    return numbers


def setting(cfg: "DictConfig", start: Any, device: Any) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch

    from spo_lightning import __version__

    cuda = device.type == "cuda"
    pairs, weights = start.train.pairs, list(start.scorer.parameters())
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "precision": cfg.hardware.precision,
        "parameters": sum(p.numel() for p in weights),
        "trainable": sum(p.numel() for p in weights if p.requires_grad),
        "pairs_per_step": cfg.batch_size,
        "pairs_per_forward": cfg.micro_batch_size,
        "tokens_per_pair": sum(len(pair) for pair in pairs) / len(pairs),
        "steps": cfg.steps,
        "warmup": cfg.warmup,
        "repetitions": cfg.repetitions,
        "spo_lightning": __version__,
        "torch": torch.__version__,
    }


def ratios(
    seconds: Mapping[str, Sequence[float]], taken: Mapping[str, float], base: str
) -> dict[str, dict[str, Any]]:
    """Time over the base's in the same round, its median and extremes; memory over the base's."""
    found = {}
    for name, mine in seconds.items():
        each = [one / other for one, other in zip(mine, seconds[base])]
        found[name] = {
            "seconds": list(mine),
            "time_ratio": median(each),
            "time_ratio_min": min(each),
            "time_ratio_max": max(each),
            "memory_mib": taken[name],
            # 0 where the system cannot forget an earlier, higher peak
            "memory_ratio": taken[name] / taken[base] if taken[base] else None,
        }
    return found


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: what was measured on, then a row per solver."""
    at, base = numbers["setting"], numbers["base"]
    head = ["solver", "ms per step", f"time over {base}", "min to max"]
    head += ["MiB at the peak", f"memory over {base}"]
    rows = [
        [
            name,
            f"{1000 * median(row['seconds']):.1f}",
            f"{row['time_ratio']:.3f}",
            f"{row['time_ratio_min']:.3f} to {row['time_ratio_max']:.3f}",
            f"{row['memory_mib']:.1f}",
            "" if row["memory_ratio"] is None else f"{row['memory_ratio']:.2f}",
        ]
        for name, row in numbers["solvers"].items()
    ]
    what = ", ".join(f"{group}={name}" for group, name in sorted(numbers["choices"].items()))
    return (
        f"{what}\n\n"
        f"- {at['trainable']:,} of {at['parameters']:,} parameters train, {at['precision']}\n"
        f"- {at['pairs_per_step']} pairs per step, {at['pairs_per_forward']} per forward, "
        f"{at['tokens_per_pair']:.1f} tokens each\n"
        f"- a pass of the lower level has {numbers['inner_share']:.3f} of the tokens of a pass of "
        "both\n"
        f"- {at['device']}, {at['threads']} threads\n"
        f"- time: {at['steps']} steps, median of {at['repetitions']} rounds; ratios within a "
        "round\n"
        "- memory: the peak above what was in use before the first step\n\n"
        f"{aligned(head, rows)}\n"
    )
