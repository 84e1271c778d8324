"""A task in, what is asked out; judged answers in, the pairs that the strategy chooses out."""

from collections.abc import Iterator, Sequence
from typing import Any

from spo_lightning.data.rows import Row, Task
from spo_lightning.errors import UserError
from spo_lightning.run.judging import called
from spo_lightning.run.record import Read


def rows(at: Read) -> Read:
    """The data's own training rows."""
    if at.cfg.loop.answers + at.cfg.loop.beside < 2:
        raise UserError("loop.answers=1: a judge tells answers apart: draw at least 2")
    return at


def pairs(cfg: Any, task: Task, drawn: Sequence[dict]) -> Iterator[Row]:
    """As ``sample`` makes them."""
    from spo_lightning.sampling.draw import chosen

    return chosen(cfg, drawn, called(cfg.strategy, "strategy"))
