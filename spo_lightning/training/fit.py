"""Prepared pairs and an objective in, a trained policy out: the part that runs under Lightning."""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import hydra.utils
import torch
from lightning import Callback, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.data import DataLoader

from spo_lightning.data.sets import Pairs
from spo_lightning.diffusion.reference import Beside
from spo_lightning.errors import Interrupted, UserError
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.directory import RunDir, without_secrets
from spo_lightning.records.progress import Stages, quiet
from spo_lightning.training import bf16
from spo_lightning.training.callbacks.evaluation import Evaluation
from spo_lightning.training.callbacks.quality import Quality
from spo_lightning.training.callbacks.reading import Reading
from spo_lightning.training.callbacks.recorder import Recorder
from spo_lightning.training.callbacks.setting import Setting
from spo_lightning.training.callbacks.start import StartCheck
from spo_lightning.training.feed import Feed, Mismatched
from spo_lightning.training.microbatch import trainable
from spo_lightning.training.module import Preference
from spo_lightning.training.outer_steps import OuterSteps
from spo_lightning.training.reference import MovingReference
from spo_lightning.training.sharding import processes
from spo_lightning.world import spread_like


@dataclass(frozen=True)
class Material:
    """What preference training works on."""

    scorer: Scorer
    train: Pairs
    held: Pairs
    lower: Pairs | None  # the lower level's own texts; None: the chosen responses
    feed: Feed | None  # the training pairs, where ``train`` has the first chunk only
    mismatched: Mismatched  # prompts with others' answers, where the loss asks for them
    moving: MovingReference | Beside  # a reference whose numbers are not the pairs' own
    precision: Callable[[], AbstractContextManager]  # of forwards outside Lightning's
    quality: Callable[[], dict[str, float]]  # what the policy's held-out answers come to
    wins: Callable[[], dict[str, float]]  # how often a few of them are preferred


class GoesOn(NamedTuple):
    """A checkpoint that a run goes on from."""

    path: Path
    done: int  # outer steps
    weights: Mapping[str, Tensor]  # what was trained

    def refuse_another(self, scorer: Scorer) -> None:
        """A checkpoint whose trained weights are not the scorer's."""
        named = {f"scorer.{name}": p for name, p in trainable(scorer).items()}
        mine = {name: p.shape for name, p in named.items()}
        theirs = {name: value.shape for name, value in self.weights.items()}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"ckpt_path={self.path} belongs to another architecture: {name} is "
                    f"{theirs.get(name)} there and {mine.get(name)} here"
                )

    def restore(self, scorer: Scorer) -> None:
        """The scorer's weights become the checkpoint's."""
        own = trainable(scorer)
        with torch.no_grad():
            for name, value in self.weights.items():
                mine = own[name.removeprefix("scorer.")]
                mine.copy_(spread_like(value, mine))


def fit(
    cfg: DictConfig,
    given: Material,
    loss: Any,
    solver: Any,
    steps: int,
    goes_on: GoesOn | None,
    run: RunDir,
    stages: Stages,
) -> int:
    """Preference training; the policy is trained in place. The outer steps taken."""
    if goes_on is not None and goes_on.done >= steps:
        goes_on.restore(given.scorer)
        return steps
    quiet()  # Lightning, which is imported only here
    module = module_of(cfg, given.scorer, loss, solver, steps, given.moving)
    beside = {"feed": given.feed, "mismatched": given.mismatched.train, "world": stages.world}
    data = OuterSteps.of(cfg, module, given.train, given.lower, **beside)
    trainer = Trainer(
        accelerator=cfg.hardware.accelerator,
        **processes(stages.world, given.scorer, lightning_precision(cfg.hardware)),
        max_steps=steps,
        max_epochs=-1,
        callbacks=_callbacks(cfg, given, data.epoch, run, stages, steps),
        logger=_loggers(cfg, run) if stages.world.first else False,
        default_root_dir=run.path,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
    )
    loader, status = DataLoader(data, batch_size=None), "failed"
    path = None if goes_on is None else str(goes_on.path)
    try:
        trainer.fit(module, loader, ckpt_path=path, weights_only=True)
        status = "success"
    finally:
        for logger in trainer.loggers:
            logger.finalize(status)
    module.to(stages.world.device)  # Lightning leaves it on the CPU
    if given.feed is not None:
        given.feed.tell()
    return module.outer_step  # a callback may have stopped it early


