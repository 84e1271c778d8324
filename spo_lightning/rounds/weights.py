"""Weights of two rounds in, those that the next one begins with out; the loop's start, kept."""

import shutil
from pathlib import Path
from typing import Any

import torch

from spo_lightning.models.policy import Policy, of_config
from spo_lightning.run.record import Begun, walk
from spo_lightning.run.sampling import STAGES
from spo_lightning.world import World

STARTING = ("data", "policy", "warm start")  # the stages after which a policy is the start


def start(begun: Begun, directory: Path) -> None:
    """A policy that was built or warm-started here, as a directory, so that rounds can name it."""
    at = walk([stage for stage in STAGES if stage.name in STARTING], begun)
    keep(at.policy, directory, "The start of a loop.\n", begun.world)


@torch.no_grad()
def ahead(last: Any, now: Any, alpha: float, world: World) -> Policy:
    """theta + alpha (theta - theta of the round before), of two configs that name their models.
    Accelerated PO, He et al. 2410.06293."""
    policy, before = (of_config(cfg, world.device) for cfg in (now, last))
    earlier = dict(before.lm.named_parameters())  # tied ones stand there once
    for name, value in policy.lm.named_parameters():
        here = value.double()
        value.copy_(here + alpha * (here - earlier[name].double()))
    return policy


def keep(policy: Policy, directory: Path, card: str, world: World) -> None:
    """Written beside and renamed: a kill leaves no half of it."""
    beside = directory.with_name(f"{directory.name}.tmp")  # a loop has one writer
    policy.save(beside, merge=True, card=card, world=world)
    if world.first:
        shutil.rmtree(directory, ignore_errors=True)
        beside.rename(directory)
    world.barrier()
