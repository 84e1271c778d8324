"""The ``model`` node of a config in, a pipeline out: built small, or any diffusers directory."""

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.diffusion.pipeline import (
    WORDS,
    Classes,
    Encoded,
    Folded,
    Pipeline,
    Texts,
    Words,
)
from spo_lightning.errors import UserError

DENOISERS = ("unet", "transformer")  # what a pipeline calls its own


def opened(model: DictConfig, words: Sequence[str], seed: int, device: Any) -> Pipeline:
    """The pipeline on its device. ``words``: of the data's prompts, for one that is built."""
    if find_spec("diffusers") is None:
        raise UserError('model=diffusion needs diffusers: pip install "spo-lightning[diffusion]"')
    if model.pretrained is None:
        made = _built(OmegaConf.to_container(model.config, resolve=True), words, seed)
    else:
        made = loaded(model.pretrained)
    frozen = getattr(made.codec, "vae", None), getattr(made.told, "encoder", None)
    for part in (made.denoiser, *frozen):
        if part is not None:
            part.to(device).requires_grad_(part is made.denoiser).eval()  # dropout would be noise
    return made


def _built(config: Any, words: Sequence[str], seed: int) -> Pipeline:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    if not words:
        raise UserError(
            "model.pretrained is not set, and this data brings no words that a model could be "
            "built for: name a diffusers directory, or take data=shapes"
        )
    patch, longest, side = (config.pop(key) for key in ("patch", "longest", "side"))
    schedule = config.pop("schedule")
    if side % patch:
        raise UserError(f"model.config.patch={patch} does not divide model.config.side={side}")
    channels = {"in_channels": 3 * patch**2, "out_channels": 3 * patch**2}
    torch.manual_seed(seed)
    try:
        denoiser = UNet2DConditionModel(
            sample_size=side // patch, cross_attention_dim=len(words), **channels, **config
        )
        scheduler = DDPMScheduler(**schedule)
    except (TypeError, ValueError, NotImplementedError) as error:
        raise UserError(f"model.config: {' '.join(str(error).split())}") from error
    return Pipeline(denoiser, scheduler, Folded(patch, side), Words(words, longest), True)


def loaded(name: str) -> Pipeline:
    """A directory that this package saved, or a pipeline of diffusers; no code of its own runs."""
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    where = Path(name).expanduser()
    if not where.is_dir():
        raise UserError(f"model.pretrained={name}: no such directory: give a diffusers pipeline's")
    try:
        if (where / WORDS).exists():
            return _own(where)
        whole: Any = DiffusionPipeline.from_pretrained(
            str(where), use_safetensors=True, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
        told = f"holds no pipeline of diffusers: {' '.join(str(error).split())[:200]}"
        raise UserError(f"model.pretrained={name} {told}") from error
    return _of_diffusers(whole, name)


def _own(where: Path) -> Pipeline:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    own = json.loads((where / WORDS).read_text(encoding="utf-8"))
    denoiser: Any = UNet2DConditionModel.from_pretrained(where / "unet", use_safetensors=True)
    scheduler = DDPMScheduler.from_pretrained(where / "scheduler")
    side = denoiser.config.sample_size * own["patch"]
    told = Words(own["words"], own["longest"])
    return Pipeline(denoiser, scheduler, Folded(own["patch"], side), told, False)


def _of_diffusers(whole: Any, name: str) -> Pipeline:
    """Its parts, where they are of a kind that is read here."""
    parts = whole.components
    denoiser: Any = next((parts[part] for part in DENOISERS if parts.get(part) is not None), None)
    kinds = {part: type(it).__name__ for part, it in parts.items() if it is not None}

    def refused(why: str) -> UserError:
        return UserError(f"model.pretrained={name}: {type(whole).__name__} {why}")

    if denoiser is None:
        raise refused("has neither a unet nor a transformer")
    if parts.get("vae") is None or not hasattr(parts["vae"], "quant_conv"):
        raise refused("has no autoencoder of the kind AutoencoderKL")
    config = denoiser.config
    if any(part in kinds for part in ("text_encoder_2", "text_encoder_3", "prior")):
        raise refused("has more than one text encoder, which is not read yet")
    if config.get("addition_embed_type") is not None:
        raise refused("asks for more than its prompt (addition_embed_type), which is not read yet")
    if kinds.get("text_encoder", "").startswith("CLIP"):
        told: Any = Texts(parts["tokenizer"], parts["text_encoder"])
    elif config.get("num_embeds_ada_norm"):
        labels = getattr(whole, "labels", None) or {}
        told = Classes(labels, config.num_embeds_ada_norm)
    else:
        raise refused("has no CLIP text encoder and no classes, and others are not read yet")
    scale = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    codec = Encoded(parts["vae"], config.sample_size * scale)
    return Pipeline(denoiser, whole.scheduler, codec, told, False)


def adapted(pipeline: Pipeline, lora: DictConfig, seed: int) -> None:
    """New adapters in the denoiser's layers, which alone train from now on; rank 0 adds none."""
    if not lora.rank:
        return
    from peft import LoraConfig, inject_adapter_in_model

    targets = OmegaConf.to_container(lora.targets)
    torch.manual_seed(seed)
    # peft types its targets as a list, and a config's node is one
    settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)  # type: ignore
    try:
        inject_adapter_in_model(settings, pipeline.denoiser)
    except ValueError as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(f"model.lora.targets={lora.targets}: {told}") from error


def merged(pipeline: Pipeline) -> None:
    """Adapters become part of the weights, so that what is saved is a denoiser like any other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in [*pipeline.denoiser.named_modules()]:
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, last = name.rpartition(".")
            setattr(pipeline.denoiser.get_submodule(parent), last, layer.get_base_layer())
    if hasattr(pipeline.denoiser, "peft_config"):
        del pipeline.denoiser.peft_config
