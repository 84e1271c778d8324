"""What every diagnostic is given when it is built, and at which outer steps it looks.

A diagnostic is a callback built from a node of ``conf/diagnostics`` as ``Class(setting, **node)``.
It adds its numbers to ``module.numbers``, whose row the Recorder writes after it, and declares in
``names`` the columns that it may fill. It changes no parameter, state or random stream.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from spo_lightning.data.sets import Pairs
from spo_lightning.world import ALONE, World


@dataclass(frozen=True)
class Setting:
    """The run as its diagnostics see it."""

    directory: Path  # of the run, for files of their own
    train: Pairs
    held: Pairs
    batch_size: int  # pairs per forward without gradients
    precision: Callable[[], AbstractContextManager]  # of forwards outside Lightning's
    world: World = ALONE
    quality: Callable[[], dict[str, float]] = dict  # what the policy's held-out answers come to
    mismatched: Pairs | None = None  # held-out prompts with others' answers, where asked for


def due(step: int, every: int) -> bool:
    """Whether outer step ``step`` (from 1) is looked at; the first always is."""
    return step == 1 or step % every == 0
