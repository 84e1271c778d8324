"""Stories: an opening, its true continuation, and the continuation of another story.

One text file, stories separated by ``<|endoftext|>``; what follows the last separator is ignored.
"""

import random
import re

from spo_lightning.data.reading import text
from spo_lightning.data.rows import Row, Task, limit, split, without
from spo_lightning.errors import UserError

SEPARATOR = "<|endoftext|>"


def stories(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    opening_words: int,
    continuation_words: int | None,
) -> Task:
    """True continuations against those of other stories on the same side of the split."""
    if path is None:
        raise UserError(
            "data.path is not set: name a text file of stories, one <|endoftext|> each"
        )
    if opening_words < 1 or (continuation_words is not None and continuation_words < 1):
        raise UserError(
            f"data.opening_words={opening_words} data.continuation_words={continuation_words}: "
            "choose at least 1 word (null: the whole continuation)"
        )
    whole, counts = _openings(path, "data.path", opening_words)
    if eval_path is None:
        train, held = split(whole, eval_fraction)
    else:
        held, _ = _openings(eval_path, "data.eval_path", opening_words)
        train = without(whole, held)
    return Task(
        train=limit(_pairs(train, continuation_words, seed), max_rows, seed),
        held_out=_pairs(held, continuation_words, seed),
        sft=train,
        counts=counts,
    )


def _openings(path: str, where: str, words: int) -> tuple[list[Row], dict[str, int]]:
    pieces = text(path, where).split(SEPARATOR)[:-1]
    if not pieces:
        raise UserError(f"{path}: no {SEPARATOR}: end each story with it")
    rows = []
    for piece in pieces:
        story = piece.strip()
        opening = _words(story, words)
        if len(opening) < len(story):
            rows.append({"prompt": opening, "completion": story[len(opening) :]})
    if not rows:
        raise UserError(f"{path}: no story is longer than data.opening_words={words}: lower it")
    return rows, {"stories": len(pieces), "stories too short": len(pieces) - len(rows)}


def _words(text: str, count: int) -> str:
    found = re.match(rf"(?:\s*\S+){{0,{count}}}", text)
    return found[0] if found else ""


def _pairs(rows: list[Row], words: int | None, seed: int) -> list[Row]:
    if len(rows) == 1:
        raise UserError("one story alone on a side of the split has no other: give more stories")
    endings = [
        row["completion"] if words is None else _words(row["completion"], words) for row in rows
    ]
    order = random.Random(f"others/{seed}").sample(range(len(rows)), len(rows))
    # one cycle through a random order: no story meets itself
    other = dict(zip(order, order[1:] + order[:1]))
    return [
        {"prompt": row["prompt"], "chosen": endings[n], "rejected": endings[other[n]]}
        for n, row in enumerate(rows)
    ]
