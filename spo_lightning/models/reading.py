"""A causal language model in, how its logits are read out.

Where they are a matrix on the last hidden states, scaled and soft-capped by a number each, the
matrix is read block by block (``head.py``). What the numbers are is measured, not looked up: the
model's own forward is given hidden states of many sizes. Any other way from hidden states to
logits is taken by the model's own forward.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models.attention import PACKED
from spo_lightning.models.head import logits_of

SIZES = torch.logspace(-2, 5, 15, dtype=torch.float64)  # of the hidden states that are shown
HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Reading:
    """Which module is run, what it is told, and how logits follow from what it returns."""

    body: str  # the module's name in the model; "" is the model itself
    logits: bool = False  # it returns logits, else hidden states
    positions: bool = True  # it is told the place of every token
    scale: float = 1.0  # of the head's logits
    cap: float | None = None  # of the scaled ones
    reward: bool = False  # the head gives a reward in place of logits

    def module(self, model: Any) -> Any:
        return model.get_submodule(self.body)

    def given(self, body: Any, words: dict[str, Any]) -> dict[str, Any]:
        """Those of ``words`` that the forward of ``body`` may be told."""
        known = inspect.signature(body.forward).parameters
        kinds = {parameter.kind for parameter in known.values()}
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            optional = ("attention_mask", "position_ids", "use_cache")
            words = {name: w for name, w in words.items() if name in known or name not in optional}
        return {n: w for n, w in words.items() if self.positions or n != "position_ids"}

    def taken(self, output: Any) -> Tensor:
        """[B, T, ...] logits or last hidden states."""
        return output.logits if self.logits else output.last_hidden_state

    def head(self, model: Any) -> Any:
        """What is called on what is ``taken``."""
        if self.reward:
            return model.score
        return nn.Identity() if self.logits else model.get_output_embeddings()

    def read(self, model: Any, states: Tensor) -> Tensor:
        """[S, vocabulary] logits, or [S, 1] rewards, of what is ``taken``; float32 at least."""
        return logits_of(self.head(model), states, self.cap, self.scale)

    @property
    def said(self) -> str | None:
        """What this costs, in one line; None where it costs nothing."""
        if not self.logits:
            return None
        return "its logits are more than a matrix on hidden states: read by its own forward, whole"


def text_config(model: Any) -> Any:
    """The config of the part that reads text."""
    return model.config.get_text_config(decoder=True)


def vocabulary_of(model: Any) -> int:
    """How many ids there are."""
    size = getattr(text_config(model), "vocab_size", None)
    return size if isinstance(size, int) else model.get_input_embeddings().weight.shape[0]


def precise(model: Any) -> bool:
    """Whether rounding stays small."""
    return model.dtype not in HALF


@contextmanager
def as_transformers(model: Any) -> Iterator[None]:
    """Attention by transformers' own definition, in which nothing is left out."""
    used = text_config(model)._attn_implementation
    training = model.training
    if used in PACKED:
        model.set_attn_implementation("eager")
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        if used in PACKED:
            model.set_attn_implementation(used)


def own_logits(model: Any, ids: Tensor) -> Tensor:
    """[B, T, vocabulary] of the model's own forward, of text alone; float64."""
    try:
        with as_transformers(model):
            whole = Reading("", logits=True)
            words = whole.given(model, {"input_ids": ids, "use_cache": False})
            return model(**words).logits.double()
    except Exception as error:  # whatever a foreign forward does, it is told in one line
        raise UserError(f"{type(model).__name__} reads no text alone: {line_of(error)}") from error


