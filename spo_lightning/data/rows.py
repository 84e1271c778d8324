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
    # the chunks from the given number on, where ``train`` is the first of them; None: it is all
    chunks: Callable[[int], Iterator[Chunk]] | None = None
    counts: dict[str, int] = field(default_factory=dict)
    layout: str | None = None  # of a file of the user's: the name that data.layout takes
    notes: tuple[str, ...] = ()  # what a user is told of the rows, a line each
    dropped: dict[str, Dropped] = field(default_factory=dict)  # by reason, before tokens are made


def parsed(text: str, where: str, line: int) -> Any:
    """The JSON that begins in ``line``."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        at = f"{where}:{line + error.lineno - 1}"
        raise UserError(f"{at}: broken JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}:{line}: unreadable JSON ({error})") from None


def preference_rows(raw: Rows, separator: str | None) -> list[Row]:
    """Every row in the normal form: explicit prompt, three fields of one kind (TRL's formats)."""
    return [_pair(row, raw.named(at), separator) for at, row in enumerate(raw)]


def completion_rows(raw: Rows) -> list[Row]:
    """Rows ``{prompt, completion}``, as text or as messages."""
    names = ("prompt", "completion")
    return [_normal(row, names, raw.named(at)) for at, row in enumerate(raw)]


def _pair(row: Row, where: str, separator: str | None) -> Row:
    if "label" in row and "completion" in row and "chosen" not in row:
        told = "KTO rows (prompt, completion, label): this package trains on pairs"
        raise UserError(f"{where}: {told}: give prompt, chosen and rejected")
    if "prompt" in row or "chosen" not in row or "rejected" not in row:
        return _normal(row, ("prompt", "chosen", "rejected"), where)
    normal = _normal(row, ("chosen", "rejected"), where)
    chosen, rejected = normal["chosen"], normal["rejected"]
    n = _shared(chosen, rejected, separator, where)
    return {**normal, "prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def _shared(chosen: Any, rejected: Any, separator: str | None, where: str) -> int:
    if not chosen or not rejected:
        return 0  # encoding drops the pair and counts it
    shortest = min(len(chosen), len(rejected))
    common = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    if isinstance(chosen, list):
        if not common:
            raise UserError(f"{where}: chosen and rejected share no turn: add a 'prompt'")
        return common
    if not separator:
        fix = "add one, or set data.separator to the text that ends it"
        raise UserError(f"{where}: no field 'prompt': {fix}")
    at = chosen[:common].rfind(separator)
    if at < 0:
        told = f"no {separator!r} in the beginning that chosen and rejected share"
        raise UserError(f"{where}: {told}: add a 'prompt' or correct data.separator")
    return at + len(separator)


def _normal(row: Row, names: tuple[str, ...], where: str) -> Row:
    values = {name: _value(row, name, where) for name in names}
    if len({type(value) for value in values.values()}) > 1:
        kinds = ", ".join(f"{name} is {kind_of(value)}" for name, value in values.items())
        raise UserError(f"{where}: {kinds}: make all text or all messages")
    return {**values, **_extras(row, where)}


def _extras(row: Row, where: str) -> Row:
    extras = {name: row[name] for name in KEPT if row.get(name) is not None}
    if isinstance(extras.get("tools"), str):
        extras["tools"] = parsed(extras["tools"], f"{where}: 'tools'", 1)
    for name, value in extras.items():
        if not isinstance(value, KEPT[name]):
            raise UserError(
                f"{where}: {name!r} is {kind_of(value)}: see the formats in docs/your-data.md"
            )
    return extras | ({"answer": str(extras["answer"])} if "answer" in extras else {})


def _value(row: Row, name: str, where: str) -> str | list[Row]:
    if name not in row:
        found = ", ".join(map(str, row)) or "nothing"
        raise UserError(f"{where}: no field {name!r} (found {found}): add it or rename a column")
    value = row[name]
    if isinstance(value, str):
        return _text(value, f"{where}: {name!r}")
    if not isinstance(value, list):
        raise UserError(
            f"{where}: {name!r} is {kind_of(value)}: make it text or a list of messages"
        )
    return [_message(turn, f"{where}: {name!r}, turn {n}") for n, turn in enumerate(value, 1)]


def _message(turn: Any, where: str) -> Row:
    if not isinstance(turn, dict) or "role" not in turn:
        raise UserError(f"{where} is not a message: write {{'role': ..., 'content': ...}}")
    if turn["role"] not in ROLES:
        raise UserError(f"{where} has the unknown role {turn['role']!r}: use {', '.join(ROLES)}")
    # arrow fills the keys that another row has with nulls, which templates take for values
    filled = {key: value for key, value in turn.items() if value is not None}
    if isinstance(filled.get("content"), str):
        _text(filled["content"], where)
    elif "content" in filled or "tool_calls" not in filled:
        raise UserError(f"{where}: 'content' is {kind_of(turn.get('content'))}: make it text")
    return filled


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a surrogate pair: write valid unicode") from None
    return value


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
