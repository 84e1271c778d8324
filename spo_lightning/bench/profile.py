"""Where a step's time goes: ``python -m spo_lightning.bench what=profile``.

torch's profiler watches a few outer steps: seconds by kernel on a GPU, by operator on a CPU, and
how often a step waits for the device, which it should once at most.
"""

import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch.profiler import ProfilerActivity, profile

from spo_lightning.bench import asked, output
from spo_lightning.bench.cell import save_model
from spo_lightning.bench.contestants import CONTESTANTS, race_of
from spo_lightning.bench.measuring import named, now
from spo_lightning.bench.ours import Watch, device_of
from spo_lightning.config import knobs
from spo_lightning.errors import UserError

WIDE = 72  # letters of a kernel's name that are shown: templates fill pages
# what reads a number back waits on a GPU in one of these calls, and has an operator on a CPU
WAITS = {
    "cpu": {"aten::_local_scalar_dense"},
    "cuda": {"cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize"},
}


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json, table.md and the picture; returns bench.json."""
    least = {"vocabulary": 8, "steps": 1, "warmup": 1, "rows": 1}
    asked.refuse(cfg, line, least, ("lr", "beta", "clip_norm"), adapters=True)
    asked.refuse_strangers([cfg.contestant], "contestants", CONTESTANTS, "contestant")
    kind = CONTESTANTS[cfg.contestant]
    if not kind.installed:
        raise UserError(f"contestant={cfg.contestant} needs {' and '.join(kind.needs)}")
    cell, mine = asked.cell_of(cfg), asked.trained(cfg)
    asked.begin(cfg, run_dir)
    device = device_of(cfg.hardware)
    watch = Profiled(device, cfg.warmup, cfg.steps)
    with tempfile.TemporaryDirectory(dir=run_dir) as place:
        room = Path(place)
        parameters = save_model(room / "model", cfg.model, cell.vocabulary, cfg.seed, device)
        race = race_of(cfg, mine, cell, room)
        race = replace(race, order=range(len(race.pairs)))  # which pairs, is no matter here
        with named(cfg.contestant):
            kind.make(race).run(cfg.warmup + cfg.steps, watch)
    if cfg.trace:
        watch.profiler.export_chrome_trace(str(run_dir / "trace.json"))
    keys = ("contestant", "steps", "warmup", "batch_size", "prompt", "completion", "vocabulary")
    setting = asked.setting(cfg, *keys, "train", parameters=parameters)
    numbers = {"setting": setting, **told(watch, cfg.steps)}
    return output.written(
        numbers, table(numbers, cfg.rows), run_dir, picture(numbers, cfg.rows, run_dir)
    )


class Profiled(Watch):
    """The profiler, on from the end of the warm-up to the last step's end."""

    def __init__(self, device: torch.device, warmup: int, steps: int):
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it says on stderr when it begins
        kinds = [ProfilerActivity.CPU]
        if device.type == "cuda":
            kinds.append(ProfilerActivity.CUDA)
        self.profiler, self.device = profile(activities=kinds), device
        self.first, self.last, self.done = warmup, warmup + steps, 0

    def start(self) -> None:
        if self.done == self.first:
            self.profiler.start()
            self.began = now()

    def stop(self) -> None:
        self.done += 1
        if self.done == self.last:
            self.seconds = now() - self.began  # with the profiler's own share
            self.profiler.stop()


