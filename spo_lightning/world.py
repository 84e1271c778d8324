"""The processes that walk a run together: which of them this is, and what they tell each other.

Every process takes every stage. Work is dealt over them, numbers are sums and counts, and what
only one may do (read a cache, write a file) the first does ``once`` for all.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

if TYPE_CHECKING:
    import torch

Item = TypeVar("Item")
Value = TypeVar("Value")


class Turn(NamedTuple):
    """One of a process's turns when work is dealt."""

    item: Any
    mine: bool  # False: all have taken theirs, and this one is done again so that turns are equal
    together: Sequence[Any]  # what all processes do in this turn


@dataclass(frozen=True)
class World:
    """Process ``rank`` of ``size``; by default the only one, which sends nothing."""

    rank: int = 0
    size: int = 1
    place: Callable[[], Any] = field(default=lambda: "cpu", repr=False)  # finds the device
    group: Any = field(default=None, repr=False)  # of torch.distributed, over the CPU
    # what ended a stage here, or what ended another process, where only the connection is lost
    reason: Callable[[BaseException], BaseException] = field(default=lambda e: e, repr=False)

    @cached_property
    def device(self) -> Any:
        """Where this process computes; looked for when it is first asked for, as torch is slow to
        import."""
        return self.place()

    @property
    def first(self) -> bool:
        """Whether this process writes the run directory and the terminal."""
        return self.rank == 0

    def deal(self, items: Sequence[Item]) -> Iterator[Turn]:
        """The items over all processes, in turns; every process has equally many.

        A model whose parameters are spread over processes computes only where all take part: so
        one without an item of its own takes the turn's first again, and does not count it.
        """
        for start in range(0, len(items), self.size):
            together = items[start : start + self.size]
            mine = self.rank < len(together)
            yield Turn(together[self.rank if mine else 0], mine, together)

    def gather(self, value: Value) -> list[Value]:
        """Every process's value, by rank."""
        if self.size == 1:
            return [value]
        import torch.distributed as dist

        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value, group=self.group)
        return found

    def once(self, work: Callable[[], Value], by: int = 0) -> Value:
        """What ``work`` gives in process ``by``, in all of them; what it raises, too."""
        if self.size == 1:
            return work()
        import torch.distributed as dist

        told: list[Any] = [None, None]
        if self.rank == by:
            try:
                told[0] = work()
            except Exception as error:
                told[1] = error
        dist.broadcast_object_list(told, src=by, group=self.group)
        if told[1] is not None:
            raise told[1]
        return told[0]

    def sum(self, values: "torch.Tensor") -> "torch.Tensor":
        """The values summed over processes, where they were."""
        if self.size == 1:
            return values
        import torch.distributed as dist

        total = values.cpu()
        dist.all_reduce(total, group=self.group)
        return total.to(values.device)

    def agree(self, tensors: "Iterable[torch.Tensor]") -> None:
        """Every process's tensors become the first's: two machines may round apart."""
        if self.size == 1:
            return
        import torch.distributed as dist

        for tensor in tensors:
            told = tensor.detach().cpu()
            dist.broadcast(told, src=0, group=self.group)
            tensor.detach().copy_(told)

    def barrier(self) -> None:
        """Wait until all are here."""
        self.gather(None)


ALONE = World()


def whole(tensor: "torch.Tensor") -> "torch.Tensor":
    """The tensor itself; of one that is spread over processes all parts together, in each."""
    gathered: Any = getattr(tensor, "full_tensor", None)  # of torch's DTensor alone
    return tensor if gathered is None else gathered()


def spread_like(tensor: "torch.Tensor", like: "torch.Tensor") -> "torch.Tensor":
    """A tensor that every process has whole, as ``like`` is: whole, or this process's part."""
    if getattr(like, "full_tensor", None) is None or hasattr(tensor, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    of: Any = like
    value = tensor.to(like.device)
    return distribute_tensor(value, of.device_mesh, of.placements, src_data_rank=None)
