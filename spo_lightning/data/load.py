"""The composed ``data`` node in, a ``Task`` out."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from spo_lightning.data import layouts
from spo_lightning.data.chat import in_turns
from spo_lightning.data.labels import apart
from spo_lightning.data.reading import read
from spo_lightning.data.rows import Chunk, Row, Task, limit, without
from spo_lightning.errors import UserError

# read here, by the encoding and by the warm start; a source that names one of them gets it
ELSEWHERE = (
    *("sft", "pairs", "chat", "system", "scored", "strict", "on_mismatch", "drop_high_ches"),
    *("sft_steps", "tokens_per_batch", "unpaired"),
)
OWN = "own"  # data.sft: the source's own SFT rows


def load(node: Any) -> Task:
    """Call the source that ``_target_`` names; keys that others read stay behind."""
    import hydra.utils
    from hydra.errors import InstantiationException

    plain = _plain(node)
    try:
        task = hydra.utils.instantiate(_source(plain, "data"), _convert_="all")
    except InstantiationException as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__
        if cause is None:
            raise
        raise cause from None
    if not task.train:
        place = plain.get("path") or "data"
        raise UserError(
            f"{place}: no row is left to train on: give more rows or lower data.eval_fraction"
        )
    return _in_turns(_with_lower(_apart(_with_pairs(task, plain), plain), plain), plain)


def load_to_look(node: Any) -> Task:
    """The same for a command that trains nothing: the SFT rows of ``data.sft`` stay unread."""
    plain = _plain(node)
    return load({**plain, "sft": None} if "sft" in plain else plain)


def _with_pairs(task: Task, node: dict[str, Any]) -> Task:
    """The task with the training pairs that ``data.pairs`` names; all else stays the source's."""
    named = node.get("pairs")
    if named is None:
        return task
    _check_kind(named, (str, list, NoneType), "data.pairs")
    if task.chunks is not None:
        raise UserError(f"data.pairs={named}: the data is streamed: set data.stream=false")
    raw = read(named, split=node.get("split", "train"), where="data.pairs")
    made = layouts.normalised(raw, str(named), layouts.COMPARED, node.get("unpaired", False))
    rows = without(made.rows, task.held_out)
    if not rows:
        raise UserError(f"data.pairs={named}: every prompt is held out: name a file of others")
    rows = limit(rows, node.get("max_rows"), node.get("seed", 0))
    notes = (*task.notes, *(f"data.pairs: {note}" for note in made.notes))
    counts = {"in data.pairs": len(raw)}
    of = {"counts": counts, "notes": notes, "dropped": made.dropped}
    return replace(task, train=rows, given=True, **of)


def _apart(task: Task, node: dict[str, Any]) -> Task:
    """The task with each answer a training row of its own, where the loss takes such."""
    unpaired = node.get("unpaired", False)
    _check_kind(unpaired, (bool,), "data.unpaired")
    rows = apart(task.train) if unpaired and not task.samples else task.train
    if len(rows) == len(task.train):
        return task
    told = f"Training rows: {len(rows):,}, each answer of a pair is one, good or bad"
    return replace(task, train=rows, notes=(*task.notes, told))


def _with_lower(task: Task, node: dict[str, Any]) -> Task:
    """The task with the lower level's rows that ``data.sft`` names; None leaves the chosen."""
    named = node.get("sft")
    if named is None:
        return task
    _check_kind(named, (str, list, NoneType), "data.sft")
    rows = task.sft
    if named != OWN and "sft" not in _parameters(node):
        raw = read(named, split=node.get("split", "train"), where="data.sft")
        made = layouts.normalised(raw, str(named), (layouts.TEXTS,))
        rows = without(made.rows, task.held_out)
        notes = (*task.notes, *(f"data.sft: {note}" for note in made.notes))
        task = replace(task, notes=notes)
    if not rows:
        raise UserError(
            f"data.sft={named}: no SFT row is left: name a file of prompt and completion, or null "
            "for the chosen responses"
        )
    return replace(task, lower=rows)


def _in_turns(task: Task, node: dict[str, Any]) -> Task:
    """The task with its rows as ``data.chat`` and ``data.system`` want them."""
    chat, system = node.get("chat", False), node.get("system")
    _check_kind(chat, (bool,), "data.chat")
    _check_kind(system, (str, NoneType), "data.system")

    def turned(rows: list[Row]) -> list[Row]:
        return [in_turns(row, chat=chat, system=system) for row in rows]

    def later(start: int, every: int = 1) -> Iterator[Chunk]:
        assert task.chunks is not None
        return (replace(chunk, rows=turned(chunk.rows)) for chunk in task.chunks(start, every))

    if not chat and system is None:
        return task
    names = ("train", "held_out", "sft", "lower")
    told = any(isinstance(row["prompt"], str) or "plain" in row for row in _rows(task, names))
    if chat and system is None and not told:
        raise UserError("data.chat=true has no effect: all rows are messages; leave it out")
    sides = {name: turned(getattr(task, name)) for name in names}
    return replace(task, **sides, chunks=task.chunks and later)


def _rows(task: Task, names: Sequence[str]) -> Iterator[Row]:
    return (row for name in names for row in getattr(task, name))


def _plain(node: Any) -> Any:
    # not OmegaConf.create: a copy has no parent, so ${seed} would not resolve
    from omegaconf import OmegaConf

    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node, resolve=True)
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node


def _source(node: Any, where: str) -> Any:
    """The node without the keys that others read; the rest is checked."""
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _source(value, f"{where}.{key}") for key, value in node.items()}
    named = _parameters(node)
    kept = {key: value for key, value in node.items() if key in named or key not in ELSEWHERE}
    _check(kept, where)
    return {key: _source(value, f"{where}.{key}") for key, value in kept.items()}


def _parameters(node: dict[str, Any]) -> Any:
    import hydra.utils

    return inspect.signature(hydra.utils.get_method(node["_target_"])).parameters


def _check(node: dict[str, Any], where: str) -> None:
    import hydra.utils

    source: Callable[..., Task] = hydra.utils.get_method(node["_target_"])
    known, kinds = inspect.signature(source).parameters, get_type_hints(source)
    given = node.keys() - {"_target_"}
    if "sft" in known and node.get("sft") == OWN:
        raise UserError(
            f"{where}.sft={OWN}: {source.__name__} has no SFT rows of its own: name a file of "
            "prompt and completion, or null for the chosen responses"
        )
    for key in sorted(given - known.keys()):
        raise UserError(f"{where}.{key}: {source.__name__} has no such key: remove it")
    for key in sorted(known.keys() - given):
        raise UserError(f"{where}.{key} is missing: take it from conf/data/{source.__name__}.yaml")
    for key in sorted(given):
        wanted = get_args(kinds[key]) if isinstance(kinds[key], UnionType) else (kinds[key],)
        # what a dict or list holds is checked by who reads it
        plain = tuple(get_origin(kind) or kind for kind in wanted)
        _check_kind(node[key], plain, f"{where}.{key}")


def _check_kind(value: Any, wanted: tuple[type, ...], where: str) -> None:
    accepted = (*wanted, int) if float in wanted else wanted
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in wanted):
        names = " or ".join("null" if kind is type(None) else kind.__name__ for kind in wanted)
        raise UserError(f"{where}={value}: give {names}")
