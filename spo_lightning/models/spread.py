"""A module whose parameters are spread over processes in, a copy of it with all of them out."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from spo_lightning.world import whole


@dataclass(frozen=True)
class Spread:
    """A module without its parameters, which are filled in from all processes."""

    empty: nn.Module
    device: Any  # where it computes, wherever its parts are
    root: Any = None  # what gathers all that is in no layer, where answers come from parts

    @classmethod
    def of(cls, module: nn.Module, device: Any) -> "Spread":
        """Before it is sharded: what is sharded cannot be copied."""
        hollow: Any = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in module.parameters()
        }
        return cls(copy.deepcopy(module, hollow), device)

    @contextmanager
    def whole_ends(self) -> Iterator[None]:
        """Inside, the module itself can be run, in every process at once."""
        self.root.unshard()
        try:
            yield
        finally:
            self.root.reshard()

    @torch.no_grad()
    def filled(self, module: nn.Module, device: Any, trained: bool) -> nn.Module | None:
        """The module whole on ``device``, None where that is None; ``trained``: with no more than
        the parameters that train. Every process calls it."""
        made = copy.deepcopy(self.empty)
        values: dict[int, Any] = {}
        for hollow, part in zip(made.parameters(), module.parameters(), strict=True):
            left = trained and not part.requires_grad
            value = hollow if left else whole(part.detach())
            if device is not None and not left:
                value = nn.Parameter(value.to(device), part.requires_grad)
            values[id(hollow)] = value
        if device is None:
            return None
        for layer in made.modules():
            own, buffers = layer._parameters, layer._buffers
            own.update({name: values[id(p)] for name, p in own.items() if p is not None})
            buffers.update({name: b.to(device) for name, b in buffers.items() if b is not None})
        return made
