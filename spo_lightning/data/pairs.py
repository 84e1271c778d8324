"""Your own preference pairs, in TRL's formats: files, a saved dataset or a hub id."""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import zip_longest

from spo_lightning.data import rows
from spo_lightning.data.reading import Place, read
from spo_lightning.data.rows import Chunk, Row, Rows, Task
from spo_lightning.data.stream import chunks
from spo_lightning.errors import UserError


def pairs(
    *,
    path: str | list[str] | None,
    eval_path: str | list[str] | dict[str, str | list[str]] | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    name: str | None,
    split: str,
    revision: str | None,
    separator: str | None,
    sft: str | list[str] | None,
    summary: bool,
    stream: bool,
    chunk_rows: int,
    by: str | None,
) -> Task:
    """Validated pairs, split by prompt, or with held-out pairs from places of their own.

    ``stream``: read ``chunk_rows`` rows at a time while training goes on. ``by``: a column that
    held-out numbers are told apart by.
    """
    if path is None:
        raise UserError("data.path is not set: name a file, a saved dataset or a hub id of pairs")
    place = Place(path, "data.path", split, name, revision)
    raw = _first_chunk(place, chunk_rows, max_rows) if stream else place.rows()
    if separator is not None and all("prompt" in row for row in raw):
        raise UserError(
            f"{place.title}: data.separator={separator!r}, but every row has a prompt: unset it"
        )
    given = _labelled(rows.preference_rows(raw, separator), raw, by)
    if eval_path is None:
        share = rows.share_of(given, eval_fraction)
        trains: Callable[[Row], bool] = partial(_by_hash, share)
        held = [row for row in given if not trains(row)]
    else:
        held = _held_out(eval_path, split, separator, by)
        trains = partial(_by_prompt, {rows.prompt_key(row["prompt"]) for row in held})
    train = [row for row in given if trains(row)]
    texts = []
    if sft is not None:
        texts = rows.completion_rows(read(sft, split=split, where="data.sft"))
    repeated = len(given) - len(train) if eval_path else 0
    count = "read (first chunk)" if stream else "read"
    return Task(
        train=train if stream else rows.limit(train, max_rows, seed),
        held_out=held,
        sft=rows.without(texts, held),
        answer_of=str.strip if all("answer" in row for row in given + held) else None,
        summary=summary,
        chunks=_later(place, chunk_rows, separator, trains) if stream else None,
        counts={count: len(given), "also in data.eval_path": repeated},
    )


def _held_out(
    eval_path: str | list[str] | dict[str, str | list[str]],
    split: str,
    separator: str | None,
    by: str | None,
) -> list[Row]:
    """The held-out rows; of several named places each has its name, and they take turns, so that
    ``eval.max_rows`` leaves equally many of each."""
    if not isinstance(eval_path, dict):
        raw = read(eval_path, split=split, where="data.eval_path")
        return _labelled(rows.preference_rows(raw, separator), raw, by)
    if not eval_path:
        raise UserError("data.eval_path={}: name places, as in data.eval_path.helpful=a.jsonl")
    sides = []
    for subset, named in eval_path.items():
        raw = read(named, split=split, where=f"data.eval_path.{subset}")
        given = _labelled(rows.preference_rows(raw, separator), raw, by)
        sides.append([{**row, "subset": str(subset)} for row in given])
    return [row for turn in zip_longest(*sides) for row in turn if row is not None]


def _labelled(given: list[Row], raw: Rows, by: str | None) -> list[Row]:
    """The rows with their raw value of a column, as text."""
    if by is None:
        return given
    for at, row in enumerate(raw):
        if not isinstance(row.get(by, []), str | int | float | None):
            found = ", ".join(map(str, row))
            told = f"no text or number {by!r} for eval.by (found {found})"
            raise UserError(f"{raw.named(at)}: {told}: name another column")
    return [{**row, "by": str(raw[at][by])} for at, row in enumerate(given)]


def _by_hash(share: float, row: Row) -> bool:
    return not rows.held_out(row["prompt"], share)


def _by_prompt(held: set[str], row: Row) -> bool:
    return rows.prompt_key(row["prompt"]) not in held


def _first_chunk(place: Place, size: int, max_rows: int | None) -> Rows:
    if size < 1:
        raise UserError(f"data.chunk_rows={size}: choose at least 1")
    if max_rows is not None:
        raise UserError(
            f"data.max_rows={max_rows} samples among all rows, which data.stream=true never has: "
            "leave one of them out"
        )
    raw = next(place.parts(size, 0), None)
    if raw is None:
        raise UserError(f"{place.title}: no rows: point data.path at data that has some")
    return raw


def _later(
    place: Place, size: int, separator: str | None, trains: Callable[[Row], bool]
) -> Callable[[int], Iterator[Chunk]]:
    def later(start: int) -> Iterator[Chunk]:
        return chunks(place, size=size, separator=separator, trains=trains, start=start)

    return later
