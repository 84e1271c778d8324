"""An objective from its yaml and a tiny policy in, a finished Lightning fit and its log out."""

import contextlib
import copy
import logging
import warnings
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from lightning import Callback, Trainer
from omegaconf import OmegaConf
from pairs import CONF
from tiny import random_pairs
from torch.utils.data import DataLoader

from spo_lightning import losses
from spo_lightning.data.sets import Pairs
from spo_lightning.models.scorer import Beside, Scorer, score
from spo_lightning.records.progress import silent
from spo_lightning.training.feed import mismatches
from spo_lightning.training.module import Preference
from spo_lightning.training.outer_steps import OuterSteps
from spo_lightning.training.reference import MovingReference
from spo_lightning.training.sharding import processes
from spo_lightning.world import ALONE

PAD_ID = 257
SGD = partial(torch.optim.SGD, lr=0.05)
# fmt: off
SOLVERS = {  # what the command line would say
    "none": ["solver=none"],
    "penalty": ["solver=penalty"],
    "softplus": ["solver=penalty", "solver/phi=softplus", "solver.margin=0.05"],
    "linear": ["solver=penalty", "solver/phi=linear"],
    "mean": ["solver=penalty", "solver/level=mean", "solver/value=running_min"],
    "ramp": ["solver=penalty", "solver/schedule=ramp", "solver.schedule.steps=3"],
    "inner": ["solver=penalty", "solver/value=inner", "solver.value.steps=2"],
    "dual": ["solver=penalty", "solver/phi=linear", "solver/schedule=dual"],
    "barrier": ["solver=penalty", "solver/phi=linear", "solver/schedule=barrier"],
    "unrolled": ["solver=unrolled", "solver.steps=2", "solver.lower_lr=0.05"],
    "first": ["solver=unrolled", "solver/apply=hypergradient", "solver.lower_lr=0.05"],
    "second": [
        "solver=unrolled", "solver/apply=hypergradient", "solver.apply.order=second",
        "solver.steps=2", "solver.lower_lr=0.05",
    ],
    "preconditioned": ["solver=unrolled", "solver/inner=preconditioned", "solver.lower_lr=1e-4"],
    "implicit": ["solver=implicit"],
    "coin": ["solver=alternating"],
    "gap": ["solver=alternating", "solver/pick=gap", "solver.pick.every=2"],
}
# fmt: on


def config(*overrides):
    """What the command line would say, composed once and given to each who asks as its own."""
    return copy.deepcopy(_composed(*overrides))


@lru_cache(maxsize=64)
def _composed(*overrides):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*overrides])


def objective(*overrides):
    """The loss and the solver of a command line."""
    cfg = config(*overrides)
    loss = instantiate(OmegaConf.to_container(cfg.loss, resolve=True))
    return losses.assembled(loss), instantiate(cfg.solver), cfg.loss.beta


@dataclass
class Watch(Callback):
    """Numbers, rates and live tensors of every outer step."""

    numbers: list = field(default_factory=list)
    rates: list = field(default_factory=list)
    parameters: list = field(default_factory=list)
    keep: bool = False

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(self, trainer, module, *_):
        self.numbers.append(dict(module.numbers))
        if self.keep:
            self.parameters.append(snapshot(module))


@dataclass
class Fit:
    """What a fit leaves behind."""

    module: Preference
    trainer: Trainer
    watch: Watch

    @property
    def numbers(self):
        return self.watch.numbers


def snapshot(module):
    return {name: p.detach().clone() for name, p in module.trainable().items()}


def scored(lm, pairs=None, shift=None):
    """The pairs with the model's own log-probabilities as reference, each moved by ``shift``."""
    pairs = random_pairs(12) if pairs is None else pairs
    bare = Pairs(pairs, None, PAD_ID)
    found = score(
        Scorer(lm, True),
        bare,
        batches=bare.batches(5),
        precision=contextlib.nullcontext,
        stages=silent(),
        title="reference",
    )
    if shift is None:
        return found
    return replace(
        found, references=[r + shift(number, r) for number, r in enumerate(found.references)]
    )


def mismatched(lm, given, steps, batch_size):
    """What such a fit reads of prompts with others' answers, under the model as it is now."""
    cfg = {"max_steps": steps, "batch_size": batch_size, "seed": 0, "max_length": 512}
    sets = {"train": given, "held-out": given}
    return scored(lm, mismatches(OmegaConf.create(cfg), sets, 1)["mismatched"].pairs)


def fitted(
    made,
    chosen,
    given=None,
    *,
    steps=3,
    batch_size=8,
    micro=8,
    tokens=None,
    optimizer=SGD,
    clip_norm=None,
    schedule=lambda step: 1.0,
    callbacks=(),
    watch=None,
    lower=None,
    whole_batch=False,
    accelerator="cpu",
    scorer=None,
    beside=None,
    moving=None,
    world=ALONE,
):
    """Drive ``Preference`` through Lightning's Trainer as ``fit.py`` does."""
    loss, solver, beta = chosen
    given = scored(made.lm) if given is None else given
    scorer = scorer or Scorer(made.lm, True)
    if losses.asks(loss, "divergences"):
        scorer.beside = beside or Beside(copy.deepcopy(scorer), contextlib.nullcontext)
    module = Preference(
        scorer,
        loss,
        solver,
        optimizer,
        beta=beta,
        whole_batch=whole_batch,
        batch_size=batch_size,
        clip_norm=clip_norm,
        schedule=schedule,
        log_every=1,
        moving=moving or MovingReference(),
    )
    watch = Watch() if watch is None else watch
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    trainer = Trainer(
        accelerator=accelerator,
        **processes(world, scorer, "64-true" if made.lm.dtype == torch.float64 else "32-true"),
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch, *callbacks],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    others = mismatched(made.lm, given, steps, batch_size) if losses.asks(loss, "kl") else None
    how = {"tokens": tokens, "lower": lower, "mismatched": others}
    data = OuterSteps(given, module, micro=micro, seed=0, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, DataLoader(data, batch_size=None))
    return Fit(module, trainer, watch)
