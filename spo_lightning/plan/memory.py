"""Blocks without weights in; bytes that they hold in a forward and a backward out.

transformers' own code goes by on tensors that have a shape and no bytes, of two and of three
blocks, and each is counted from when it appears until nobody holds it. Between blocks the count is
read, so that every part of the backward has its own peak, which grows with the blocks by as much
as the third added.
"""

import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from spo_lightning.models.attention import NO_MASK

COUNTED = "spo_lightning_counted"  # transformers' name of the attention below


@dataclass(frozen=True)
class Rows:
    """So many pairs, all of these lengths: a row without padding, as in ``data/packing.py``."""

    pairs: int
    prompt: int
    completion: int
    answers: int = 2
    wide: bool = False  # attended to in float32, whatever the precision

    @property
    def tokens(self) -> int:
        """Of the row: an answer's last token predicts nothing."""
        return self.pairs * (self.prompt + self.answers * (self.completion - 1))

    @property
    def scored(self) -> int:
        return self.pairs * self.answers * self.completion

    @property
    def keys(self) -> int:
        """That are copied: an answer's own, behind its prompt's."""
        return self.pairs * self.answers * (self.prompt + self.completion - 1)

    @property
    def scores(self) -> int:
        """Of queries and keys, where attention matrices are kept."""
        return self.pairs * self.prompt**2 + self.keys * (self.completion - 1)


@dataclass(frozen=True)
class Peaks:
    """Bytes at the peak of each part of a step; weights and embedding, head and logits apart."""

    forward: float
    left: float  # when the forward is over: what backward will ask for
    top: float  # backward of the last block
    bottom: float  # of the first, when all gradients are there

    def plus(self, other: "Peaks", times: float) -> "Peaks":
        """This and so many times what the other has beyond it."""
        both = zip(vars(self).values(), vars(other).values())
        return Peaks(*(mine + times * (its - mine) for mine, its in both))


class Alive(TorchDispatchMode):
    """Bytes of the tensors that are alive, but for those that were there before."""

    def __init__(self, before: Iterable[Tensor]):
        super().__init__()
        self.sizes: dict[int, int] = {t.untyped_storage()._cdata: 0 for t in before}
        self.now = self.peak = 0
        self.parts: list[int] = []

    def close(self, *_: Any) -> None:
        """A part of the step ends here."""
        self.parts.append(self.peak)
        self.peak = self.now

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


class Attended(torch.autograd.Function):
    """What a fused kernel holds: queries, keys, values, its output and a float per query; and two
    matrices, where ``scores`` says how large they are."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, rows: Rows, scores: int
    ) -> Tensor:
        ctx.key, ctx.dtype = key.shape, query.dtype
        query, key, value = (it.float() if rows.wide else it for it in (query, key, value))
        more = [it.new_empty(1, it.shape[1], rows.keys, it.shape[3]) for it in (key, value)]
        out = query.new_empty(query.shape).transpose(1, 2)
        floats = query.shape[1] * (query.shape[2] + 2 * scores)
        own = (key, value) if rows.wide else ()  # prompts' are parts of these
        held = query.new_empty(floats, dtype=torch.float32)
        ctx.save_for_backward(query, *more, out, held, *own)
        return out.to(ctx.dtype)

    @staticmethod  # torch declares any number of slopes, and each function has its own
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        query, key, value, *_ = ctx.saved_tensors
        beside = torch.empty_like(key), torch.empty_like(value)
        found = (torch.empty_like(query), *(key.new_empty(ctx.key) for _ in beside))
        return *(it.to(ctx.dtype) for it in found), None, None


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    rows: Rows,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface, of which nothing is computed."""
    # no fused kernel knows capped scores, or sinks: see models/attention.py
    scores = 0 if softcap is None and s_aux is None else rows.scores
    found: Any = Attended.apply(query, key, value, rows, scores)
    return found, None


AttentionInterface.register(COUNTED, attend)
AttentionMaskInterface.register(COUNTED, sdpa_mask)


class Rounded(torch.autograd.Function):
    """A weight's copy in bfloat16 that autocast keeps, which is counted by itself."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return copy.view_as(copy)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return slope.to(ctx.dtype), None


def autocast(lm: nn.Module) -> None:
    """Linear layers as under autocast, which torch has for no device but real ones."""

    def rounded(layer: nn.Linear) -> Any:
        copy = layer.weight.detach().to(torch.bfloat16)
        layer.register_buffer("rounded", copy, persistent=False)

        def forward(x: Tensor) -> Tensor:
            weight = layer.weight
            kept: Any = Rounded.apply(weight, copy) if weight.requires_grad else weight.bfloat16()
            bias = None if layer.bias is None else layer.bias.bfloat16()
            return nn.functional.linear(x.bfloat16(), kept, bias)

        return forward

    for layer in [it for it in lm.modules() if isinstance(it, nn.Linear)]:
        if layer.weight.dtype == torch.float32:
            layer.forward = rounded(layer)


def of_step(lm: Any, rows: Rows, again: bool) -> Peaks:
    """Of a microbatch with its gradients; ``again``: those of an earlier one are there."""
    body, blocks = _body(lm)
    alive = Alive([*body.parameters(), *body.buffers()])
    hooks = [block.register_forward_hook(_closing(alive)) for block in blocks]
    for _ in range(1 + again):
        alive.parts.clear()
        alive.peak = alive.now
        with alive:
            picked = _run(body, rows)
            alive.close()
            left = alive.now
            picked.backward(torch.empty_like(picked))
            del picked
        alive.close()
    for hook in hooks:
        hook.remove()
    for p in body.parameters():
        p.grad = None
    forward, _, top, *rest = alive.parts
    return Peaks(forward, left, top, rest[-1] if rest else top)


@torch.no_grad()
def of_look(lm: Any, rows: Rows) -> Peaks:
    """Of a forward without gradients: the reference's scoring, held-out numbers."""
    body, _ = _body(lm)
    alive = Alive([*body.parameters(), *body.buffers()])
    with alive:
        picked = _run(body, rows)
        left = alive.now
        del picked
    return Peaks(alive.peak, left, 0, 0)


def _run(body: Any, rows: Rows) -> Tensor:
    """[S, width] states that predict the scored tokens."""
    ids = torch.empty(1, rows.tokens, dtype=torch.long, device="meta")
    how = {"position_ids": ids, "attention_mask": NO_MASK.to("meta"), "rows": rows}
    states = body(input_ids=ids, use_cache=False, **how).last_hidden_state
    return states[0].index_select(0, ids.new_empty(rows.scored))


def _body(lm: Any) -> tuple[Any, nn.ModuleList]:
    body = lm.get_submodule(lm.base_model_prefix)
    lists = [it for it in body.modules() if isinstance(it, nn.ModuleList)]
    return body, max(lists, key=lambda it: sum(p.numel() for p in it.parameters()))


def _closing(alive: Alive) -> Any:
    """Once a block's output has its gradient, the backward of what stands above it is over."""

    def hook(block: nn.Module, given: Any, output: Any) -> None:
        states = output[0] if isinstance(output, tuple) else output
        states.register_hook(alive.close)

    return hook
