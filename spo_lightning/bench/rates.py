"""What a device does in a second, for ``plan``: ``python -m spo_lightning.bench what=rates``."""

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
from spo_lightning.models.device import precision_of
from spo_lightning.models.policy import DTYPES

HEAD = 64  # width of an attention head


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    asked.refuse(cfg, line, {"width": HEAD, "tokens": 1, "repetitions": 1})
    asked.begin(cfg, run_dir)
    device, dtype = device_of(cfg.hardware), DTYPES[cfg.model.dtype]
    precision = precision_of(cfg.hardware, device)
    how = {"device": device, "dtype": dtype}
    width, tokens = cfg.width, cfg.tokens
    one, two = torch.randn(tokens, width, **how), torch.randn(width, width, **how)
    heads = torch.randn(1, width // HEAD, tokens, HEAD, **how)
    p = torch.nn.Parameter(torch.randn(width, width, device=device))
    p.grad = torch.randn_like(p)
    adamw = torch.optim.AdamW([p], fused=True)

    def attend() -> None:
        scaled_dot_product_attention(heads, heads, heads, is_causal=True)

    work: dict[str, tuple[Callable[[], Any], float]] = {
        "matrices": (lambda: one @ two, 2 * tokens * width**2),
        "attention": (attend, 4 * (width // HEAD * HEAD) * tokens * (tokens + 1) / 2),
        # moments are read and written, the parameter too, the gradient read
        "optimizer": (adamw.step, 7 * 4 * width**2),
    }
    rates = {}
    for name, (call, amount) in work.items():
        taken = []
        for _ in range(cfg.repetitions + 1):
            with precision(), torch.no_grad():
                began = now()
                call()
                taken.append(now() - began)
        rates[name] = amount / median(taken[1:])
    numbers = {"setting": asked.setting(cfg, "width", "tokens", "repetitions"), "rates": rates}
    rows = [
        {
            "what": name,
            "in a second": f"{rate / 1e9:.1f} G{'B' if name == 'optimizer' else 'FLOP'}",
        }
        for name, rate in rates.items()
    ]
    return output.written(numbers, output.table(rows) + "\n", run_dir)
