"""Parameters in, bitsandbytes' paged AdamW out; where there is nothing to page it says so."""

import logging
import warnings
from typing import Any

import torch

log = logging.getLogger(__name__)


def adamw_8bit(parameters: list[torch.nn.Parameter], **settings: Any) -> torch.optim.Optimizer:
    """Its moments move between a CUDA GPU and the host; elsewhere they stay where they are."""
    from bitsandbytes.optim.adamw import PagedAdamW8bit

    if any(p.device.type != "cuda" for p in parameters):
        warnings.filterwarnings("ignore", "Paged optimizers are not supported")
        log.info("optimizer=paged_adamw_8bit: only a CUDA GPU pages; here it is adamw_8bit.")
    return PagedAdamW8bit(parameters, **settings)
