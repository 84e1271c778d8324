"""A config of transformers in, the class that opens it; a model of any class, made deterministic
and given the package's attention."""

import logging
from typing import Any

from torch import nn

from spo_lightning.models.reading import text_config

log = logging.getLogger(__name__)


def auto_class(config: Any) -> Any:
    """Which of transformers' factories builds and loads a config as a language model, or as the
    reward model that it says it is.

    Of what reads images too, the class for text alone where transformers has one.
    """
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForImageTextToText,
        AutoModelForSequenceClassification,
    )
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    )

    if str((config.architectures or [""])[0]).endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification
    kind, remote = type(config), getattr(config, "auto_map", None) or {}
    text = kind in MODEL_FOR_CAUSAL_LM_MAPPING or "AutoModelForCausalLM" in remote
    images = kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if images and not text else AutoModelForCausalLM


def without_dropout(lm: nn.Module) -> None:
    """Rewards are differences of two scorings: dropout, of layers too, would make them noise."""
    for module in lm.modules():
        for name, value in list(vars(module).items()):
            random = isinstance(module, nn.Dropout) or "drop" in name or "jitter" in name
            if random and isinstance(value, float):
                setattr(module, name, 0.0)


def take_attention(lm: Any, implementation: str) -> None:
    """Give a model the package's attention; says so where the model has no place for it."""
    if lm._can_set_attn_implementation():
        lm.set_attn_implementation(implementation)
    if text_config(lm)._attn_implementation != implementation:
        name = type(lm).__name__
        log.info("Batches are padded, not packed: %s has an attention of its own.", name)
