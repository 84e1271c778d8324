"""The ``model`` config in, its shape out: what its weights are, and a few of its blocks to run.

Blocks are alike, so two and three of them tell what a block is, and any number is those plus so
many more. No weight is loaded or made: tensors have a shape, and are on no device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from spo_lightning.errors import UserError
from spo_lightning.models import adapters
from spo_lightning.models.foreign import auto_class, without_dropout
from spo_lightning.models.policy import DTYPES
from spo_lightning.models.quantized import Bits
from spo_lightning.models.reading import text_config
from spo_lightning.models.sources import Source, found
from spo_lightning.plan.memory import COUNTED, autocast

BYTES = 258  # tokens of a model that is built here
FEW = 32  # tokens of a model whose blocks are run: its ends are reckoned
BLOCKS = (2, 3)  # how many are made


@dataclass(frozen=True)
class Size:
    """Numbers of a model, or of a part of it; weights are counted, not bytes."""

    weights: float  # all but the adapters
    matrices: float  # those of them that every token meets: not the embedding, not the head
    trained: float
    bytes: float  # as they are held
    largest: float  # of a block: the matrix

    def more(self, other: "Size", times: int) -> "Size":
        """This and so many times what the other has beyond it."""
        pairs = zip(vars(self).values(), vars(other).values())
        return Size(*(mine + times * (its - mine) for mine, its in pairs))


@dataclass(frozen=True)
class Shape:
    """A model that nobody made."""

    size: Size
    block: Size
    blocks: int
    heads: int  # times their width: what attention multiplies
    width: int
    vocabulary: int
    ends: int  # weights of the embedding and of the head; one where they are tied
    tied: bool
    itemsize: int  # bytes of a weight in full
    each: int  # of a trained one
    small: Callable[[int], Any]  # the model with so many blocks, and few tokens


def shape_of(cfg: DictConfig) -> Shape:
    """Of the config's model, with its adapters."""
    config, model = config_of(cfg.model), cfg.model
    text = config.get_text_config(decoder=True)
    blocks = text.num_hidden_layers
    two, three = (_size(cfg, _cut(config, some)) for some in BLOCKS)
    block = Size(*(its - mine for mine, its in zip(vars(two).values(), vars(three).values())))
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return Shape(
        two.more(three, blocks - BLOCKS[0]),
        replace(block, largest=two.largest),
        blocks,
        heads=heads * width,
        width=text.hidden_size,
        vocabulary=text.vocab_size,
        ends=text.vocab_size * text.hidden_size,
        tied=text.tie_word_embeddings,
        itemsize=DTYPES[model.dtype].itemsize,
        each=4 if model.lora.rank else DTYPES[model.dtype].itemsize,
        small=lambda some: _small(cfg, _cut(config, some, vocab_size=FEW)),
    )


def config_of(model: DictConfig) -> Any:
    """transformers' config of the model: from the checkpoint, or as the yaml gives its shape."""
    from transformers import AutoConfig

    named, shape = "config", {**model.config, "vocab_size": BYTES}
    if model.pretrained is not None:
        there = _read(found(model.pretrained))
        if there is not None:
            return there
        if not model.get("shape"):
            raise UserError(
                f"{model.pretrained}: its config.json is not at hand: give a directory that holds "
                "it, or its shape, as conf/model/llama3-8b.yaml does"
            )
        named, shape = "shape", {**model.shape}
    try:
        return AutoConfig.for_model(**shape)
    except Exception as error:  # of transformers' own checks, which are many
        raise UserError(f"model.{named}: {' '.join(str(error).split())}") from error


def _read(source: Source) -> Any:
    """None where it is not on this machine."""
    from transformers import AutoConfig

    if source.adapters:
        raise UserError(f"{source.name} holds adapters: plan with their base, and model.lora.rank")
    gguf = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoConfig.from_pretrained(source.where, local_files_only=True, **gguf)
    except Exception:  # whatever a reader makes of a stranger's file
        return None


def _cut(config: Any, blocks: int, **more: Any) -> Any:
    """The same config with so many blocks."""
    found = type(config).from_dict(config.to_dict())
    text = found.get_text_config(decoder=True)
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:blocks]
    for name, value in {"num_hidden_layers": blocks, "pad_token_id": None, **more}.items():
        setattr(text, name, value)
    return found


def _made(cfg: DictConfig, config: Any) -> tuple[Any, nn.Module]:
    """On no device: the model itself, and its wrapper with adapters, if it has any."""
    with torch.device("meta"):
        how = {"dtype": DTYPES[cfg.model.dtype], "attn_implementation": "eager"}
        lm = auto_class(config).from_config(config, **how)
        if not cfg.model.lora.rank:
            return lm, lm
        keys = ("rank", "alpha", "targets", "dora", "rslora")
        words = {key: cfg.model.lora[key] for key in keys}
        return lm, adapters.fresh(lm, **words, seed=cfg.seed)


def _size(cfg: DictConfig, config: Any) -> Size:
    lm, module = _made(cfg, config)
    learns = {p for p in module.parameters() if p.requires_grad}
    own = {p for p in lm.parameters() if not (cfg.model.lora.rank and p in learns)}
    tables = {it.weight for it in lm.modules() if isinstance(it, nn.Embedding)}
    apart = tables | {lm.get_output_embeddings().weight}
    matrices = [p.numel() for p in own - apart if p.ndim > 1]
    bits, itemsize = Bits.of(cfg.model), DTYPES[cfg.model.dtype].itemsize
    held = sum(p.numel() * p.element_size() for p in own | learns)
    return Size(
        weights=sum(p.numel() for p in own),
        matrices=sum(matrices),
        trained=sum(p.numel() for p in learns),
        bytes=held - sum(_saved(count, bits, itemsize) for count in matrices),
        largest=max(matrices),
    )


def _saved(count: int, bits: Bits | None, itemsize: int) -> float:
    """Bytes that a matrix takes less than in full."""
    if bits is None:
        return 0
    if bits.quantize == "int8":
        return count * (itemsize - 1)
    # a scale for 64 weights: 4 bytes, or 1 and for 256 of them 4
    scale = (1 + 4 / 256) / 64 if bits.double_quantization else 4 / 64
    return count * (itemsize - 0.5 - scale)


def _small(cfg: DictConfig, config: Any) -> Any:
    """A model on no device, set as the run would set it."""
    lm, _ = _made(cfg, config)
    without_dropout(lm)
    lm.set_attn_implementation(COUNTED)
    if text_config(lm)._attn_implementation != COUNTED:
        raise UserError(f"{type(lm).__name__} has an attention of its own, which is not reckoned")
    if cfg.hardware.precision == "bf16-mixed":
        autocast(lm)
    if cfg.hardware.activation_checkpointing:
        lm.gradient_checkpointing_enable({"use_reentrant": False})
    return lm.train()
