"""The ``model`` config in, a model without weights out: tensors have shapes, and no bytes."""

from dataclasses import dataclass
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from spo_lightning.errors import UserError
from spo_lightning.models import adapters, attention
from spo_lightning.models.foreign import auto_class, take_attention, without_dropout
from spo_lightning.models.policy import DTYPES, OWN
from spo_lightning.models.quantized import Bits
from spo_lightning.models.reading import Reading, text_config
from spo_lightning.models.scorer import FLOATS, Scorer
from spo_lightning.models.sources import found

BYTES = 258  # tokens of a model that is built here


@dataclass(frozen=True)
class Imagined:
    """A model of fake tensors, and what is counted of it."""

    scorer: Scorer
    weights: int  # bytes, adapters included
    parameters: int  # without adapters
    trained: int  # parameters
    each: int  # bytes of a trained parameter
    linear: int  # parameters of the layers' matrices, each of which meets every token
    head: int
    largest: int  # parameters of the largest matrix

    @property
    def layers(self) -> tuple[int, int]:
        """How many, and how wide their attention is."""
        config = text_config(self.scorer.model)
        width = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        return config.num_hidden_layers, width * config.num_attention_heads


def config_of(model: DictConfig) -> Any:
    """transformers' config of the model: as the yaml gives its shape, or from the checkpoint."""
    from transformers import AutoConfig

    if model.pretrained is None:
        shape = {**OmegaConf.to_container(model.config, resolve=True), "vocab_size": BYTES}  # type: ignore[dict-item]
    elif model.get("shape"):
        shape: Any = OmegaConf.to_container(model.shape, resolve=True)
    else:
        return _read(model.pretrained)
    try:
        return AutoConfig.for_model(**shape)
    except Exception as error:  # of transformers' own checks, which are many
        told = " ".join(str(error).split())
        raise UserError(f"model.{'shape' if model.pretrained else 'config'}: {told}") from error


def _read(name: str) -> Any:
    from transformers import AutoConfig

    source = found(name)
    if source.adapters:
        raise UserError(f"{name} holds adapters: plan with their base, and model.lora.rank")
    gguf = {} if source.gguf is None else {"gguf_file": source.gguf}
    try:
        return AutoConfig.from_pretrained(source.where, local_files_only=True, **gguf)
    except Exception as error:  # whatever a reader makes of a stranger's file
        raise UserError(
            f"{name}: its config.json is not at hand: give a directory that holds it, or its "
            "shape, as conf/model/llama3-8b.yaml does"
        ) from error


def imagined(cfg: DictConfig) -> Imagined:
    """The model of the config, with the adapters and the attention that the run would have."""
    config, model = config_of(cfg.model), cfg.model
    dtype, bits = DTYPES[model.dtype], Bits.of(model)
    with torch.device("meta"):
        how = {"dtype": dtype, "attn_implementation": "eager"}
        lm = auto_class(config).from_config(config, **how)
        without_dropout(lm)
        take_attention(lm, OWN["auto"])
        full = sum(p.numel() for p in lm.parameters())
        head, ends = lm.get_output_embeddings().weight, {*_ends(lm)}
        matrices = [m.weight for m in lm.modules() if isinstance(m, nn.Linear)]
        linear = [w.numel() for w in matrices if id(w) not in ends]
        weights = full * dtype.itemsize - sum(_saved(n, bits, dtype.itemsize) for n in linear)
        module = lm
        if model.lora.rank:
            keys = ("rank", "alpha", "targets", "dora", "rslora")
            module = adapters.fresh(lm, **{key: model.lora[key] for key in keys}, seed=cfg.seed)
    _fake(module)
    learns = [p for p in module.parameters() if p.requires_grad]
    if model.lora.rank:
        weights += sum(p.numel() * p.element_size() for p in learns)
    if cfg.hardware.activation_checkpointing:
        lm.gradient_checkpointing_enable(attention.RECOMPUTED)
    lm.train()
    logits = cfg.hardware.logits_mib * FLOATS
    reading = Reading(lm.base_model_prefix)
    return Imagined(
        Scorer(lm, model.share_prompt, logits, reading),
        weights=weights,
        parameters=full,
        trained=sum(p.numel() for p in learns),
        each=learns[0].element_size(),
        linear=sum(linear),
        head=head.numel(),
        largest=max(linear),
    )


def _fake(module: nn.Module) -> None:
    """From tensors on no device, which meet no others, to fake ones on the CPU: what meets one of
    these becomes one, and a real batch keeps its lengths."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    with FakeTensorMode(allow_non_fake_inputs=True):
        for layer in module.modules():
            for held in (layer._parameters, layer._buffers):
                for name, tensor in held.items():
                    if tensor is not None and tensor not in made:
                        there = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                        learns = tensor.requires_grad
                        parameter = isinstance(tensor, nn.Parameter)
                        made[tensor] = nn.Parameter(there, learns) if parameter else there
                    held[name] = None if tensor is None else made[tensor]  # type: ignore[index]


def _ends(lm: Any) -> list[int]:
    """Embedding and head."""
    return [id(end.weight) for end in (lm.get_input_embeddings(), lm.get_output_embeddings())]


def _saved(count: int, bits: Bits | None, itemsize: int) -> float:
    """Bytes that a matrix takes less than in full."""
    if bits is None:
        return 0
    if bits.quantize == "int8":
        return count * (itemsize - 1)
    # a scale for 64 weights: 4 bytes, or 1 and for 256 of them 4
    scale = (1 + 4 / 256) / 64 if bits.double_quantization else 4 / 64
    return count * (itemsize - 0.5 - scale)
