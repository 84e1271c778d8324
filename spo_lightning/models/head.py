"""Hidden states in, log-probabilities of the scored tokens out; logits are read block by block.

A block is some columns of the vocabulary for all scored tokens, so that its logits, their
exponentials and the gradient are read while they are in a processor's cache.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

# logits of a block: on a CPU they stay in its cache; a GPU's kernels want many
BLOCK = {"cpu": 2**20, "cuda": 2**25}
EVEN = 64  # columns, of which a block has a multiple: a GPU's kernels want their rows aligned


class HeadLogps(torch.autograd.Function):
    """[S] log-softmax at ``targets`` of ``hidden`` [S, width] by ``weight`` [vocabulary, width].

    In float32 at least. ``keep``: backward finds the logits kept, in the type of ``hidden``; else
    it computes them again, and no more than ``most`` are ever there. First order only.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        cap: float | None,
        most: int,
        keep: bool,
    ) -> Tensor:
        ctx.columns, ctx.cap = _columns(hidden, most), cap
        kept: list[Tensor] = []
        found = _wide(hidden.new_full(targets.shape, -torch.inf))
        total = found.double()  # in float32 hundreds of blocks would add up to 3e-4 nats a token
        for own, there, part in _blocks(weight, targets, ctx.columns):
            logits = hidden @ part.T
            if keep:
                kept.append(logits)
            logits = _capped(_wide(logits), cap)
            total = torch.logaddexp(total, logits.logsumexp(1).double())
            found = torch.where(there, logits.gather(1, own).squeeze(1), found)
        total = total.to(found.dtype)
        ctx.save_for_backward(hidden, weight, targets, total, *kept)
        return found - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets, total, *kept = ctx.saved_tensors
        to_hidden, to_weight = ctx.needs_input_grad[:2]
        slope = torch.zeros_like(hidden, dtype=total.dtype)
        own_slope = torch.empty_like(weight) if to_weight else None
        for number, (own, there, part) in enumerate(_blocks(weight, targets, ctx.columns)):
            logits = _capped(_wide(kept[number] if kept else hidden @ part.T), ctx.cap)
            found = (logits - total[:, None]).exp_().mul_(-gradient[:, None])
            found.scatter_add_(1, own, torch.where(there, gradient, 0)[:, None])
            if ctx.cap:
                found *= 1 - (logits / ctx.cap).square()
            found = found.to(hidden.dtype)
            if to_hidden:
                slope += found @ part
            if own_slope is not None:
                rows = own_slope.narrow(0, number * ctx.columns, len(part))
                torch.mm(found.T, hidden, out=rows)
        return slope.to(hidden.dtype) if to_hidden else None, own_slope, None, None, None, None


def _columns(hidden: Tensor, most: int) -> int:
    """Of a block."""
    count = min(most, BLOCK.get(hidden.device.type, BLOCK["cpu"])) // max(1, len(hidden))
    return max(1, count // EVEN * EVEN or count)


def _blocks(
    weight: Tensor, targets: Tensor, columns: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per block: [S, 1] the targets' columns in it, [S] whether they are in it, its weights."""
    for start, part in zip(range(0, len(weight), columns), weight.split(columns)):
        own = targets - start
        yield own.clamp(0, len(part) - 1)[:, None], (own >= 0) & (own < len(part)), part


def _wide(logits: Tensor) -> Tensor:
    """In float32 at least."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _capped(logits: Tensor, cap: float | None) -> Tensor:
    return cap * torch.tanh(logits / cap) if cap else logits


def logits_of(head: nn.Module, hidden: Tensor, cap: float | None, scale: float = 1.0) -> Tensor:
    """[S, vocabulary] in float32 at least, scaled, then soft-capped where there is a ``cap``."""
    logits = _wide(head(hidden))
    return _capped(logits if scale == 1 else scale * logits, cap)


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a matrix and no more: no bias, no adapter, no quantized weights."""
    return type(head) is nn.Linear and head.bias is None


def fused_logps(
    head: nn.Linear,
    hidden: Tensor,
    targets: Tensor,
    cap: float | None,
    most: int,
    scale: float = 1.0,
) -> Tensor:
    """[S] log-probability of each target under a head that ``is_plain``; first order only.

    ``most``: how many logits may be alive at once. Where all are fewer, backward finds them kept.
    """
    weight, kind = head.weight, hidden.device.type
    if scale != 1:  # of the logits: the head is linear
        hidden = scale * hidden
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    keep = torch.is_grad_enabled() and len(targets) * len(weight) <= most
    return HeadLogps.apply(hidden, weight, targets, cap, most, keep)


def read_logps(head: Any, *how: Any) -> Tensor:
    """The same; of a head that is spread by its own method, in which it is whole."""
    own = getattr(head, "logps", None)
    return fused_logps(head, *how) if own is None else own(*how)


def plain_logps(logits: Tensor, targets: Tensor) -> Tensor:
    """[S] log-probability of each target, differentiable any number of times."""
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
