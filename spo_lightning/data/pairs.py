"""Your own preference pairs, in TRL's formats: a file, a saved dataset or a hub id."""

from collections.abc import Callable, Iterator
from functools import partial

from spo_lightning.data import rows
from spo_lightning.data.rows import Chunk, Row, Task
from spo_lightning.data.stream import chunks, parts
from spo_lightning.errors import UserError


def pairs(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    split: str,
    separator: str | None,
    sft: str | None,
    summary: bool,
    stream: bool,
    chunk_rows: int,
) -> Task:
    """Validated pairs, split by prompt, or with held-out pairs from a place of their own.

    ``stream``: read ``chunk_rows`` rows at a time while training goes on.
    """
    if path is None:
        raise UserError("data.path is not set: name a file, a saved dataset or a hub id of pairs")
    if stream:
        raw = _first_chunk(path, split, chunk_rows, max_rows)
    else:
        raw = rows.read(path, split=split, where="data.path")
    if separator is not None and all("prompt" in row for row in raw):
        raise UserError(
            f"{path}: data.separator={separator!r}, but every row has a prompt: unset it"
        )
    given = rows.preference_rows(raw, path, separator)
    if eval_path is None:
        share = rows.share_of(given, eval_fraction)
        trains: Callable[[Row], bool] = partial(_by_hash, share)
        held = [row for row in given if not trains(row)]
    else:
        raw = rows.read(eval_path, split=split, where="data.eval_path")
        held = rows.preference_rows(raw, eval_path, separator)
        trains = partial(_by_prompt, {rows.prompt_key(row["prompt"]) for row in held})
    train = [row for row in given if trains(row)]
    texts = []
    if sft is not None:
        texts = rows.completion_rows(rows.read(sft, split=split, where="data.sft"), sft)
    repeated = len(given) - len(train) if eval_path else 0
    name = "read (first chunk)" if stream else "read"
    return Task(
        train=train if stream else rows.limit(train, max_rows, seed),
        held_out=held,
        sft=rows.without(texts, held),
        answer_of=str.strip if all("answer" in row for row in given + held) else None,
        summary=summary,
        chunks=_later(path, chunk_rows, split, separator, trains) if stream else None,
        counts={name: len(given), "also in data.eval_path": repeated},
    )


def _by_hash(share: float, row: Row) -> bool:
    return not rows.held_out(row["prompt"], share)


def _by_prompt(held: set[str], row: Row) -> bool:
    return rows.prompt_key(row["prompt"]) not in held


def _first_chunk(path: str, split: str, size: int, max_rows: int | None) -> list[Row]:
    if size < 1:
        raise UserError(f"data.chunk_rows={size}: choose at least 1")
    if max_rows is not None:
        raise UserError(
            f"data.max_rows={max_rows} samples among all rows, which data.stream=true never has: "
            "leave one of them out"
        )
    raw = next(parts(path, size=size, split=split, start=0), None)
    if raw is None:
        raise UserError(f"{path}: no rows: point data.path at data that has some")
    return raw


def _later(
    path: str, size: int, split: str, separator: str | None, trains: Callable[[Row], bool]
) -> Callable[[int], Iterator[Chunk]]:
    def later(start: int) -> Iterator[Chunk]:
        return chunks(
            path, size=size, split=split, separator=separator, trains=trains, start=start
        )

    return later
