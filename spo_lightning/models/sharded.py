"""A policy and its scorer in, the same with a part of every parameter in each process out.

torch's FSDP2 gathers a layer's parameters for as long as it computes. The scorer is the root, so
that its forward has the embedding and the head whole: the head's matrix is read block by block,
outside of any forward of its own (``head.py``). What needs every weight at once (answers, files)
is given a copy that has them, see ``Spread``.
"""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models.policy import Policy
from spo_lightning.models.quantized import bits_of
from spo_lightning.models.scorer import Scorer
from spo_lightning.world import World, whole

READS = ("top", "greedy", "hidden_sums")  # of a scorer, beside its forward


@dataclass(frozen=True)
class Sharding:
    """How parameters are spread: whether layers keep them from forward to backward, and whether
    parts stay in the host's memory."""

    reshard_after_forward: bool
    offload: bool

    def __call__(self, policy: Policy, scorer: Scorer, world: World) -> Policy:
        """The policy with its parameters spread, in place; every process calls it."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        _refuse(policy, scorer, world)
        if self.offload and world.device.type == "cpu":
            raise UserError("hardware.sharding.offload has no effect on a CPU: leave it out")
        spread = Spread.of(policy)
        how = {
            "mesh": init_device_mesh(world.device.type, (world.size,)),
            "reshard_after_forward": True,  # what reads without a gradient leaves nothing behind
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
        }
        for layer in layers_of(policy.lm):
            fully_shard(layer, **how)
        fully_shard(scorer, **how)
        for name in READS:
            register_fsdp_forward_method(scorer, name)
        scorer.spread = dict(scorer.named_parameters())
        scorer.stays = not self.reshard_after_forward
        return replace(policy, spread=spread)


@dataclass(frozen=True)
class Spread:
    """The policy's module without its parameters, which are filled in from all processes."""

    empty: nn.Module

    @classmethod
    def of(cls, policy: Policy) -> "Spread":
        """Before it is sharded: what is sharded cannot be copied."""
        hollow = {
            id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)
            for p in policy.module.parameters()
        }
        return cls(copy.deepcopy(policy.module, hollow))  # type: ignore[arg-type] (a memo)

    @torch.no_grad()
    def filled(self, policy: Policy, device: Any) -> Policy | None:
        """The policy whole on ``device``, None where that is None; every process calls it."""
        made = copy.deepcopy(self.empty)
        pairs = zip(made.parameters(), policy.module.parameters(), strict=True)
        values: dict[int, nn.Parameter] = {}
        for hollow, part in pairs:
            value = whole(part.detach())
            if device is not None:
                values[id(hollow)] = nn.Parameter(value.to(device), part.requires_grad)
        if device is None:
            return None
        for module in made.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = values[id(parameter)]
        made.to(device)  # its buffers
        lm = made if policy.module is policy.lm else made.get_base_model()  # type: ignore[operator]
        return replace(policy, module=made, lm=lm, spread=None)


def layers_of(lm: Any) -> list[nn.Module]:
    """Its blocks: of all lists of modules the one with most parameters."""
    lists = [module for module in lm.modules() if isinstance(module, nn.ModuleList)]
    sizes = [sum(p.numel() for p in layers.parameters()) for layers in lists]
    if not any(sizes):
        raise UserError(
            f"hardware=fsdp: {type(lm).__name__} has no list of layers, of which each would be "
            "gathered by itself: take hardware=ddp"
        )
    return [*lists[sizes.index(max(sizes))]]


def _refuse(policy: Policy, scorer: Scorer, world: World) -> None:
    """What cannot be spread, or would have processes wait for one another in vain."""
    if world.size == 1:
        raise UserError(
            "hardware=fsdp spreads a model over several processes, and here is one: set "
            "hardware.devices, or take hardware=auto"
        )
    if bits_of(policy.lm) is not None:
        raise UserError(
            "hardware=fsdp: quantised weights are bytes that no process can have a part of: take "
            "hardware=ddp, or weights in full"
        )
    kinds = {p.dtype for p in policy.lm.parameters() if p.requires_grad}
    if len(kinds) > 1:
        raise UserError(
            f"hardware=fsdp: weights in {' and '.join(sorted(map(str, kinds)))} train together, "
            "and it gathers one kind: set model.dtype"
        )


@contextmanager
def kept(scorer: Scorer) -> Iterator[None]:
    """Inside, layers keep their gathered parameters from forward to backward, where asked for."""
    if not scorer.stays:
        yield
        return
    root: Any = scorer
    root.set_reshard_after_forward(False)
    try:
        yield
    finally:
        root.set_reshard_after_forward(True)


@contextmanager
def at(scorer: Scorer, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold these inside; what was gathered before would not know of them."""
    assert scorer.spread is not None
    held = {name: scorer.spread[name].detach().clone() for name in values}
    try:
        _write(scorer, values)
        yield
    finally:
        _write(scorer, held)


@torch.no_grad()
def _write(scorer: Scorer, values: Mapping[str, Tensor]) -> None:
    from torch.distributed.fsdp import FSDPModule

    assert scorer.spread is not None
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
    for name, value in values.items():
        scorer.spread[name].copy_(value)
