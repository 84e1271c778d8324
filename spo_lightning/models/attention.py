"""Attention over a packed row: each prompt once, each response over its prompt and itself.

transformers knows it as an attention implementation of its own, ``IMPLEMENTATION``. A prompt
attends to itself, causally; a response to its prompt and itself. What lies outside is never
computed. In half precision on a GPU one call of a kernel of variable lengths takes the row. Long
stretches on the CPU get a call of sdpa each. Otherwise two calls take it, all prompts and then all
responses, and padding exists inside them only. Scores with a soft cap or with sinks, which sdpa
does not know, are computed by their definition. ``FLEX`` is the same by FlexAttention: one call
for the row, on a GPU, in any precision, that passes over blocks nobody attends to.
"""

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from spo_lightning.data.packing import Block, Tree

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None
GROUPED = varlen_attn is not None and "enable_gqa" in signature(varlen_attn).parameters

IMPLEMENTATION = "spo_lightning_tree"
FLEX = "spo_lightning_flex"
WHOLE = {
    "FORCE_USE_FLEX_ATTENTION": True
}  # its kernel for short rows has no choice for some heads
PACKED = (IMPLEMENTATION, FLEX)  # those that take a row without padding
PART = 64  # queries at once where attention matrices are kept
SHORT = 256  # tokens of the longest row up to which a CPU's attention in float32 is faster
STRETCH = 20  # mean tokens of a stretch from which on a call each is cheaper than padding
# given beside a tree, so that transformers builds no mask; of a type that no mask has
NO_MASK = torch.zeros(1, 1, 1, 1, dtype=torch.int8)


def fused() -> bool:
    """Whether kernels with a first derivative only may be taken."""
    cuda = torch.backends.cuda  # these flags hold on every device
    return cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()


def forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; [1, heads, N, head_dim] in, [1, N, heads, head_dim] out.

    Without a ``tree`` it is transformers' own sdpa.
    """
    if tree is None:
        return _without_a_tree(module, query, key, value, attention_mask, **kwargs)
    if kwargs.get("position_bias") is not None:
        raise ValueError("its attention scores have a bias by position")
    window = _window(tree, **kwargs)
    how = {"scale": kwargs.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
    how |= _beside(**kwargs)
    half = None if "cap" in how else _half(query, tree)
    if half is not None:
        return _in_one_call(query, key, value, half, tree, window, how["scale"]), None
    way = _by_stretch if _long(query, tree) else _in_rectangles
    if not _is_slow_in_half(query, tree):
        return way(query, key, value, tree, window, how)[None], None
    with torch.autocast("cpu", enabled=False):
        found = way(query.float(), key.float(), value.float(), tree, window, how)
    return found[None].to(value.dtype), None


def flex_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    tree: Tree | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """As ``forward``, by FlexAttention, which has no backward on a CPU."""
    if tree is None:
        return _without_a_tree(module, query, key, value, attention_mask, **kwargs)
    mask = tree.blocks(_window(tree, **kwargs))
    return flex_attention_forward(module, query, key, value, mask, kernel_options=WHOLE, **kwargs)


def _without_a_tree(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if attention_mask is not None and attention_mask.dtype == NO_MASK.dtype:
        raise TypeError("its layers hand no keyword arguments to their attention")
    beside = _beside(**kwargs)
    if not beside:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    how = {"scale": kwargs.get("scaling"), "enable_gqa": query.shape[1] != key.shape[1]}
    causal = attention_mask is None and query.shape[2] > 1
    found = _attend(query, key, value, attention_mask, is_causal=causal, **how, **beside)
    return found.transpose(1, 2).contiguous(), None


def _beside(softcap: float | None = None, s_aux: Tensor | None = None, **_: Any) -> dict[str, Any]:
    """What the scores have that sdpa does not know; nothing where they have nothing."""
    found = {"cap": softcap, "sinks": s_aux}
    return {} if softcap is None and s_aux is None else found


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    is_causal: bool = False,
    **how: Any,
) -> Tensor:
    """[rows, heads, width, head_dim]: sdpa, by its definition where scores are capped or sink."""
    if "cap" not in how:
        return scaled_dot_product_attention(query, key, value, mask, is_causal=is_causal, **how)
    if how["enable_gqa"]:
        groups = query.shape[1] // key.shape[1]
        key, value = (states.repeat_interleave(groups, 1) for states in (key, value))
    scale = query.shape[-1] ** -0.5 if how["scale"] is None else how["scale"]
    scores = query @ key.transpose(2, 3) * scale
    if how["cap"] is not None:
        scores = how["cap"] * torch.tanh(scores / how["cap"])
    if is_causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None:
        # finite: a row of padding attends to nothing, and must stay a number
        lowest = torch.finfo(scores.dtype).min
        seen = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, lowest) if seen else scores + mask
    return _softmax(scores, how["sinks"]).to(value.dtype) @ value


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Over keys, and over one more of its own score per head, the sink, which gives nothing."""
    wide = scores if scores.dtype == torch.float64 else scores.float()
    if sinks is None:
        return wide.softmax(-1)
    sinks = sinks.to(wide.dtype).reshape(1, -1, 1, 1).expand(*wide.shape[:-1], 1)
    return torch.cat([wide, sinks], dim=-1).softmax(-1)[..., :-1]


def _window(tree: Tree, sliding_window: int | None = None, **_: Any) -> int | None:
    """None where it reaches everywhere."""
    return None if sliding_window is None or sliding_window >= tree.longest else sliding_window


