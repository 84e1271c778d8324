"""A run that does not fit in; single changes that make it fit out."""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.command import CONF
from spo_lightning.plan.sums import Run, planned, run_of

# what takes less memory, each by itself; those first that leave the numbers of a run as they are
CHANGES: list[Mapping[str, Any]] = [
    {"micro_batch_size": 1},
    {"eval.batch_size": 8},
    {"hardware.logits_mib": 64},
    {"hardware.activation_checkpointing": True},
    {"hardware.precision": "bf16-true", "model.dtype": "bfloat16"},
    {"optimizer": "adamw_8bit"},
    {"model.lora.rank": 16},
    {"model.lora.rank": 16, "model.quantize": "nf4"},
]
ONE = {"micro_batch_size": 1}
# what leaves the model as it is
BESIDE = ("micro_batch_size", "eval.batch_size", "hardware.strategy", "hardware.devices")


def changes(run: Run, room: float) -> dict[str, float]:
    """Words of the command line, and the peak with them, of those that fit; where none does, of
    those that do with one pair at once."""
    return _fitting(run, {}, room) or _fitting(run, ONE, room)


def _fitting(run: Run, also: Mapping[str, Any], room: float) -> dict[str, float]:
    words = [{**also, **more} for more in CHANGES]
    peaks = {said(some): planned(_with(run, some)).peak for some in words if _news(run.cfg, some)}
    found = {some: peak for some, peak in peaks.items() if peak <= room}
    for some, peak in _more_devices(_with(run, also)):
        if peak <= room:
            return found | {" ".join(filter(None, (said(also), some))): peak}
    return found


def said(words: Mapping[str, Any]) -> str:
    return " ".join(f"{key}={str(value).lower()}" for key, value in words.items())


def _news(cfg: DictConfig, words: Mapping[str, Any]) -> bool:
    """Whether the run is another with them, and is one."""
    if "micro_batch_size" in words and cfg.data.get("tokens_per_batch"):
        return False
    if "model.quantize" in words or "optimizer" in words:
        there = importlib.util.find_spec("bitsandbytes") is not None
        if not there or cfg.hardware.strategy == "fsdp":  # its bytes are not shared
            return False
    return "optimizer" in words or any(OmegaConf.select(cfg, k) != v for k, v in words.items())


def _with(run: Run, words: Mapping[str, Any]) -> Run:
    other = run.cfg.copy()
    for key, value in words.items():
        if key == "optimizer":
            value = OmegaConf.load(Path(CONF, key, f"{value}.yaml"))
        OmegaConf.update(other, key, value, merge=False, force_add=True)
    return replace(run, cfg=other) if {*words} <= {*BESIDE} else run_of(other)


def _more_devices(run: Run) -> Iterator[tuple[str, float]]:
    """Twice as many and more, that share the weights; each has a pair at least."""
    devices = max(2, 2 * run.cfg.hardware.devices)
    while devices <= run.cfg.batch_size and not run.cfg.model.get("quantize"):
        words: dict[str, Any] = {"hardware.strategy": "fsdp", "hardware.devices": devices}
        for more in ({}, {"hardware.sharding.gather_for_answers": False}):
            told = f"hardware=fsdp hardware.devices={devices} {said(more)}".rstrip()
            yield told, planned(_with(run, words | more)).peak
        devices *= 2