def steps_alone(cfg: DictConfig, data: OuterSteps, steps: int, watch: Callback) -> None:
    """The first steps of a run that leaves no file, for who times or watches them."""
    quiet()
    trainer = Trainer(
        accelerator=cfg.hardware.accelerator,
        devices=1,
        precision=lightning_precision(cfg.hardware),
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    try:
        trainer.fit(data.module, DataLoader(data, batch_size=None))
    except SIGTERMException as error:  # Lightning has taken the signal over
        raise Interrupted(143, "stopped by SIGTERM") from error


def module_of(
    cfg: DictConfig,
    scorer: Scorer,
    loss: Any,
    solver: Any,
    steps: int,
    moving: MovingReference | Beside,
) -> Preference:
    """The module that one run trains; also what the bench times."""
    return Preference(
        scorer,
        loss,
        solver,
        optimizer_of(cfg),
        beta=cfg.loss.beta,
        whole_batch=cfg.loss.get("whole_batch", False),
        batch_size=cfg.batch_size,
        clip_norm=cfg.clip_norm,
        schedule=Schedule(cfg.optimizer.schedule, steps, cfg.optimizer.warmup),
        log_every=cfg.log.every_n_steps,
        moving=moving,
    )


def optimizer_of(cfg: DictConfig) -> bf16.Make:
    """What makes the optimizer of parameters; schedule, warmup and bf16 are not its own."""
    node: Any = OmegaConf.to_container(cfg.optimizer, resolve=True)
    del node["schedule"], node["warmup"]
    how = node.pop("bf16", "plain")  # a run that began before there was this key goes on as it did
    return bf16.learning(hydra.utils.instantiate(node, _convert_="all"), how, cfg.seed)


def lightning_precision(hardware: DictConfig) -> Any:
    """What Lightning is told. bf16-true: nothing, as the weights are in bfloat16 when it begins.

    Its plugin rounds what is left in float32 too: adapters, and the frequencies of rotary
    positions, which the reference was scored with and ``model/`` is loaded with.
    """
    return {"bf16-true": "32-true"}.get(hardware.precision, hardware.precision)


def _callbacks(
    cfg: DictConfig,
    given: Material,
    epoch: Callable[[int, int], float],
    run: RunDir,
    stages: Stages,
    steps: int,
) -> list[Any]:
    looks = (cfg.eval.batch_size, given.precision, stages.world, given.quality)
    setting = Setting(run.path, given.train, given.held, *looks, given.mismatched.held)
    evaluation = Evaluation(setting, epoch=epoch, every=cfg.eval.every_n_steps)
    diagnostics = [
        hydra.utils.instantiate(node, _partial_=True, _convert_="all")(setting)
        for node in cfg.diagnostics.values()
        if node.every_n_steps > 0
    ]
    judged = OmegaConf.select(cfg, "eval.judge.every_n_steps")
    if judged:
        alone = replace(setting, quality=given.wins)
        diagnostics.append(Quality(alone, every_n_steps=judged))
    recorder = Recorder(
        run,
        stages,
        columns=[name for watch in (evaluation, *diagnostics) for name in watch.names],
        max_steps=steps,
        checkpoint_every=cfg.checkpoint.every_n_steps,
        monitor=cfg.checkpoint.monitor,
        mode=cfg.checkpoint.mode,
    )
    watching = [evaluation, *diagnostics, recorder]
    if given.feed is not None:
        watching.append(Reading(given.feed))
    # a denoiser is compared at draws that are not made yet
    if not given.scorer.predicts or given.scorer.reading.reward:
        return watching
    if cfg.model.reference is not None:  # then the policy does not start as its reference
        return watching
    check = StartCheck(
        given.train,
        seed=cfg.seed,
        size=cfg.micro_batch_size,
        half=cfg.hardware.precision.startswith("bf16"),
        precision=given.precision,
    )
    return [*watching, check]


class Schedule:
    """The rate at an outer step as a share of ``optimizer.lr``: warm-up, then a shape."""

    def __init__(self, shape: str, steps: int, warmup: float):
        self.shape, self.steps, self.rise = shape, steps, round(steps * warmup)

    def __call__(self, step: int) -> float:
        if step < self.rise:
            return (step + 1) / self.rise
        return SHAPES[self.shape]((step - self.rise) / max(1, self.steps - self.rise))


SHAPES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "linear": lambda done: max(0.0, 1.0 - done),
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * min(1.0, done))),
}


def _loggers(cfg: DictConfig, run: RunDir) -> list[Any]:
    config = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    return [
        # partial: as arguments of instantiate, `config` would clash and its _target_s be called
        hydra.utils.instantiate(node, _partial_=True, _convert_="all")(
            run_dir=run.path, config=config
        )
        for node in cfg.logger.values()
    ]
