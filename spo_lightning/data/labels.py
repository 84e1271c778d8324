"""Labelled answers, and pairs, in; rows of one answer each out, on the side that its label says.

A row with a label has its answer as ``chosen`` where it is a good one, else as ``rejected``, and
so becomes a pair whose other side is empty.
"""

from collections.abc import Sequence

from spo_lightning.data.rows import Row

SIDES = ("chosen", "rejected")


def on_its_side(row: Row) -> Row:
    """``{prompt, completion, label}`` with the answer on the side that its label says."""
    side = SIDES[not row["label"]] if "label" in row else "chosen"
    names = {"completion": side}
    made = {names.get(name, name): value for name, value in row.items() if name != "label"}
    plain = {names.get(name, name): value for name, value in row.get("plain", {}).items()}
    return made | ({"plain": plain} if plain else {})


def apart(rows: Sequence[Row]) -> list[Row]:
    """Every answer a row of its own."""
    return [_without(row, other) for row in rows for other in SIDES[::-1] if _has(row, other)]


def _has(row: Row, other: str) -> bool:
    return any(side in row for side in SIDES if side != other)


def _without(row: Row, other: str) -> Row:
    kept = {name: value for name, value in row.items() if name != other}
    if "plain" in row:
        kept["plain"] = {name: value for name, value in row["plain"].items() if name != other}
    return kept
