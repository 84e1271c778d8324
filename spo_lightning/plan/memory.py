"""A model without weights in, the bytes that its steps would hold at their peak out.

The run's own code goes forward and backward on tensors that have shapes only, and each is counted
from when it appears until nobody holds it. What is never imagined is added by ``sums``.
"""

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from spo_lightning.data.batch import Pair, PairBatch, collate
from spo_lightning.models.scorer import Scorer
from spo_lightning.training.fit import optimizer_of

PROBE = 2**16  # parameters of which an optimizer's memory is measured

Precision = Callable[[], AbstractContextManager]


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, but for those that were there before."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in before}
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._see(tensor)
        return out

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes()
        self.now += storage.nbytes()
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


def batch_of(pairs: int, prompt: int, completion: int) -> PairBatch:
    """So many pairs of these lengths; which tokens they are takes no memory."""
    # prompts differ, so that none is shared between pairs
    made = [
        Pair((row % 64, *(0,) * (prompt - 1)), (1,) * completion, (2,) * completion, row=row)
        for row in range(pairs)
    ]
    return collate(made, 0)


def of_step(scorer: Scorer, batch: PairBatch, precision: Precision, parts: int) -> int:
    """Peak of activations and gradients; ``parts``: microbatches of an outer step."""
    alive = Alive(_there(scorer))
    with alive:
        for _ in range(min(parts, 2)):  # from the second on gradients are there before
            with precision():
                found = scorer(batch).logps
            found.sum().backward()
            del found
    for p in scorer.parameters():
        p.grad = None
    return alive.peak


def of_look(scorer: Scorer, batch: PairBatch, precision: Precision) -> int:
    """Peak of a forward that keeps nothing: the reference's scoring, held-out numbers."""
    alive = Alive(_there(scorer))
    with alive, torch.no_grad(), precision():
        scorer(batch)
    return alive.peak


def _there(scorer: Scorer) -> list[Tensor]:
    return [*scorer.parameters(), *scorer.buffers()]


def of_optimizer(cfg: DictConfig, dtype: torch.dtype) -> float:
    """Bytes that the optimizer keeps of a parameter, from a step on a small real one."""
    p = nn.Parameter(torch.zeros(PROBE, dtype=dtype))
    optimizer: Any = optimizer_of(cfg)([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    inner = getattr(optimizer, "inner", optimizer)  # of weights in bfloat16
    kept = [t for t in tree_leaves([*inner.state.values()]) if isinstance(t, Tensor)]
    kept += getattr(optimizer, "wide", [])
    return sum(t.numel() * t.element_size() for t in kept if t.numel() > 1) / PROBE
