"""A policy in, the same with a part of every parameter in each process and its scorer out.

torch's FSDP2 gathers a layer's parameters for as long as it computes, and so the embedding's and
the head's where they are two; one matrix for both is whole in the scorer's forward, which is the
root. Parameters that are still in their files are read block by block, so that a process never has
more of them than its parts and one block. What needs every weight at once (answers, if asked so)
is given a copy that has them (``spread.py``).
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models.head import fused_logps, is_plain
from spo_lightning.models.policy import Policy
from spo_lightning.models.quantized import bits_of
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.spread import Spread
from spo_lightning.world import World

READS = ("top", "greedy", "hidden_sums", "reads_as")  # of a scorer, beside its forward


@dataclass(frozen=True)
class Sharding:
    """How parameters are spread: whether layers keep them from forward to backward, over how many
    groups of processes all parts stand again, whether parts stay in the host's memory, and whether
    answers come from a copy of all (older runs have no key for that)."""

    reshard_after_forward: bool
    copies: int
    offload: bool
    gather_for_answers: bool = True

    def __call__(
        self,
        policy: Policy,
        decide: Callable[[Policy], Scorer],
        world: World,
        *,
        trains: bool,
        unpaired: bool,
    ) -> tuple[Policy, Scorer]:
        """The policy with its parameters spread, in place, and its scorer; every process calls it.

        ``decide``: how its batches are read; it runs the policy's layers when they are spread.
        ``trains``: whether it is trained then. ``unpaired``: whether rows may have one answer.
        """
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import (
            CPUOffloadPolicy,
            OffloadPolicy,
            fully_shard,
            register_fsdp_forward_method,
        )

        from spo_lightning.models.in_place import talk_in_place

        _refuse(policy, trains)
        if self.offload and world.device.type == "cpu":
            raise UserError("hardware.sharding.offload has no effect on a CPU: leave it out")
        spread = Spread.of(policy.module, world.device)
        how = {
            "mesh": init_device_mesh(world.device.type, **self._mesh(world.size)),
            "reshard_after_forward": True,  # what reads without a gradient leaves nothing behind
            "offload_policy": CPUOffloadPolicy() if self.offload else OffloadPolicy(),
        }
        scorer = Scorer(policy.lm, shared=False, reading=Reading(""))  # until it is decided
        ends = ends_of(policy.lm)
        for module in (*layers_of(policy.lm), *ends, scorer):
            if policy.unread is not None:
                policy.unread.fill(module, world.device)
            sharded: Any = fully_shard(module, **how)
            if world.device.type == "cpu":
                talk_in_place(sharded)
        for name in READS:
            register_fsdp_forward_method(scorer, name)
        for head in ends[1:]:  # read block by block, beside its own forward
            head.logps = MethodType(fused_logps, head)
            register_fsdp_forward_method(head, "logps")
        spread = replace(spread, root=None if self.gather_for_answers else scorer)
        policy = replace(policy, spread=spread, unread=None)
        scorer.place = world.device
        scorer.reads_as(lambda: decide(policy))
        if unpaired and not (scorer.packs or scorer.shared):
            raise UserError(
                "hardware=fsdp: this model reads its answers apart, so that processes would run "
                "other numbers of forwards on rows of one answer and wait for one another: take "
                "hardware=ddp"
            )
        scorer.spread = dict(scorer.named_parameters())
        scorer.stays = not self.reshard_after_forward
        return policy, scorer

    def _mesh(self, size: int) -> dict[str, Any]:
        """The processes as groups and their members, or as one group."""
        if size % self.copies:
            raise UserError(
                f"hardware.sharding.copies={self.copies} does not divide the {size} processes: "
                "begin a multiple"
            )
        shape, names = (self.copies, size // self.copies), ("copies", "parts")
        own = slice(1 if self.copies == 1 else 0, None)
        return {"mesh_shape": shape[own], "mesh_dim_names": names[own]}


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


def ends_of(lm: Any) -> list[Any]:
    """Its embedding and its head; none where they have a matrix in common, or where it has no such
    head."""
    ends = lm.get_input_embeddings(), lm.get_output_embeddings()
    if None in ends or ends[0].weight is ends[1].weight or not is_plain(ends[1]):
        return []
    return [*ends]


def _refuse(policy: Policy, trains: bool) -> None:
    """What cannot be spread."""
    if bits_of(policy.lm) is not None:
        raise UserError(
            "hardware=fsdp: quantised weights are bytes that no process can have a part of: take "
            "hardware=ddp, or weights in full"
        )
    kinds = {p.dtype for p in policy.lm.parameters() if p.requires_grad}
    if trains and torch.bfloat16 in kinds:
        raise UserError(
            "hardware=fsdp: weights in bfloat16 that train would need copies in float32, which "
            "are not spread: set model.dtype=float32 and hardware.precision=bf16-mixed, or train "
            "adapters (model.lora.rank)"
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
    """The spread parameters hold these inside; what was gathered before would not know of them."""
    assert scorer.spread is not None
    own = [scorer.spread[name] for name in values]
    held = [p.detach().clone() for p in own]
    _let_go(scorer)
    write(own, [*values.values()])
    try:
        yield
    finally:
        _let_go(scorer)
        write(own, held)


def _let_go(scorer: Scorer) -> None:
    """Of what layers have gathered."""
    from torch.distributed.fsdp import FSDPModule

    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


@torch.no_grad()
def write(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
