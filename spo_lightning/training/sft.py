"""SFT texts in, a warm-started model out: the short supervised stage of a model built here.

The result is cached by what it depends on, so every run with the same model, texts and settings
shares one warm start; two runs that start together train it once.
"""

import hashlib
import json
import logging
import math
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.cache.shards import cache_of
from spo_lightning.config.knobs import warm_start_steps
from spo_lightning.data.batch import Pair, collate, draws
from spo_lightning.data.encode import encode_texts
from spo_lightning.data.rows import Task
from spo_lightning.errors import Diverged, UserError
from spo_lightning.evaluation.held_out import greedy_answers
from spo_lightning.models.generate import Decoding
from spo_lightning.models.policy import Policy
from spo_lightning.models.sharing import scorer_for
from spo_lightning.records.lock import alone
from spo_lightning.records.progress import Stages, Within
from spo_lightning.training import bf16
from spo_lightning.world import World

log = logging.getLogger(__name__)

CODE = 2  # raise it when the same texts and settings come to train another model
HALF_CODE = 3  # the same of bfloat16, which has master weights since 3
WARMUP = 0.05  # share of the steps in which the rate rises
CURVE_ROWS = 500  # held-out prompts on which it is watched
CHECKS = 8  # points of the curve that is printed


def begin(cfg: DictConfig, task: Task, policy: Policy, stages: Stages) -> None:
    """The warm start that the config asks for, or that the data proposes for a built model."""
    if policy.built and not task.sft and not task.samples:
        log.warning(
            "The model is built from its config and starts untrained: model.pretrained names "
            "a checkpoint to start from"
        )
    steps = warm_start_steps(cfg)
    if steps and task.sft:
        settings: Any = {**OmegaConf.to_container(cfg.sft, resolve=True), "max_steps": steps}  # type: ignore
        how = {"max_length": cfg.max_length, "scored": cfg.data.scored}
        texts = encode_texts(task.sft, policy.tokenizer, **how)
        quality = _quality(cfg, task, policy, stages)
        warm_start(policy, texts, quality, settings, cache_of(cfg), stages)
    elif steps and cfg.sft.max_steps:
        raise UserError("sft.max_steps is set, but this data brings no SFT text: leave it out")


def _quality(
    cfg: DictConfig, task: Task, policy: Policy, stages: Stages
) -> Callable[[], float] | None:
    if task.answer_of is None or not task.held_out or task.held_out[0].get("answer") is None:
        return None
    how, rows = Decoding.of(cfg), task.held_out[:CURVE_ROWS]

    def exact_match() -> float:
        found = greedy_answers(policy, rows, task, how, Within(stages))
        return found.numbers["exact_match"]

    return exact_match


def key(policy: Policy, texts: Sequence[Pair], settings: dict[str, Any]) -> str:
    """A name for the warm start: a hash of the initial model, the token ids and the settings."""
    digest = hashlib.sha256()
    for name, value in sorted(policy.weights()):
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    read = [(t.prompt, t.chosen, *filter(None, [t.chosen_context])) for t in texts]
    parts = [settings, read]
    digest.update(json.dumps(parts, sort_keys=True).encode())
    return digest.hexdigest()[:16]


def warm_start(
    policy: Policy,
    texts: Sequence[Pair],
    quality: Callable[[], float] | None,
    settings: dict[str, Any],
    cache: Path | None,
    stages: Stages,
) -> None:
    """Train the policy on ``texts`` in place, or load what an earlier run trained.

    ``settings``: max_steps, batch_size, lr, betas, seed. ``quality``: held-out exact match.
    ``cache``: None trains anew and keeps nothing. Every process takes the whole of every batch, as
    the warm start must not depend on how many there are; the first looks into the cache and keeps.
    """
    world = stages.world
    if cache is None:
        _say(_train(policy, texts, quality, settings, stages))
        return
    code = HALF_CODE if policy.lm.dtype == torch.bfloat16 else CODE
    home = cache / "warm_starts" / key(policy, texts, {**settings, "code": code})
    with (
        alone(home.with_name(f"{home.name}.lock"), stages.check) if world.first else nullcontext()
    ):
        if world.once((home / "model.safetensors").exists):
            policy.read(home)
            log.info("Warm start: taken from %s", home)
        else:
            curve = _train(policy, texts, quality, settings, stages)
            if not _keep(policy, curve, home, world):
                policy.read(home)
    _say(json.loads((home / "curve.json").read_text()))