def line_of(error: Exception) -> str:
    """What an error says, in one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


@torch.no_grad()
def reading_of(model: Any) -> Reading:
    """The first way of reading the model that equals its own forward."""
    ids = _ids(model)
    own = own_logits(model, ids)
    for reading in _readings(model, ids):
        if _equal(model, reading, ids, own):
            return reading
    return Reading("", logits=True)


def _ids(model: Any) -> Tensor:
    """[1, T] one for each of SIZES, special ones left out where there are others."""
    size = vocabulary_of(model)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(min(size // 8, 1000), size, (1, len(SIZES)), generator=seeded)
    return ids.to(model.device)


def _readings(model: Any, ids: Tensor) -> Iterator[Reading]:
    """What may be right, likeliest first."""
    for name in _bodies(model):
        fitted = _fitted(model, name, ids)
        if fitted is not None:
            for positions in (True, False):
                yield Reading(name, False, positions, *fitted)
    for positions in (True, False):
        yield Reading("", True, positions)


def _bodies(model: Any) -> list[str]:
    """Names of the modules that may return the head's hidden states.

    Of a model of text and images the innermost first: it knows of no images.
    """
    embedding, base = model.get_input_embeddings(), model.base_model
    found = [
        name
        for name, module in model.named_modules()
        if name and _embeds(module, embedding) and getattr(module, "lm_head", None) is None
    ]
    if text_config(model) is not model.config:
        return found[::-1]
    return sorted(found, key=lambda name: model.get_submodule(name) is not base)


def _embeds(module: Any, embedding: Any) -> bool:
    """Whether it is a transformers model that begins with this embedding."""
    from transformers import PreTrainedModel

    if not isinstance(module, PreTrainedModel):
        return False
    try:
        return module.get_input_embeddings() is embedding
    except (NotImplementedError, AttributeError):
        return False


def _fitted(model: Any, name: str, ids: Tensor) -> tuple[float, float | None] | None:
    """Scale and cap between the head on a body's hidden states and the model's logits."""
    head, shown = model.get_output_embeddings(), []

    def show(module: nn.Module, args: Any, output: Any) -> Any:
        states = output.last_hidden_state
        seeded = torch.Generator().manual_seed(1)
        noise = torch.randn(states.shape, generator=seeded, dtype=torch.float64)
        states = (noise * SIZES[:, None]).to(states.device, states.dtype)
        shown.append(states)
        output.last_hidden_state = states
        return output

    if head is None:
        return None
    hook = model.get_submodule(name).register_forward_hook(show)
    try:
        own = own_logits(model, ids)
        plain = head(shown[0]).double()
    except (UserError, AttributeError, IndexError, RuntimeError):
        return None
    finally:
        hook.remove()
    if own.shape != plain.shape or not (own.isfinite().all() and plain.isfinite().all()):
        return None
    return _fit(own[0], plain[0], 1e-5 if precise(model) else 2e-2, _numbers(text_config(model)))


def _fit(
    own: Tensor, plain: Tensor, tolerance: float, known: list[float]
) -> tuple[float, float | None] | None:
    """(scale, cap) with own = cap * tanh(scale * plain / cap), where there are such numbers."""
    slope = (own * plain).sum(1) / plain.square().sum(1)
    scale = _nearest(slope.median().item(), known, tolerance)
    if _close(own, scale * plain, tolerance):
        return scale, None
    cap = _nearest(own.abs().max().item(), known, tolerance)
    inside = (own.abs() < 0.9 * cap) & (own.abs() > 1e-3 * cap)
    if not cap or not inside.any():
        return None
    ratio = cap * torch.atanh(own[inside] / cap) / plain[inside]
    scale = _nearest(ratio.median().item(), known, tolerance)
    return (scale, cap) if _close(own, cap * torch.tanh(scale * plain / cap), tolerance) else None


def _close(own: Tensor, found: Tensor, tolerance: float) -> bool:
    """Equal, beside the largest logit of its token."""
    return bool(((own - found).abs() <= tolerance * own.abs().amax(1, keepdim=True)).all())


def _nearest(measured: float, known: list[float], tolerance: float) -> float:
    """The number of the config, or one through it, that was measured but for rounding."""
    best = min(known, key=lambda number: abs(number - measured))
    return best if abs(best - measured) <= tolerance * abs(measured) else measured


def _numbers(config: Any) -> list[float]:
    """1, and every number of the config and one through it."""
    found = [1.0]
    for value in config.to_dict().values():
        if isinstance(value, int | float) and not isinstance(value, bool) and value:
            found += [float(value), 1 / value]
    return found


def _equal(model: Any, reading: Reading, ids: Tensor, own: Tensor) -> bool:
    """Whether a reading's logits are the model's own, on text."""
    places = torch.arange(ids.shape[1], device=ids.device)[None]
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    try:
        with as_transformers(model):
            body = reading.module(model)
            states = reading.taken(body(**reading.given(body, words | {"position_ids": places})))
            if not reading.logits:
                head = model.get_output_embeddings()
                states = logits_of(head, states, reading.cap, reading.scale)
    except Exception:  # of a foreign forward: this is not the way to read it
        return False
    if states.shape != own.shape:
        return False
    found = states[0].double().log_softmax(-1)
    return _close(own[0].log_softmax(-1), found, 1e-5 if precise(model) else 5e-2)
