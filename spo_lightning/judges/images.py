"""Prompts and images of them in, scores out: the data's own judge, or a model's of both.

CLIP and what was trained from it to say what people prefer (PickScore 2305.01569, HPS 2306.09341)
score alike: exp(scale) times the cosine of the embeddings of text and image.
"""

from collections.abc import Sequence
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.data.pictures import Image, Pictures
from spo_lightning.diffusion.looks import Judge
from spo_lightning.errors import UserError


def judge_of(node: DictConfig, task: Pictures, device: Any, size: int) -> Judge | None:
    """Of the ``judge`` node: a directory that it names, or else the data's own; None where the
    data has none. ``size``: images of a forward."""
    if node.get("model"):
        return _alike(node.model, device, size)
    judge = task.judge
    return judge and (lambda prompts, images: [judge(image) for image in images])


def _alike(name: str, device: Any, size: int) -> Judge:
    from transformers import AutoModel, AutoProcessor

    where = Path(name).expanduser()
    if not where.is_dir():
        raise UserError(f"judge.model={name}: no such directory: give a CLIP's, as transformers "
                        "saves it")  # fmt: skip
    how = {"local_files_only": True, "trust_remote_code": False}
    try:
        # a processor without torchvision is asked for here on purpose, and says so at length
        with redirect_stderr(StringIO()):
            processor = AutoProcessor.from_pretrained(where, **how)
        model = AutoModel.from_pretrained(where, use_safetensors=True, **how)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"judge.model={name} holds no model of texts and images with its processor: {told}"
        ) from error
    if not hasattr(model, "logit_scale") or not hasattr(processor, "image_processor"):
        raise UserError(f"judge.model={name}: {type(model).__name__} does not score how well an "
                        "image fits a text: give a CLIP's directory")  # fmt: skip
    model.to(device).eval()

    @torch.no_grad()
    def judge(prompts: Sequence[str], images: Sequence[Image]) -> list[float]:
        found: list[float] = []
        for start in range(0, len(images), size):
            given = processor(
                text=[*prompts[start : start + size]],
                images=[*images[start : start + size]],
                **{"return_tensors": "pt", "padding": True, "truncation": True},
            )
            found += model(**given.to(device)).logits_per_image.diagonal().float().tolist()
        return found

    return judge
