"""Pictures with their prompts in, a denoiser that draws out: the SFT stage of one built here.

Cached by what it depends on, as the warm start of a language model is (``sft.py``).
"""

import logging
import math
import time
from contextlib import nullcontext
from typing import Any
from uuid import uuid4

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.cache.shards import cache_of
from spo_lightning.config.knobs import warm_start_steps
from spo_lightning.data.batch import draws
from spo_lightning.data.pictures import Pictures
from spo_lightning.diffusion.batch import Draws, ImagePair, ImagePairs
from spo_lightning.diffusion.objective import Schedule, constant
from spo_lightning.diffusion.pipeline import Pipeline
from spo_lightning.diffusion.scorer import ImageScorer
from spo_lightning.diffusion.store import key_of, latents_of, name_of, weights_of
from spo_lightning.errors import Diverged, UserError
from spo_lightning.records.disk import writing
from spo_lightning.records.lock import alone
from spo_lightning.records.progress import Stages
from spo_lightning.training.sft import WARMUP, cosine

log = logging.getLogger(__name__)

CODE = 1  # raise it when the same pictures and settings come to train another denoiser


def begin(cfg: DictConfig, task: Pictures, pipeline: Pipeline, stages: Stages) -> None:
    """The denoiser learns the task's pictures in place, or what an earlier run learned of them."""
    from safetensors.torch import load_file, save_file

    steps = warm_start_steps(cfg)
    if not steps:
        return
    if not task.texts:
        raise UserError("sft.max_steps is set, but this data brings no pictures: leave it out")
    # a container of a node of keys is a dict, whatever its type says
    settings: Any = {**OmegaConf.to_container(cfg.sft, resolve=True), "max_steps": steps}  # type: ignore
    texts = [(row.prompt, name_of(row.chosen)) for row in task.texts]
    cache, denoiser = cache_of(cfg), pipeline.denoiser
    # a name with "_" in front is diffusers' own note, in another order in every process
    noise = sorted((k, it) for k, it in pipeline.scheduler.config.items() if k[0] != "_")
    about = weights_of(denoiser), noise, texts, settings, CODE
    file = None if cache is None else cache / "denoisers" / f"{key_of(*about)}.safetensors"
    with nullcontext() if file is None else alone(file.with_suffix(".lock"), stages.check):
        if file is not None and file.exists():
            denoiser.load_state_dict(load_file(file))
            log.info("Pretrained: taken from %s", file)
            return
        _train(cfg, task, pipeline, settings, stages)
        if file is not None:
            beside = file.with_name(f".{file.stem}.{uuid4().hex}.tmp")
            with writing(file):
                save_file({n: it.contiguous() for n, it in denoiser.state_dict().items()}, beside)
                beside.replace(file)


def _train(
    cfg: DictConfig, task: Pictures, pipeline: Pipeline, settings: Any, stages: Stages
) -> None:
    """AdamW on the plain mean of squared errors, at one time and noise a picture."""
    steps, size, seed = (settings[key] for key in ("max_steps", "batch_size", "seed"))
    schedule, denoiser = Schedule.of(pipeline.scheduler), pipeline.denoiser
    scorer = ImageScorer(denoiser, schedule, scale=1.0, weights=constant(schedule))
    rows = [
        ImagePair(row.prompt, name_of(row.chosen), "", at) for at, row in enumerate(task.texts)
    ]
    latents = latents_of(pipeline, (row.chosen for row in task.texts), cfg)
    told = {prompt: pipeline.told(prompt) for prompt in {row.prompt for row in rows}}
    pictures, noise = ImagePairs(rows, latents, told), Draws(seed, 1, len(schedule))
    how = {"lr": settings["lr"], "betas": tuple(settings["betas"]), "weight_decay": 0.0}
    optimizer = torch.optim.AdamW(denoiser.parameters(), fused=True, **how)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, WARMUP))
    orders, began, seen = draws(len(rows), size, seed, 0), time.monotonic(), []
    denoiser.train()
    with stages.stage("pretraining", steps) as advance:
        for step in range(1, steps + 1):
            batch = noise.of(pictures.batch(next(orders)), step).to(scorer.device)
            loss = -scorer(batch).chosen.mean()
            seen.append(loss.item())
            if not math.isfinite(seen[-1]):
                raise Diverged(f"pretraining, step {step}: the loss is not finite; lower sft.lr")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
            optimizer.step()
            rate.step()
            advance(1, f"error {seen[-1]:.4f}")
    denoiser.eval()
    last = seen[-max(1, steps // 10) :]
    told_of = (steps, size, time.monotonic() - began, seen[0], sum(last) / len(last))
    log.info("Pretrained: %d steps of %d pictures, %.0f s; error %.4f to %.4f", *told_of)
