"""Layouts with one answer a row: roles in, rows ``{prompt, completion}`` out.

``label`` is true where the answer is a good one. Rows without a label are texts, which teach and
compare nothing.
"""

from collections.abc import Sequence
from typing import Any

from spo_lightning.data.layouts.columns import BAD, GOOD
from spo_lightning.data.layouts.turns import LeftOut, asked, messages, system_turn
from spo_lightning.data.rows import Row, prompt_key
from spo_lightning.errors import UserError

ALONE = "no answer with the other label to the same prompt"


def answer(row: Row) -> list[Row]:
    """What was asked and the answer to it; a prompt column stays as it is, as TRL has it."""
    given = {name: row[name] for name in ("prompt", "completion") if name in row}
    texts = {isinstance(value, str) for value in given.values()}
    if "prompt" not in row or "system" in row or len(texts) > 1:
        made = asked(row).answered(completion=row["completion"])
    else:
        made = {n: v if isinstance(v, str) else messages(v) for n, v in given.items()}
    return [{**made, **_label(row)}]


def conversation(row: Row) -> list[Row]:
    """A whole conversation: of a labelled one the last answer is judged, else all are learned."""
    turns = messages(row["turns"])
    if row.get("system") and turns[:1] and turns[0].get("role") != "system":
        turns = [system_turn(row["system"]), *turns]
    places = [place for place, turn in enumerate(turns) if turn.get("role") == "assistant"]
    if not places:
        raise UserError("no turn of the assistant's: there is nothing to learn, remove the row")
    start = places[-1] if "label" in row else places[0]
    made = {"prompt": turns[:start], "completion": turns[start : places[-1] + 1]}
    return [{**made, **_label(row)}]


def _label(row: Row) -> Row:
    if "label" not in row:
        return {}
    word = str(row["label"]).strip().lower()
    if row["label"] is None or word in ("", "none", "null", "nan"):
        raise LeftOut("no label")
    if word not in (*GOOD, *BAD):
        raise UserError(f"the label is {row['label']!r}: make it true or false")
    return {"label": word in GOOD}


def paired(rows: Sequence[Row]) -> tuple[dict[int, Row], list[int]]:
    """Good against bad answers to the same prompt, in order, and the places of the rows left over.

    A pair has the place of its first row.
    """
    waiting: dict[str, dict[bool, list[int]]] = {}
    found: dict[int, Row] = {}
    for place, row in enumerate(rows):
        both = waiting.setdefault(prompt_key(row["prompt"]), {True: [], False: []})
        if both[not row["label"]]:
            first = both[not row["label"]].pop(0)
            found[first] = _pair(*((row, rows[first]) if row["label"] else (rows[first], row)))
        else:
            both[row["label"]].append(place)
    left = [place for both in waiting.values() for places in both.values() for place in places]
    return dict(sorted(found.items())), sorted(left)


def _pair(good: Row, bad: Row) -> Row:
    sides: Row = {"prompt": good["prompt"], "chosen": good["completion"]}
    sides["rejected"] = bad["completion"]
    if "plain" in good and "plain" in bad:
        plain = {"prompt": good["plain"]["prompt"], "chosen": good["plain"]["completion"]}
        sides["plain"] = {**plain, "rejected": bad["plain"]["completion"]}
    rest: dict[str, Any] = {k: v for k, v in good.items() if k not in ("completion", "label")}
    return {**rest, **sides}