def told(watch: Profiled, steps: int) -> dict[str, Any]:
    """Of a step: seconds, seconds and calls by kernel (the longest first), the share of the time
    in which any runs, and how often it waits (on a CPU: reads a number back)."""
    gpu = watch.device.type == "cuda"
    found = watch.profiler.key_averages()
    kernels = [
        {
            "name": event.key,
            "seconds": (event.self_device_time_total if gpu else event.self_cpu_time_total)
            / (1e6 * steps),
            "calls": event.count / steps,
        }
        for event in found
        if (event.device_type.name == "CUDA") == gpu and not event.is_user_annotation
    ]
    kernels.sort(key=lambda kernel: -kernel["seconds"])
    waits = sum(event.count for event in found if event.key in WAITS[watch.device.type])
    seconds = watch.seconds / steps
    return {
        "seconds": seconds,
        "busy": sum(kernel["seconds"] for kernel in kernels) / seconds,
        "launched": sum(kernel["calls"] for kernel in kernels),
        "waits": waits / steps,
        "kernels": kernels,
    }


# -- what is shown


def table(numbers: Mapping[str, Any], rows: int) -> str:
    """Markdown: a row per kernel, those beyond ``rows`` together, then what was measured."""
    at, seconds = numbers["setting"], numbers["seconds"]
    shown = [
        {
            "kernel": short(kernel["name"]),
            "ms per step": f"{1000 * kernel['seconds']:.2f}",
            "share": f"{kernel['seconds'] / seconds:.3f}",
            "calls": f"{kernel['calls']:.0f}",
        }
        for kernel in longest(numbers["kernels"], rows)
    ]
    idle = seconds * (1 - numbers["busy"])
    shown.append(
        {
            "kernel": "none of them",
            "ms per step": f"{1000 * idle:.2f}",
            "share": f"{idle / seconds:.3f}",
            "calls": "",
        }
    )
    what, waits = ("operators", "reads of a number") if at["device"] == "cpu" else (
        "kernels", "waits for the device")  # fmt: skip
    lines = [
        f"{at['device']}, {at['threads']} threads, {at['precision']}, {at['parameters']:,} "
        f"parameters, {at['batch_size']} pairs per step; {at['steps']} steps after "
        f"{at['warmup']} of {CONTESTANTS[at['contestant']].title}",
        f"a step: {1000 * seconds:.1f} ms with the profiler's own share, "
        f"{numbers['launched']:.0f} calls of {what}, {numbers['waits']:.1f} {waits}",
        f"time of {what}: their own, without what they call",
    ]
    return (
        "\n\n".join(["# Where a step's time goes", output.table(shown), output.bullets(lines)])
        + "\n"
    )


def longest(kernels: Sequence[Mapping[str, Any]], rows: int) -> list[dict[str, Any]]:
    """The first so many, and all others as one."""
    rest = kernels[rows:]
    shown = [dict(kernel) for kernel in kernels[:rows]]
    if rest:
        sums = {key: sum(kernel[key] for kernel in rest) for key in ("seconds", "calls")}
        shown.append({"name": f"{len(rest)} others", **sums})
    return shown


def short(name: str) -> str:
    """Its name, without what would break a row of the table."""
    whole = " ".join(name.replace("|", "/").split())
    return whole if len(whole) <= WIDE else whole[: WIDE - 3] + "..."


def picture(numbers: Mapping[str, Any], rows: int, directory: Path) -> list[Path]:
    """profile.svg and profile.png: a bar per kernel, the longest above."""
    import matplotlib
    from matplotlib.figure import Figure

    kernels = longest(numbers["kernels"], rows)[::-1]
    paths = [directory / f"profile.{kind}" for kind in ("svg", "png")]
    with matplotlib.rc_context(output.STYLE):
        figure = Figure(figsize=(8.0, 0.8 + 0.25 * len(kernels)), layout="constrained")
        axes = figure.subplots()
        places, long = range(len(kernels)), [1000 * kernel["seconds"] for kernel in kernels]
        bars = axes.barh(places, long, color=output.BLUE)
        shares = [f"{kernel['seconds'] / numbers['seconds']:.0%}" for kernel in kernels]
        axes.bar_label(bars, shares, padding=2)
        axes.set_yticks(places, [short(kernel["name"])[:44] for kernel in kernels])
        axes.set(xlabel="ms per step")
        figure.suptitle("Where a step's time goes")
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=160)
    return paths