def _say(curve: Sequence[Sequence[float]]) -> None:
    if curve:
        log.info("Warm start, held-out exact match by step: %s", _shown(curve))


def _train(
    policy: Policy,
    texts: Sequence[Pair],
    quality: Callable[[], float] | None,
    settings: dict[str, Any],
    stages: Stages,
) -> list[tuple[int, float]]:
    steps, size = settings["max_steps"], settings["batch_size"]
    how = {"lr": settings["lr"], "betas": settings["betas"], "weight_decay": 0.0}
    adamw = partial(torch.optim.AdamW, fused=True, **how)
    optimizer = bf16.learning(adamw, "master", settings["seed"])(list(policy.lm.parameters()))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, cosine(steps, WARMUP))
    scorer = scorer_for(policy.lm, max(map(len, texts)), share=False)
    orders = draws(len(texts), size, settings["seed"], 0)
    curve: list[tuple[int, float]] = []
    began = time.monotonic()
    policy.lm.train()
    with stages.stage("warm start (SFT)", steps) as advance:
        for step in range(1, steps + 1):
            batch = collate([texts[i] for i in next(orders)], policy.tokenizer.pad_token_id)
            loss = -scorer(batch.to(policy.lm.device)).mean_chosen.mean()
            if not math.isfinite(loss.item()):
                raise Diverged(f"warm start, step {step}: the loss is not finite; lower sft.lr")
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.lm.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            advance(1, f"nll {loss.item():.3f}")
            if quality and (step % max(1, steps // CHECKS) == 0 or step == steps):
                curve.append((step, quality()))
    policy.agree(stages.world)
    seconds = time.monotonic() - began
    log.info("Warm start: %d steps of %d texts, %.0f s", steps, size, seconds)
    return curve


def cosine(steps: int, warmup: float) -> Callable[[int], float]:
    """Linear rise over the share ``warmup`` of the steps, then half a cosine, squared, to zero.

    Squared, so that the rate is small (2%) by the last quarter and the model settled at its end.
    """
    rise = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return math.cos(0.5 * math.pi * min(1.0, (step - rise) / max(1, steps - rise))) ** 4

    return factor


def _keep(policy: Policy, curve: list[tuple[int, float]], home: Path, world: World) -> bool:
    """Write beside and rename: a kill in mid-write leaves no half warm start. False where another
    run, which no lock reached, has kept one meanwhile: others may read it, so it stays."""
    beside = home.with_name(f"{home.name}.{world.once(lambda: uuid4().hex)}.tmp")
    card = "The warm start (SFT) of a model built from its config.\n"
    policy.save(beside, merge=True, card=card, world=world)

    def named() -> bool:
        (beside / "curve.json").write_text(json.dumps(curve))
        if not (home / "model.safetensors").exists():
            shutil.rmtree(home, ignore_errors=True)  # somebody took from it
        try:
            beside.rename(home)
        except OSError:
            if not (home / "model.safetensors").exists():
                raise
            shutil.rmtree(beside)
            return False
        return True

    return world.once(named)


def _shown(curve: Sequence[Sequence[float]]) -> str:
    points = ", ".join(f"{step:.0f}: {value:.3f}" for step, value in curve)
    last = curve[-1]
    before = [value for step, value in curve if step <= 0.75 * last[0]]
    return points + (f" (last quarter {last[1] - before[-1]:+.3f})" if before else "")
