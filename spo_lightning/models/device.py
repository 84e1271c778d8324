"""The ``hardware`` config in, where and how a process computes out: device, precision, threads."""

import logging
import os
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.errors import UserError

log = logging.getLogger(__name__)


def device_of(hardware: DictConfig, local_rank: int = 0) -> torch.device:
    """The device of a process; says in one line what ``auto`` took."""
    wants, has = hardware.accelerator, torch.cuda.is_available()
    if wants == "gpu" and not has:
        raise UserError("hardware.accelerator=gpu, and there is none here: use hardware=cpu")
    found = torch.device("cuda", local_rank) if has and wants in ("auto", "gpu") else None
    if found is not None and local_rank >= torch.cuda.device_count():
        raise UserError(
            f"hardware.devices is more than the {torch.cuda.device_count()} GPUs here: lower it"
        )
    if wants == "auto":
        named = torch.cuda.get_device_name() if has else f"{torch.get_num_threads()} CPU threads"
        log.info("Hardware: %s", named)
    return found or torch.device("cpu")


def precision_of(hardware: DictConfig, device: Any) -> Callable[[], Any]:
    """A context maker for forwards outside Lightning, equal to its precision plugin's."""
    if hardware.precision == "bf16-mixed":
        # a layer's rounded weights would stay after those that were gathered for it have gone
        spread = hardware.get("sharding") is not None
        kind, how = torch.device(device).type, {"cache_enabled": not spread}
        return partial(torch.autocast, kind, torch.bfloat16, **how)
    return nullcontext


def set_threads(hardware: DictConfig, share: int = 1) -> None:
    """As many as were asked for; where nothing was, a ``share``-th of what torch would take."""
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    elif share > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // share))
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
