"""What processes gather and sum of spread parameters on a CPU, in the buffers that they are given.

torch's gloo would gather and sum in copies of its own, and FSDP2 would keep a block's buffer until
the next one is there, and gather one block ahead: that is overlap on a GPU, and on a CPU up to
three blocks more.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule


class InPlace:
    """A process has its part in its place of the gathered ones, and finds the sum there."""

    def allocate(
        self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class Gather(InPlace):
    """torch's ``AllGather``."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> Any:
        parts = enumerate(output_tensor.chunk(group.size()))
        works = [dist.broadcast(p, group=group, group_src=r, async_op=True) for r, p in parts]
        for work in works[:-1]:
            work.wait()  # type: ignore[union-attr]  # None is for processes outside the group
        return works[-1]  # what is waited for is let go of, once it has been copied


class Sum(InPlace):
    """torch's ``ReduceScatter``."""

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any,
        async_op: bool = False,
    ) -> None:  # fmt: skip
        parts = input_tensor.chunk(group.size())
        for rank, part in enumerate(parts):
            dist.reduce(part, group=group, group_dst=rank, op=op)
        output_tensor.copy_(parts[group.rank()])
        # FSDP2 holds it until the block below has its gradients, for a GPU that may not be done
        input_tensor.untyped_storage().resize_(0)


def talk_in_place(module: FSDPModule) -> None:
    """From now on, this one's own parameters; and none is gathered ahead in backward."""
    gather, total = Gather(), Sum()
    # by their shape alone: the classes that torch's types ask for are private to it
    module.set_custom_all_gather(gather)  # type: ignore[arg-type]
    module.set_custom_reduce_scatter(total)  # type: ignore[arg-type]
    module.set_force_sum_reduction_for_comms(True)  # gloo's reduce has no mean
    module.set_modules_to_backward_prefetch([module])  # itself: none, where [] is the one below
