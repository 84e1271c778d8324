"""Raw rows in, validated rows out: ``{prompt, chosen, rejected}`` as text or as messages.

A new source is a function that returns a ``Task``, and a yaml in ``conf/data`` that names it.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from spo_lightning.errors import UserError

ROLES = ("system", "user", "assistant", "tool", "developer")
KEPT = {"answer": (str, int, float), "tools": list, "chat_template_kwargs": dict}

Row = dict[str, Any]
Found = tuple[str, int, Row]  # a row, the file it stands in and its number there


class Rows(list[Row]):
    """Rows as they were read; each can be named by its own file and its number there."""

    def __init__(self, found: Iterable[Found]):
        places = []
        for file, number, row in found:
            places.append((file, number))
            self.append(row)
        self.places = places

    def named(self, at: int) -> str:
        """The row at ``at``, for messages."""
        file, number = self.places[at]
        return f"{file}, row {number}"


@dataclass(frozen=True)
class Chunk:
    """Consecutive training rows of a file too large to hold, and each one's place in the file."""

    number: int
    rows: list[Row]
    places: list[int]


@dataclass(frozen=True)
class Dropped:
    """Rows of a file that became no pair, for one reason."""

    count: int
    examples: list[tuple[str, Row]]  # up to three: where each stands, and the row as it stands


@dataclass(frozen=True)
class Task:
    """What a source returns; with ``samples`` > 0 rows are ``{prompt, answer}``, pairs follow."""

    train: list[Row]
    held_out: list[Row]
    sft: list[Row] = field(default_factory=list)  # {prompt, completion}
    lower: list[Row] = field(default_factory=list)  # the same, for G in place of the chosen
    answer_of: Callable[[str], str | None] | None = None  # the final answer in a completion
    judge: Callable[[str], float] | None = None  # the score win_rate compares
    summary: bool = False  # ROUGE is reported
    samples: int = 0  # on-policy answers per prompt; 0: the pairs are given
    temperature: float = 1.0
    given: bool = False  # the training pairs are, by data.pairs, also where ``samples`` > 0
    # the chunks from the given number on, where ``train`` is the first of them; given a second
    # number, of so many the first; None: ``train`` is all
    chunks: Callable[..., Iterator[Chunk]] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    layout: str | None = None  # of a file of the user's: the name that data.layout takes
    notes: tuple[str, ...] = ()  # what a user is told of the rows, a line each
    dropped: dict[str, Dropped] = field(default_factory=dict)  # by reason, before tokens are made
    unpaired: list[Row] = field(default_factory=list)  # {prompt, completion, label}: all of KTO's

    @property
    def compares(self) -> bool:
        """Whether rows have two answers, or will have; texts have a chosen one alone."""
        first = (*self.train[:1], *self.held_out[:1])
        return self.samples > 0 or all("rejected" in row for row in first)


def parsed(text: str, where: str, line: int) -> Any:
    """The JSON that begins in ``line``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{where}:{line + error.lineno - 1}"
        raise UserError(f"{at}: broken JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}:{line}: unreadable JSON ({error})") from None


def kind_of(value: Any) -> str:
    """What a value is, in words."""
    names = {type(None): "null", bool: "a boolean", str: "text", list: "a list", dict: "an object"}
    return names.get(type(value), "a number" if isinstance(value, int | float) else "binary")


def prompt_key(prompt: str | list[Row]) -> str:
    """The text that stands for a prompt: what splits and duplicates go by."""
    return prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True)


def _fraction(prompt: str | list[Row]) -> float:
    digest = hashlib.sha256(prompt_key(prompt).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def held_out(prompt: str | list[Row], fraction: float) -> bool:
    """Whether a prompt is on the held-out side: a function of its text and nothing else."""
    return _fraction(prompt) < fraction


def split(rows: list[Row], eval_fraction: float) -> tuple[list[Row], list[Row]]:
    """Train and held-out rows, disjoint by prompt; neither is empty if two prompts differ."""
    share = share_of(rows, eval_fraction)
    train = [row for row in rows if not held_out(row["prompt"], share)]
    return train, [row for row in rows if held_out(row["prompt"], share)]


def share_of(rows: list[Row], eval_fraction: float) -> float:
    """The share nearest ``eval_fraction`` at which neither side of the rows is empty."""
    if not 0 <= eval_fraction < 1:
        raise UserError(f"data.eval_fraction={eval_fraction}: choose 0 <= eval_fraction < 1")
    places = sorted({_fraction(row["prompt"]) for row in rows})
    if not eval_fraction or len(places) < 2:
        return eval_fraction
    return min(max(eval_fraction, places[1]), places[-1])


def without(rows: list[Row], others: list[Row]) -> list[Row]:
    """The rows whose prompt is not among the others' prompts."""
    taken = {prompt_key(row["prompt"]) for row in others}
    return [row for row in rows if prompt_key(row["prompt"]) not in taken]


def limit(rows: list[Row], max_rows: int | None, seed: int) -> list[Row]:
    """At most ``max_rows`` of the rows: a seeded subsample, in their order."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    if max_rows < 1:
        raise UserError(f"data.max_rows={max_rows}: choose at least 1, or null for all")
    kept = random.Random(seed).sample(range(len(rows)), max_rows)
    return [rows[place] for place in sorted(kept)]