def _half(query: Tensor, tree: Tree) -> torch.dtype | None:
    """The type in which a kernel of variable lengths takes the row; None where none does."""
    if tree.stretches is None or varlen_attn is None or not fused():
        return None
    if query.shape[-1] % 8 or query.shape[-1] > 256:  # flash attention's own limits
        return None
    if query.device.type != "cuda" or not _ampere(query.device):
        return None
    dtype = query.dtype
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
    return dtype if dtype in (torch.bfloat16, torch.float16) else None


@cache
def _ampere(device: torch.device) -> bool:
    """Whether flash attention runs there."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


def _in_one_call(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dtype: torch.dtype,
    tree: Tree,
    window: int | None,
    scale: float | None,
) -> Tensor:
    """[1, N, heads, head_dim]"""
    to = tree.stretches
    assert to is not None and varlen_attn is not None
    query, key, value = (states[0].transpose(0, 1).to(dtype) for states in (query, key, value))
    grouped: Any = {"enable_gqa": query.shape[1] != key.shape[1]} if GROUPED else {}
    found: Any = varlen_attn(
        query,
        key.index_select(0, to.keys),
        value.index_select(0, to.keys),
        to.ends,
        to.key_ends,
        to.longest,
        to.most_keys,
        scale=scale,
        # so many before the last key that a query sees, and none after
        window_size=(-1 if window is None else window - 1, 0),
        **grouped,
    )
    return found[None]


def _is_slow_in_half(query: Tensor, tree: Tree) -> bool:
    """Whether float32 is faster: a CPU's backward of short attention takes three to six times as
    long in bfloat16 (forward and backward of 65 tokens 6.7 to 1.5 ms, of 158 13 to 6, of 512 33 to
    41)."""
    if query.device.type != "cpu" or tree.longest > SHORT:
        return False
    half = query.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
    return half or query.element_size() == 2


def _long(query: Tensor, tree: Tree) -> bool:
    """Whether stretches are worth a call each. Not where torch compiles: lengths are constants
    to it, and every batch would be compiled anew."""
    if query.device.type != "cpu" or not fused() or torch.compiler.is_compiling():
        return False
    return query.shape[2] >= STRETCH * (len(tree.prompts.length) + len(tree.prompt_of))


def _by_stretch(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, how: dict[str, Any]
) -> Tensor:
    """[N, heads, head_dim]; a call per prompt and per response."""
    queries, keys, values = (states.split(tree.lengths, dim=2) for states in (query, key, value))
    found = []
    for asks, own, shown, prompt in zip(queries, keys, values, tree.prompt_before):
        width = asks.shape[2]
        if not width:  # a response of one token
            continue
        if prompt is not None:
            own, shown = torch.cat([keys[prompt], own], 2), torch.cat([values[prompt], shown], 2)
        given, mask = own.shape[2] - width, None
        if given or window is not None:
            mask = torch.ones(width, given + width, dtype=torch.bool).tril(given)
            mask = mask if window is None else mask.triu(given - window + 1)
        found.append(_attend(asks, own, shown, mask, is_causal=mask is None, **how))
    return torch.cat(found, dim=2)[0].transpose(0, 1)


def _in_rectangles(
    query: Tensor, key: Tensor, value: Tensor, tree: Tree, window: int | None, how: dict[str, Any]
) -> Tensor:
    """[N, heads, head_dim]; a call for the prompts and one for the responses."""
    row = [states.transpose(1, 2)[0] for states in (query, key, value)]
    causal, seen = (None, tree.seen) if window is None else tree.seen_within(window)

    def attend(asks: Block, keys: Tensor, mask: Tensor | None) -> Tensor:
        query, key, value = (
            _rectangle(states, places) for states, places in zip(row, (asks.there, keys, keys))
        )
        if query.shape[2] > PART and ("cap" in how or not fused()):
            found = _in_parts(query, key, value, mask, **how)
        else:
            found = _attend(query, key, value, mask, is_causal=mask is None, **how)
        return found.transpose(1, 2).flatten(0, 1).index_select(0, asks.back)

    before = attend(tree.prompts, tree.prompts.there, causal)
    if not len(tree.responses.back):
        return before
    return torch.cat([before, attend(tree.responses, tree.keys, seen)])


def _in_parts(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **how: Any
) -> Tensor:
    """The same where attention matrices are kept: they end at a part's last query."""
    width, given = query.shape[2], key.shape[2] - query.shape[2]
    if mask is None:
        mask = torch.ones(width, width, dtype=torch.bool, device=query.device).tril()
    parts = []
    for start in range(0, width, PART):
        stop = min(start + PART, width)
        asks, upto = query[:, :, start:stop], given + stop
        seen = mask[..., start:stop, :upto]
        parts.append(_attend(asks, key[:, :, :upto], value[:, :, :upto], seen, **how))
    return torch.cat(parts, dim=2)


def _rectangle(row: Tensor, there: Tensor) -> Tensor:
    """[rows, heads, width, head_dim] of the row [N, heads, head_dim]."""
    return row.index_select(0, there.flatten()).view(*there.shape, *row.shape[1:]).transpose(1, 2)


for _name, _forward in ((IMPLEMENTATION, forward), (FLEX, flex_forward)):
    AttentionInterface.register(_name, _forward)
    AttentionMaskInterface.register(_name, sdpa_mask)


class MathKernel(AbstractContextManager):
    """sdpa's math kernel, which can be differentiated twice; unlike sdpa_kernel, entered again."""

    def __enter__(self) -> None:
        self.inside = sdpa_kernel(SDPBackend.MATH)
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)


def _kernels() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a layer's forward, and around its recomputation: with the kernel the forward had."""
    return nullcontext(), nullcontext() if fused() else MathKernel()


# how activations are checkpointed
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "context_fn": _kernels}
