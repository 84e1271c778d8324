"""A checkpoint's linear layers in four or eight bits, for adapters to train on; and back again.

transformers and bitsandbytes quantise. What is added here keeps the numbers the same in a step and
outside it, for one row and for many. Head and embedding stay as they are.
"""

import copy
import importlib.util
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import UserError

PLAIN = (Tensor, nn.Parameter)  # bitsandbytes' own parameters are classes of their own
RECORD = "quantization.json"  # beside adapters: in how many bits their base was


@dataclass(frozen=True)
class Bits:
    """In how many bits a model is read."""

    quantize: str  # nf4 or int8
    double_quantization: bool  # of nf4: its scales in 8 bits as well

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "Bits | None":
        """What a ``model`` config asks for."""
        if model.get("quantize") is None:
            return None
        four = model["quantize"] == "nf4"
        return cls(model["quantize"], four and model["double_quantization"])

    @classmethod
    def recorded(cls, adapters: Path) -> "Bits | None":
        """What a directory of adapters was trained on; None: weights as they are, or by others."""
        path = adapters / RECORD
        return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def record(self, adapters: Path) -> None:
        (adapters / RECORD).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def settings(self) -> Any:
        """The same as transformers is told."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UserError(
                f"weights in {self.quantize} are bitsandbytes' work: pip install "
                '"spo-lightning[bitsandbytes]"'
            )
        from transformers import BitsAndBytesConfig

        if self.quantize == "int8":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=self.quantize,
            bnb_4bit_use_double_quant=self.double_quantization,
        )


def bits_of(lm: Any) -> Bits | None:
    """In how many bits a model is; None: its weights are full, or another library's work."""
    settings = getattr(lm.config, "quantization_config", None)
    method = getattr(settings, "quant_method", None)
    if settings is None or method is None or method.value != "bitsandbytes":
        return None
    four = settings.load_in_4bit
    double = four and settings.bnb_4bit_use_double_quant
    return Bits(settings.bnb_4bit_quant_type if four else "int8", double)


def in_bits(lm: Any, bits: Bits, settings: Mapping[str, Any]) -> Any:
    """A full model that is in memory, quantised."""
    how = {"quantization_config": bits.settings(), "device_map": {"": str(lm.device)}}
    given = {"config": lm.config, "state_dict": lm.state_dict()}
    return type(lm).from_pretrained(None, **given, **settings, **how)


def prepared(lm: Any, name: str) -> Any:
    """The model, each of whose quantised layers computes in one way, without its file; refused
    where few are."""
    from transformers.pytorch_utils import Conv1D

    layers = [layer for _, layer in _layers(lm)]
    if any(getattr(layer, "source_cls", None) is Conv1D for layer in layers):
        raise UserError(
            f"model.quantize: {name} is a {type(lm).__name__}, whose matrices stand transposed: "
            "its quantised weights could not be saved; leave it out"
        )
    inside = sum(layer.in_features * layer.out_features for layer in layers)
    ends = {id(p) for end in (lm.get_input_embeddings(), lm.get_output_embeddings())
            if end is not None for p in end.parameters()}  # fmt: skip
    full = sum(p.numel() for p in lm.parameters() if p.is_floating_point() and id(p) not in ends)
    if full > inside:
        raise UserError(
            f"model.quantize: {name} is a {type(lm).__name__}, which has most of its weights "
            "outside of linear layers, where they would stay full: leave it out"
        )
    for layer in layers:
        layer.forward = partial(_eight if hasattr(layer, "state") else _four, layer)
    # on a CPU what stayed full is a view of its file, and would keep mapped what was quantised
    for tensor in (*lm.parameters(), *lm.buffers()):
        if type(tensor) in PLAIN:
            tensor.data = tensor.data.clone()
    return lm


def _four(layer: Any, x: Tensor) -> Tensor:
    """bitsandbytes' own forward without what it does in evaluation on some CPUs: there it packs
    the weights anew, in place, with scales in bfloat16."""
    from bitsandbytes.autograd._functions import matmul_4bit

    x, bias = _typed(layer, x)
    return matmul_4bit(x, layer.weight, bias=bias, quant_state=layer.weight.quant_state)


def _eight(layer: Any, x: Tensor) -> Tensor:
    """bitsandbytes' forward of training on a CPU, everywhere: its other one rounds the inputs to 8
    bits too, which moved logits by a tenth of their size between training and evaluation."""
    from bitsandbytes.autograd._functions import MatMul8bitFp

    if layer.weight.CB is not None:  # now that it is on its device
        layer.init_8bit_state()
        layer.weight.data = layer.state.CB
    x, bias = _typed(layer, x)
    return MatMul8bitFp.apply(x, layer.weight, None, bias, layer.state)


def _typed(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """In the type in which a full layer would compute: autocast's, or as it comes."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind):
        x = x.to(torch.get_autocast_dtype(kind))
    return x, None if layer.bias is None else layer.bias.to(x.dtype)


def _layers(lm: Any) -> list[tuple[str, Any]]:
    kinds = ("Linear4bit", "Linear8bitLt")
    found = [
        it for it in lm.named_modules() if type(it[1]).__module__ == "bitsandbytes.nn.modules"
    ]
    return [(name, layer) for name, layer in found if type(layer).__name__ in kinds]


def scales(lm: Any) -> Iterator[tuple[str, Tensor]]:
    """What besides the parameters decides the numbers of quantised layers."""
    for name, layer in _layers(lm):
        for key, value in layer.state_dict(prefix=f"{name}.").items():
            if key.removeprefix(f"{name}.") not in ("weight", "bias"):
                yield key.replace(".base_layer.", "."), value


@torch.no_grad()
def in_full(module: Any) -> Any:
    """A copy on the CPU, in which quantised layers are full: of what their weights stand for."""
    from transformers.integrations.bitsandbytes import dequantize_bnb_weight

    lm = getattr(module, "get_base_model", lambda: module)()  # of peft's wrapper
    own = (t for t in (*module.parameters(), *module.buffers()) if type(t) in PLAIN)
    known: dict[int, Any] = {id(t): _on_cpu(t) for t in own}
    layers = _layers(module)
    for _, layer in layers:
        full = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        weight = dequantize_bnb_weight(layer.weight, getattr(layer, "state", None))
        full.weight = nn.Parameter(weight.to("cpu", lm.dtype), requires_grad=False)
        if layer.bias is not None:
            full.bias = known[id(layer.bias)]
        known[id(layer)] = full
    twin = copy.deepcopy(module, known)
    if layers:
        plain(getattr(twin, "get_base_model", lambda: twin)())
    return twin


def _on_cpu(tensor: Tensor) -> Tensor:
    moved = tensor.detach().to("cpu", copy=True)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(moved, requires_grad=tensor.requires_grad)
    return moved


def plain(lm: Any) -> Any:
    """Weights that were dequantised are weights like any: nothing says otherwise when saved."""
    for holder in (lm.config, lm.config.get_text_config()):
        if hasattr(holder, "quantization_config"):
            del holder.quantization_config
    lm.is_quantized, lm.hf_quantizer, lm.quantization_method = False, None, None
    for name in ("is_loaded_in_4bit", "is_loaded_in_8bit"):
        setattr(lm, name, False)
    return lm
