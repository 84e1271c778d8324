"""What a layout made of a row in, the row in the normal form out, or one line that refuses it.

The normal form: ``prompt`` with ``chosen`` and ``rejected`` (pairs), or with ``completion`` and
``label`` (labelled), or with ``completion`` (texts); all text, or all lists of messages.
"""

from typing import Any

from spo_lightning.data.layouts.columns import WORDS, kind_of
from spo_lightning.data.rows import KEPT, ROLES, Row, parsed
from spo_lightning.errors import UserError

SIDES = ("prompt", "chosen", "rejected", "completion")


def normal(row: Row, raw: Row, where: str) -> Row:
    """The row, checked, with what is kept of the raw one."""
    sides = {name: _value(row, name, where) for name in SIDES if name in row}
    if len({type(value) for value in sides.values()}) > 1:
        kinds = ", ".join(f"{name} is {WORDS[kind_of(value)]}" for name, value in sides.items())
        raise UserError(f"{where}: {kinds}: make all text or all messages")
    if row.get("margin", 0) < 0:
        raise UserError(f"{where}: margin is {row['margin']}: make it 0 or more")
    extras = {name: row.get(name, raw.get(name)) for name in KEPT}
    return {**row, **sides, **_extras(extras, where)}


def _extras(given: Row, where: str) -> Row:
    extras = {name: value for name, value in given.items() if value not in (None, "")}
    if isinstance(extras.get("tools"), str):
        extras["tools"] = parsed(extras["tools"], f"{where}: 'tools'", 1)
    for name, value in extras.items():
        if not isinstance(value, KEPT[name]):
            kind = WORDS[kind_of(value)]
            raise UserError(f"{where}: {name!r} is {kind}: see the formats in docs/your-data.md")
    return extras | ({"answer": str(extras["answer"])} if "answer" in extras else {})


def _value(row: Row, name: str, where: str) -> str | list[Row]:
    value = row[name]
    if isinstance(value, str):
        return _text(value, f"{where}: {name!r}")
    if not isinstance(value, list):
        told = f"{name!r} is {WORDS[kind_of(value)]}"
        raise UserError(f"{where}: {told}: make it text or a list of messages")
    return [_message(turn, f"{where}: {name!r}, turn {n}") for n, turn in enumerate(value, 1)]


def _message(turn: Any, where: str) -> Row:
    if not isinstance(turn, dict) or "role" not in turn:
        raise UserError(f"{where} is not a message: write {{'role': ..., 'content': ...}}")
    if turn["role"] not in ROLES:
        raise UserError(f"{where} has the unknown role {turn['role']!r}: use {', '.join(ROLES)}")
    # arrow fills the keys that another row has with nulls, which templates take for values
    filled = {key: value for key, value in turn.items() if value is not None}
    if isinstance(filled.get("content"), list):
        filled["content"] = "".join(_part(part, where) for part in filled["content"])
    if isinstance(filled.get("content"), str):
        _text(filled["content"], where)
    elif "content" in filled or "tool_calls" not in filled:
        kind = WORDS[kind_of(turn.get("content"))]
        raise UserError(f"{where}: 'content' is {kind}: make it text")
    return filled


def _part(part: Any, where: str) -> str:
    """One part of a message's content, where that is a list of them."""
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part["text"], str):
        return part["text"]
    kind = part.get("type") if isinstance(part, dict) else WORDS[kind_of(part)]
    raise UserError(f"{where}: a part of 'content' is {kind}, and only text is read: leave it out")


def _text(value: str, where: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise UserError(f"{where} has half a surrogate pair: write valid unicode") from None
    return value
