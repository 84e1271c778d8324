"""Adapters on a transformers model: new ones, those of a directory, and both merged into weights.

peft injects them in place, so the transformers model itself computes with them.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import UserError
from spo_lightning.models.quantized import bits_of, in_full
from spo_lightning.models.rewards import gives_rewards
from spo_lightning.world import spread_like

FILE = "adapter_model.safetensors"
UNREAD = ("base_model_name_or_path", "revision", "inference_mode", "peft_version", "auto_mapping")


def fresh(
    lm: Any, *, rank: int, alpha: float, targets: Any, dora: bool, rslora: bool, seed: int
) -> Any:
    """peft's wrapper of the model, with new low-rank adapters."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    chosen = targets if isinstance(targets, str) else list(targets)
    scale: Any = alpha  # peft declares an int and takes any number
    # peft trains the head of a reward model, whole, beside the adapters
    task = "SEQ_CLS" if gives_rewards(lm) else "CAUSAL_LM"
    how = {"use_dora": dora, "use_rslora": rslora, "task_type": task}
    settings = LoraConfig(r=rank, lora_alpha=scale, target_modules=chosen, **how)
    try:
        return get_peft_model(lm, settings)
    except ValueError as error:
        raise UserError(f"model.lora.targets={targets}: {_line(error)}") from error


def of_rewards(directory: Path) -> bool:
    """Whether a directory's adapters are of a reward model, whose head is among them."""
    settings = json.loads((directory / "adapter_config.json").read_text(encoding="utf-8"))
    return settings.get("task_type") == "SEQ_CLS"


def attached(lm: Any, directory: Path, name: str) -> tuple[Any, bool]:
    """peft's wrapper of the model with the directory's adapters, which train; whether weights of
    the model itself came with them."""
    from peft import PeftConfig, PeftModel, get_peft_model_state_dict
    from safetensors import SafetensorError

    bare = {f"base_model.model.{key}": p for key, p in lm.named_parameters(remove_duplicate=False)}
    try:
        settings = PeftConfig.from_pretrained(str(directory))
        if settings.is_prompt_learning:
            raise UserError(
                f"{name} holds {_kind(settings)}, which add tokens to the prompt: only adapters "
                "that stand in the layers are supported"
            )
        given, alters = _read(directory / FILE, bare)
        made = PeftModel.from_pretrained(lm, str(directory), is_trainable=True)
    except UserError:
        raise
    except (OSError, ValueError, RuntimeError, TypeError, KeyError, SafetensorError) as error:
        raise UserError(f"the adapters of {name} do not fit their base: {_line(error)}") from error
    own = get_peft_model_state_dict(made, save_embedding_layers=False).keys()
    strange = (own - given) | (given - own - bare.keys())  # peft only warns
    if strange:
        raise UserError(
            f"the adapters of {name} do not fit their base: of {min(strange)} one has it and the "
            "other does not"
        )
    inside = {id(p) for p in lm.parameters()}
    if any(p.requires_grad and id(p) not in inside for p in made.parameters()):
        raise UserError(f"{name} holds {_kind(settings)}, which are not supported: merge them")
    return made, alters


def _read(file: Path, bare: Mapping[str, Tensor]) -> tuple[set[str], bool]:
    """Names in a file of adapters, and whether it changes weights of the model itself."""
    from safetensors import safe_open

    with safe_open(file, "pt") as held:
        names = {key.replace(".base_layer.", "."): key for key in held.keys()}  # noqa: SIM118
        whole = [(bare[name], held.get_tensor(names[name])) for name in names.keys() & bare]
    alters = any(not mine.detach().cpu().equal(its.to(mine.dtype)) for mine, its in whole)
    return {*names}, alters


def trained(lm: Any) -> dict[str, Tensor]:
    """A copy of all that trains."""
    return {n: p.detach().clone() for n, p in lm.named_parameters() if p.requires_grad}


@contextmanager
def holding(lm: Any, values: Mapping[str, Tensor]) -> Iterator[None]:
    """The parameters hold ``values`` inside, and what they held afterwards, bit for bit.

    Between two steps only: a graph that is kept meanwhile would be of other values.
    """
    parameters = dict(lm.named_parameters())
    kept = {name: parameters[name].detach().clone() for name in values}
    _write(parameters, values)
    try:
        yield
    finally:
        _write(parameters, kept)


def _write(parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(spread_like(value, parameters[name]))


def settings_of(module: Any) -> dict[str, Any]:
    """What besides their weights decides what the adapters compute: kind, scale, layers."""
    return {
        name: {
            key: sorted(value) if isinstance(value, set) else value  # a set has no order
            for key, value in settings.to_dict().items()
            if key not in UNREAD
        }
        for name, settings in module.peft_config.items()
    }


def write(module: Any, directory: Path, base: str) -> None:
    """The adapters alone, with the name of the base on which they stand."""
    for settings in module.peft_config.values():
        settings.base_model_name_or_path = base
    bits = bits_of(module.get_base_model())
    # "auto" would look for the base's config on the hub
    module.save_pretrained(directory, save_embedding_layers=False)
    if bits is not None:
        bits.record(directory)


def merged(module: Any) -> Any:
    """A transformers model of its own, on the CPU, with the adapters merged into its weights.

    A copy, as merging and taking out again rounds.
    """
    twin = in_full(module)
    if bits_of(module.get_base_model()) is not None:
        twin = _anew(twin)
    _untie(twin)
    try:
        return twin.merge_and_unload()
    except (NotImplementedError, AttributeError, ValueError) as error:
        kinds = ", ".join(_kind(settings) for settings in module.peft_config.values())
        raise UserError(f"{kinds} cannot be merged: {_line(error)}") from error


def _anew(module: Any) -> Any:
    """The same adapters, put into layers that have become full: peft's for quantised ones would
    round what is merged."""
    from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    held = get_peft_model_state_dict(module, save_embedding_layers=False)
    settings = module.peft_config["default"]
    bare = module.unload()
    if hasattr(bare, "peft_config"):
        del bare.peft_config
    made = get_peft_model(bare, settings)
    set_peft_model_state_dict(made, held)
    return made


def _untie(module: Any) -> None:
    """A matrix that two layers share, of which one has adapters, becomes two: merged, they
    differ."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    owners: dict[int, int] = {}
    for layer in module.modules():
        weight = layer._parameters.get("weight")
        if weight is not None:
            owners[id(weight)] = owners.get(id(weight), 0) + 1
    for layer in module.modules():
        base = layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else None
        weight = None if base is None else base._parameters.get("weight")
        if base is not None and weight is not None and owners[id(weight)] > 1:
            base.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
            config = module.get_base_model().config
            config.tie_word_embeddings = False
            config.get_text_config().tie_word_embeddings = False


def _kind(settings: Any) -> str:
    return f"adapters of type {getattr(settings.peft_type, 'value', settings.peft_type)}"


def _line(error: BaseException) -> str:
    """What the innermost error says, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return " ".join(str(error).split())[:300]
