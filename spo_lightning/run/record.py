"""What a run knows after each of its stages: every record is the one before and what was added.

A stage takes one of these and gives the next, so what it may rely on stands in its type.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.data.rows import Task
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.held_out import HeldOut
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.models.policy import Policy
    from spo_lightning.models.scorer import Scorer
    from spo_lightning.records.progress import Stages
    from spo_lightning.sampling.pairing import Places
    from spo_lightning.training.feed import Feed, Mismatched
    from spo_lightning.world import World

Next = TypeVar("Next")


@dataclass(frozen=True)
class Begun:
    """Before the first stage."""

    cfg: "DictConfig"
    world: "World"
    stages: "Stages"
    seconds: dict[str, float]  # by stage, as each ends


@dataclass(frozen=True)
class Read(Begun):
    """Rows of text, and what the data can tell of an answer."""

    task: "Task"


@dataclass(frozen=True)
class Opened(Read):
    """A model with its tokenizer."""

    policy: "Policy"
    precision: Callable[[], AbstractContextManager]  # of forwards outside Lightning's


@dataclass(frozen=True)
class Paired(Opened):
    """Pairs of text in ``task``, and the held-out rows that are answered."""

    places: "Places"


@dataclass(frozen=True)
class Tokenised(Paired):
    """Token pairs of both sides, what became of the training rows, and how batches are read."""

    scorer: "Scorer"
    sets: "dict[str, Pairs]"
    counts: dict[str, int]


@dataclass(frozen=True)
class Referenced(Tokenised):
    """Every pair with its reference's log-probabilities."""

    train: "Pairs"
    held: "Pairs"
    lower: "Pairs | None"  # the lower level's own texts; None: the chosen responses
    feed: "Feed | None"  # the training pairs, where ``train`` has the first chunk only
    mismatched: "Mismatched"  # prompts with others' answers, where the loss asks for them


@dataclass(frozen=True)
class Measured(Referenced):
    """The held-out numbers before training, and what a win is counted against."""

    before: "HeldOut"
    against: "Against | None"  # None: nothing is judged


@dataclass(frozen=True)
class Trained(Measured):
    """A policy that has been trained ``steps`` outer steps."""

    steps: int


@dataclass(frozen=True)
class Ended(Trained):
    """The held-out numbers after training."""

    after: "HeldOut"


@dataclass(frozen=True)
class Stage:
    """One step of a run."""

    name: str  # in progress, in status.json and in the seconds of metrics.json
    work: Callable[[Any], Any]  # the record after it, of the record before
    cost: str  # what it takes
    again: str  # how a run goes on that was killed in it


def walk(stages: Sequence[Stage], record: Any) -> Any:
    """The record after the last stage."""
    for stage in stages:
        record.stages.note(stage.name, 0, 1)
        began = time.monotonic()
        record = stage.work(record)
        record.seconds[stage.name] = round(time.monotonic() - began, 3)
    return record


def grown(into: type[Next], record: Any, /, **added: Any) -> Next:
    """The record with more in it; a field that it has already is replaced."""
    return into(**{**vars(record), **added})
