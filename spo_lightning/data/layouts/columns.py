"""A raw row in, its columns out: every value by its path, and what kind of value it is.

A path is a column's name, with dots into objects (``info.post``) and ``*`` for all of a list of
objects (``answers.*.rank``, a list with one value per answer). ``chosen_by_user`` renames columns
to the roles that ``data.columns`` gives them.
"""

import ast
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")
# words of a label, and whether it calls an answer good
GOOD = ("true", "1", "1.0", "good", "desirable", "chosen", "yes", "up", "thumbs_up", "positive")
BAD = (
    *("false", "0", "0.0", "-1", "bad", "undesirable", "rejected", "no", "down", "thumbs_down"),
    "negative",
)
SPEAKER = ("from", "sender", "speaker")  # keys of a turn that say whose it is
SPOKEN = ("value", "message", "text", "content")  # and what is said
NUMERAL = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*")
# what a wanted kind takes besides values of its own name
WIDER = {
    "text": {"transcript", "numeral", "truth"},
    "number": {"numeral"},
    "messages": {"message", "empty"},
    "turns": {"turn", "empty"},
    "texts": {"empty"},
    "numbers": {"empty"},
    "label": {"bool", "number", "numeral", "truth", "null"},
    "scalar": {"bool", "number", "numeral", "truth", "text", "transcript"},
    "verdict": {"bool", "number", "numeral", "truth", "text", "null"},
}
WORDS = {
    "null": "null",
    "bool": "a boolean",
    "truth": "text",
    "numeral": "text",
    "text": "text",
    "number": "a number",
    "transcript": "a transcript",
    "messages": "a list of messages",
    "message": "a message",
    "turns": "a list of turns",
    "turn": "a turn",
    "texts": "a list of texts",
    "numbers": "a list of numbers",
    "objects": "a list of objects",
    "empty": "an empty list",
    "list": "a list",
    "scalar": "text",
    "label": "true or false",
    "verdict": "text or a number",
    "object": "an object",
    "binary": "binary",
}
PRINTED = re.compile(r"\[?\{'(role|content|from|value)': ")  # as Python prints a message
SAMPLE = 24  # characters of a value that a refusal shows
SHOWN = 12  # columns that a refusal lists


def kind_of(value: Any) -> str:
    """The name of a value's kind, the narrowest that it has."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "null"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int | float):
        return "number"
    if isinstance(value, str):
        return _kind_of_text(value)
    if isinstance(value, list):
        return _kind_of_list([part for part in value if part is not None])
    if isinstance(value, dict):
        return "message" if "role" in value else "turn" if _is_turn(value) else "object"
    return "binary"


def _kind_of_text(value: str) -> str:
    if "\n\nAssistant:" in value and ("\n\nHuman:" in value or value.startswith("Human:")):
        return "transcript"
    if len(value) < 32 and NUMERAL.fullmatch(value):
        return "numeral"
    return "truth" if value.strip().lower() in (*GOOD, *BAD) else "text"


def _kind_of_list(parts: list[Any]) -> str:
    if not parts:
        return "empty"
    if all(isinstance(part, dict) for part in parts):
        if all("role" in part for part in parts):
            return "messages"
        return "turns" if all(map(_is_turn, parts)) else "objects"
    if all(isinstance(part, str) for part in parts):
        return "texts"
    if all(isinstance(p, int | float) and not isinstance(p, bool) for p in parts):
        return "numbers"
    return "list"


def _is_turn(value: Mapping[str, Any]) -> bool:
    return any(key in value for key in SPEAKER) and any(key in value for key in SPOKEN)


def takes(wanted: str, kind: str) -> bool:
    """Whether a value of ``kind`` will do where ``wanted`` is asked for."""
    return kind == wanted or kind in WIDER.get(wanted, ())


def kinds_of(row: Row) -> dict[str, str]:
    """Every path of the row with its value's kind."""
    return {path: kind_of(value) for path, value in _paths("", row)}


def _paths(before: str, row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        path, kind = f"{before}{name}", kind_of(value)
        yield path, value
        if kind == "object":
            yield from _paths(f"{path}.", value)
        elif kind == "objects" and "*" not in path:
            names = dict.fromkeys(key for part in value if part for key in part)
            for key in names:
                yield f"{path}.*.{key}", [(part or {}).get(key) for part in value]


def value_at(row: Row, path: str) -> Any:
    """What stands at a path; None where the row has no such place."""
    value: Any = row
    if path in row:  # a name may have a dot of its own
        return row[path]
    parts = path.split(".")
    for place, part in enumerate(parts):
        if part == "*":
            (key,) = parts[place + 1 :]
            return [(one or {}).get(key) for one in value]
        if isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        elif isinstance(value, dict) and part in value:
            value = value[part]
        else:
            return None
    return value


def chosen_by_user(raw: Sequence[Row], columns: Mapping[str, str], file: str) -> list[Row]:
    """The rows with each role of ``data.columns`` as a column of that name."""
    if not columns:
        return list(raw)
    for role, path in columns.items():
        if all(value_at(row, path) is None for row in raw):
            has = ", ".join(samples(raw))
            raise UserError(f"data.columns.{role}={path}: {file} has no such column; it has {has}")
    renamed = set(columns.values())
    return [
        {name: value for name, value in row.items() if name not in renamed}
        | {role: value_at(row, path) for role, path in columns.items()}
        for row in raw
    ]


def unpacked(row: Row) -> Row:
    """The row with messages that stand in it as JSON, or as Python prints them, read: as in the
    cell of a csv."""
    packed = {}
    for name, value in row.items():
        if not isinstance(value, str) or not value.startswith(("[{", "{")):
            continue
        printed, found = PRINTED.match(value), None
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            found = ast.literal_eval(value) if printed else json.loads(value)
        if kind_of(found) in ("messages", "turns", "message", "turn"):
            packed[name] = found
        elif printed and found is None and value.startswith("["):
            told = f"{name!r} is messages as numpy prints them, which cannot be read back"
            raise UserError(f"{told}: write the file as .jsonl or .parquet")
    return row | packed if packed else row


def samples(raw: Sequence[Row]) -> list[str]:
    """The columns, each with the beginning of a value that it has somewhere."""
    found: dict[str, str] = {}
    for row in raw[:1000]:
        for path, value in _paths("", row):
            if (
                path not in found
                and value not in (None, "", [], {})
                and kind_of(value) != "object"
            ):
                text = " ".join(str(value).split())
                cut = text if len(text) <= SAMPLE else text[:SAMPLE] + "..."
                found[path] = f"{path} ({cut})"
    more = [f"and {len(found) - SHOWN} more"] if len(found) > SHOWN else []
    return [*list(found.values())[:SHOWN], *more] or ["nothing"]
