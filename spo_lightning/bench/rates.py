"""What a device does in a second, for ``plan``: ``python -m spo_lightning.bench what=rates``.

A matrix, causal attention and an optimizer's step, each by itself and timed alone: operations, or
bytes that are moved, over the median time.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from omegaconf import DictConfig
from torch.nn.functional import scaled_dot_product_attention

from spo_lightning.bench import asked, output
from spo_lightning.bench.measuring import now
from spo_lightning.bench.ours import device_of
from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.models.device import precision_of
from spo_lightning.models.policy import DTYPES

HEAD = 64  # width of an attention head


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse(cfg, line, {"width": HEAD, "tokens": 1, "repetitions": 1})
    for key in line.touched:
        if key.startswith("model.") and key != "model.dtype":
            raise UserError(f"{key} has no effect: rates are of matrices of one width; set width")
    asked.begin(cfg, run_dir)
    precision = precision_of(cfg.hardware, device_of(cfg.hardware))
    rates, rows = {}, []
    for name, (call, amount, unit) in _work(cfg).items():
        taken = []
        for _ in range(cfg.repetitions + 1):
            with precision(), torch.no_grad():
                began = now()
                call()
                taken.append(now() - began)
        rates[name] = amount / median(taken[1:])
        rows.append({"what": name, "in a second": f"{rates[name] / 1e9:.1f} {unit}"})
    numbers = {"setting": asked.setting(cfg, "width", "tokens", "repetitions"), "rates": rates}
    return output.written(numbers, output.table(rows) + "\n", run_dir)


def _work(cfg: DictConfig) -> dict[str, tuple[Callable[[], Any], float, str]]:
    """What is called, how much of it that is, and of what."""
    width, tokens, count = cfg.width, cfg.tokens, cfg.width // HEAD
    how = {"device": device_of(cfg.hardware), "dtype": DTYPES[cfg.model.dtype]}
    states, matrix = torch.randn(tokens, width, **how), torch.randn(width, width, **how)
    heads = torch.randn(1, count, tokens, HEAD, **how)
    weights = torch.nn.Parameter(torch.randn(width, width, device=how["device"]))
    weights.grad = torch.randn_like(weights)

    def attend() -> None:
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    attended = 4 * count * HEAD * tokens * (tokens + 1) / 2
    return {
        "matrices": (lambda: states @ matrix, 2 * tokens * width**2, "GFLOP"),
        "attention": (attend, attended, "GFLOP"),
        # moments and weights are read and written, the gradient is read; 4 bytes each
        "optimizer": (torch.optim.AdamW([weights], fused=True).step, 7 * 4 * width**2, "GB"),
    }
