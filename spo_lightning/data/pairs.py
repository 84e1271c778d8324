"""Your own preference pairs, in any published layout: files, a saved dataset or a hub id."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import zip_longest
from typing import NamedTuple

from spo_lightning.data import layouts, rows
from spo_lightning.data.layouts import Asked
from spo_lightning.data.layouts.known import LABELLED, TEXTS, Layout
from spo_lightning.data.reading import Place, check_idle, read
from spo_lightning.data.rows import Chunk, Dropped, Row, Rows, Task
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
    layout: str | None,
    columns: dict[str, str | None],
    pairing: str,
    separator: str | None,
    sft: str | list[str] | None,
    summary: bool,
    stream: bool,
    chunk_rows: int,
    by: str | None,
    unpaired: bool,
) -> Task:
    """Validated pairs, split by prompt, or with held-out pairs from places of their own.

    ``stream``: read ``chunk_rows`` rows at a time while training goes on. ``by``: a column that
    held-out numbers are told apart by. ``unpaired``: labelled answers stay apart.
    """
    if path is None:
        raise UserError("data.path is not set: name a file, a saved dataset or a hub id of pairs")
    place = Place(path, "data.path", split, name, revision)
    listed = [*_listed(path), *_listed(eval_path), *_listed(sft)]
    check_idle(listed, split, name=name, revision=revision)
    raw = _first_chunk(place, chunk_rows, max_rows) if stream else place.rows()
    named = {role: column for role, column in columns.items() if column is not None}
    asked = Asked(named, "data.columns", _meant(separator), pairing, seed, unpaired)
    made = _made(place.title, raw, layout, asked, stream)
    own = Side(_labelled(made, raw, by), made.notes, made.dropped)
    if eval_path is None:
        share = rows.share_of(own.rows, eval_fraction)
        trains: Callable[[Row], bool] = partial(_by_hash, share)
        other = Side([row for row in own.rows if not trains(row)], (), {})
    else:
        other = _held_out(eval_path, place, made.layout, asked, by)
        trains = partial(_by_prompt, {rows.prompt_key(row["prompt"]) for row in other.rows})
    train = [row for row in own.rows if trains(row)]
    texts = Side([], (), {}) if sft is None else _texts(sft, split)
    repeated = len(own.rows) - len(train) if eval_path else 0
    answered = all("answer" in row for row in own.rows + other.rows)
    return Task(
        train=train if stream else rows.limit(train, max_rows, seed),
        held_out=other.rows,
        sft=rows.without(texts.rows, other.rows),
        answer_of=str.strip if answered else None,
        summary=summary,
        chunks=_later(place, chunk_rows, made.layout, asked, trains) if stream else None,
        counts=_counts(len(own.rows), repeated, stream),
        layout=made.layout.name,
        notes=own.notes + other.notes + texts.notes,
        dropped=own.dropped | other.dropped,
        unpaired=rows.without(made.labelled, other.rows),
    )


class Side(NamedTuple):
    """Rows, and what a user is told of them."""

    rows: list[Row]
    notes: tuple[str, ...]
    dropped: dict[str, Dropped]


def _listed(path: str | list[str] | dict[str, str | list[str]] | None) -> list[str]:
    """All places that a key names."""
    if isinstance(path, dict):
        return [one for named in path.values() for one in _listed(named)]
    some = path if isinstance(path, Sequence) and not isinstance(path, str) else [path]
    return [one for one in some if isinstance(one, str)]  # what is no place, Place refuses


def _meant(separator: str | None) -> str | None:
    r"""A separator as the shell passes it: ``\n`` is a line break and ``\t`` a tab."""
    return separator and separator.replace("\\n", "\n").replace("\\t", "\t")


def _made(title: str, raw: Rows, layout: str | None, asked: Asked, stream: bool) -> layouts.Made:
    """The rows by the layout that is named, or recognised."""
    file = layouts.file_of(title, raw, asked)
    found = layouts.recognised(file) if layout is None else layouts.forced(file, layout)
    _check(title, found, asked, stream)
    made = layouts.made_to_train(file, found)
    if not made.rows:
        texts = "; data.layout=sft reads them as texts" if found.gathered else ""
        if found.gives == LABELLED and not asked.unpaired:
            texts = "; loss=kto trains on answers one by one, data.unpaired=true looks at them so"
        wanted = "is left" if asked.unpaired else "becomes a pair"
        raise UserError(f"{title}: no row {wanted}; {made.notes[-1]}{texts}")
    return made


def _check(title: str, layout: Layout, asked: Asked, stream: bool) -> None:
    """What does not go with the layout."""
    if layout.gives == TEXTS and asked.unpaired:
        told = "has answers without a label, and this loss asks for good ones and bad ones"
        raise UserError(f"{title}: the layout {layout.name} {told}: add a column label")
    if (layout.gives == LABELLED or layout.gathered) and stream:
        told = "whose pairs are made of all rows: leave data.stream out"
        raise UserError(f"{title}: the layout {layout.name} has one answer a row, {told}")
    if asked.separator is not None and not layout.asks("separator"):
        told = f"the layout {layout.name} has prompts of its own"
        raise UserError(f"{title}: data.separator={asked.separator!r}, but {told}: unset it")
    if asked.pairing != "best_worst" and not layout.asks("pairing"):
        told = f"the layout {layout.name} has no list of answers"
        raise UserError(f"data.pairing={asked.pairing} has no effect: {told}; leave it out")


def _held_out(
    eval_path: str | list[str] | dict[str, str | list[str]],
    own: Place,
    layout: Layout,
    asked: Asked,
    by: str | None,
) -> Side:
    """The held-out rows; of several named places each has its name, and they take turns, so that
    ``eval.max_rows`` leaves equally many of each."""
    if not eval_path and isinstance(eval_path, dict):
        raise UserError("data.eval_path={}: name places, as in data.eval_path.helpful=a.jsonl")
    several = eval_path if isinstance(eval_path, dict) else {None: eval_path}
    sides: list[list[Row]] = []
    notes: list[str] = []
    dropped: dict[str, Dropped] = {}
    for subset, named in several.items():
        where = "data.eval_path" if subset is None else f"data.eval_path.{subset}"
        place = replace(own, path=named, where=where)
        raw = place.rows()
        file = layouts.file_of(place.title, raw, asked)
        made = layouts.made_to_train(file, _as_in_path(file, layout, where))
        mine = {} if subset is None else {"subset": str(subset)}
        sides.append([{**row, **mine} for row in _labelled(made, raw, by)])
        notes += (f"{where}: {note}" for note in made.notes)
        dropped |= {f"{where}: {why}": some for why, some in made.dropped.items()}
    turns = [row for turn in zip_longest(*sides) for row in turn if row is not None]
    return Side(turns, tuple(notes), dropped)


def _as_in_path(file: layouts.File, layout: Layout, where: str) -> Layout:
    """The layout of held-out rows, which have as many answers as those of ``layout``."""
    if layout.gives != TEXTS:
        return layouts.fitting(file, layout, layouts.COMPARED)
    found = layouts.recognised(file)  # labelled answers have all that texts need
    if found.gathered:  # and so have scored ones, of which a layout that is forced makes texts
        found = layouts.fitting(file, layout, (TEXTS,))
    if found.gives != TEXTS:
        raise UserError(
            f"{where}: the layout {found.name} gives {found.gives}, and {layout.name}, that of "
            f"data.path, gives {TEXTS}: hold out rows of the same kind"
        )
    return found


def _labelled(made: layouts.Made, raw: Rows, by: str | None) -> list[Row]:
    """The rows with their raw value of a column, as text."""
    if by is None:
        return made.rows
    for at, row in enumerate(raw):
        if not isinstance(row.get(by, []), str | int | float | None):
            found = ", ".join(map(str, row))
            told = f"no text or number {by!r} for eval.by (found {found})"
            raise UserError(f"{raw.named(at)}: {told}: name another column")
    return [{**row, "by": str(raw[at][by])} for at, row in zip(made.places, made.rows)]


def _texts(sft: str | list[str], split: str) -> Side:
    made = layouts.normalised(read(sft, split=split, where="data.sft"), str(sft), (TEXTS,))
    return Side(made.rows, tuple(f"data.sft: {note}" for note in made.notes), {})


def _counts(read: int, repeated: int, stream: bool) -> dict[str, int]:
    return {"read (first chunk)" if stream else "read": read, "also in data.eval_path": repeated}


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
    place: Place, size: int, layout: Layout, asked: Asked, trains: Callable[[Row], bool]
) -> Callable[..., Iterator[Chunk]]:
    def later(start: int, every: int = 1) -> Iterator[Chunk]:
        how = {"size": size, "layout": layout, "asked": asked}
        return chunks(place, **how, trains=trains, start=start, every=every)

    return later
