"""Rows and their tokens in, what a person asks of them out: numbers, and some rows as they are.

Nothing here draws. ``page.py`` says a summary on a terminal, ``report/data_page.py`` shows it in a
browser; as a mapping it is plain JSON.
"""

import hashlib
import unicodedata
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import FIXES, SHOWN, Encoded
from spo_lightning.data.pieces import SIDES, Shown, shown
from spo_lightning.data.rows import Row, Task, prompt_key
from spo_lightning.data.spread import Spread, bar_width, spread

FIELDS = ("prompt", *SIDES)
BESIDE = {  # what Encoded.counts says of pairs that are kept
    "split": "prompts whose last tokens change before an answer",
    "truncated": "pairs that max_length cuts",
}
TURNED = "pairs that stand both ways round"
BOTH = "answers that have both labels"
CHECKED = (
    "rows that repeat an earlier one",
    TURNED,
    "held-out prompts also in train (but for case and spaces)",
)
BROWSED = {"train": 200, "held-out": 50}  # rows that the page holds, evenly over the data
LONG = 400  # letters of an example's field


@dataclass(frozen=True)
class Example:
    """A row, where it stands, and its fields as text."""

    where: str
    fields: dict[str, str]


@dataclass(frozen=True)
class Reason:
    """Why rows became no pair; ``counts``: how many of the file, of train, of held-out."""

    why: str
    counts: dict[str, int]
    examples: list[Example]


@dataclass(frozen=True)
class Check:
    """How many rows are what one may not want, and which the first ones are."""

    what: str
    count: int
    examples: list[Example]


@dataclass(frozen=True)
class Summary:
    """What became of the data. Pairs are of both sides together, unless they are told apart."""

    name: str
    layout: str | None
    columns: dict[str, str]  # of a row in the normal form: what it holds, in how many rows
    source: dict[str, int]  # what the source counted
    counts: dict[str, dict[str, int]]  # rows, kept, dropped and why: of the file, train, held-out
    notes: list[str]
    dropped: list[Reason]
    checks: list[Check]
    lengths: dict[str, Spread]  # tokens, before max_length cuts them
    max_length: int
    cut: tuple[int, int, int]  # pairs, their tokens that are cut off, tokens of all pairs
    longer: dict[str, int]  # pairs by which answer has more tokens
    subsets: dict[str, dict[str, int]]  # rows of each side, by row["subset"]
    margins: Spread | None
    pair: Shown | None
    rows: list[Shown]

    @property
    def noun(self) -> str:
        """What its rows are."""
        return "pair" if self.longer else "row"


@dataclass(frozen=True)
class Side:
    """Train or held-out: its rows, and what was made of them."""

    name: str
    rows: Sequence[Row]
    encoded: Encoded
    whole: list[Pair]  # the kept pairs before max_length cuts them

    def where(self, place: int) -> str:
        return f"{self.name}, row {place + 1}"


def summary(
    task: Task,
    encoded: Mapping[str, Encoded],
    tokenizer: Any,
    *,
    name: str,
    max_length: int,
    uncut: Callable[[list[Row]], Encoded],
) -> Summary:
    """``encoded``: of train and held-out; ``uncut`` encodes rows with no ``max_length``."""
    given = {"train": task.train, "held-out": task.held_out}
    sides = [
        Side(side, given[side], found, _whole(given[side], found, max_length, uncut))
        for side, found in encoded.items()
    ]
    pairs = [(side.name, pair) for side in sides for pair in side.encoded.pairs]
    whole = [pair for side in sides for pair in side.whole]
    rows = [row for side in sides for row in side.rows]
    lost = dropped(task, sides)
    margins = [float(row["margin"]) for row in rows if row.get("margin") is not None]
    return Summary(
        name=name,
        layout=task.layout,
        columns=columns(rows),
        source={"SFT rows": len(task.sft), "lower-level rows": len(task.lower)} | task.counts,
        counts=counts(sides, lost),
        notes=list(task.notes),
        dropped=lost,
        checks=checks(sides),
        lengths=lengths(whole) if whole else {},
        max_length=max_length,
        cut=cut([pair for _, pair in pairs], whole),
        longer=longer(whole),
        subsets=_subsets(sides),
        margins=spread(margins) if margins else None,
        pair=shown(pairs[0][1], pairs[0][0], tokenizer, by_token=True) if pairs else None,
        rows=[
            shown(pair, side.name, tokenizer, by_token=False)
            for side in sides
            for pair in evenly(side.encoded.pairs, BROWSED[side.name])
        ],
    )


def _whole(
    rows: Sequence[Row],
    found: Encoded,
    max_length: int,
    uncut: Callable[[list[Row]], Encoded],
) -> list[Pair]:
    """Only pairs as long as ``max_length`` can have been cut: these are encoded once more."""
    full = [
        pair.row
        for pair in found.pairs
        if len(pair.prompt) + max(len(pair.chosen), len(pair.rejected)) >= max_length
    ]
    anew = uncut([rows[place] for place in full]).pairs if full else []
    longer_ones = {full[pair.row]: pair for pair in anew}
    return [longer_ones.get(pair.row, pair) for pair in found.pairs]


def lengths(pairs: Sequence[Pair]) -> dict[str, Spread]:
    """Tokens of each part, in bars that compare, and of what ``max_length`` limits."""
    parts = {part: [len(getattr(pair, part)) for pair in pairs] for part in FIELDS}
    # texts have no rejected answer, labelled rows one of the two
    there = {part: [n for n in some if n or part == "prompt"] for part, some in parts.items()}
    there = {part: some for part, some in there.items() if some}
    whole = "prompt + longer"
    if not longer(pairs):
        whole = "prompt + only" if "rejected" in there else "prompt + chosen"
    width = max(bar_width(sorted(some)) for some in there.values())
    found = {name: spread(some, width) for name, some in there.items()}
    lengths = zip(*parts.values())
    return found | {whole: spread([prompt + max(answers) for prompt, *answers in lengths])}


def cut(pairs: Sequence[Pair], whole: Sequence[Pair]) -> tuple[int, int, int]:
    """How many pairs ``max_length`` cuts, by how many tokens, of how many in all."""
    lost = [len(one) - len(other) for one, other in zip(whole, pairs)]
    return sum(n > 0 for n in lost), sum(lost), sum(map(len, whole))


def longer(pairs: Sequence[Pair]) -> dict[str, int]:
    """How many pairs have which answer as the longer one, in tokens; nothing of single answers."""
    whole = [pair for pair in pairs if pair.chosen and pair.rejected]
    if not whole:
        return {}
    found = Counter(
        (len(pair.chosen) > len(pair.rejected)) - (len(pair.chosen) < len(pair.rejected))
        for pair in whole
    )
    return {"chosen": found[1], "rejected": found[-1], "as long": found[0]}


def columns(rows: Sequence[Row]) -> dict[str, str]:
    """What stands in each column of the rows, and in how many of them; of messages that were made
    of text the text is no column."""
    kinds: dict[str, Counter[str]] = {}
    for row in rows:
        for name, value in row.items():
            if name == "plain":
                continue
            kind = {str: "text", list: "messages"}.get(type(value), type(value).__name__)
            kinds.setdefault(name, Counter())[kind if name in FIELDS else "value"] += 1
    told = {}
    for name, found in kinds.items():
        words = " and ".join(found) if name in FIELDS else ""
        share = "" if found.total() == len(rows) else f"in {found.total():,} of {len(rows):,} rows"
        told[name] = ", ".join(filter(None, (words, share)))
    return told


def checks(sides: Sequence[Side]) -> list[Check]:
    """Rows that stand twice, pairs that stand both ways round, prompts on both sides."""
    first: dict[bytes, str] = {}
    trained: dict[bytes, str] = {}
    found: dict[str, list[tuple[str, Row]]] = {what: [] for what in CHECKED}
    repeats, turned, shared = found.values()
    for side in sides:
        for number, row in enumerate(side.rows):
            where, texts = side.where(number), [prompt_key(row.get(n, "")) for n in FIELDS]
            own, other = _digest(*texts), _digest(texts[0], *texts[:0:-1])
            if own in first:
                repeats.append((f"{where}, as {first[own]}", row))
            elif own != other and other in first:
                turned.append((f"{where}, and {first[other]}", row))
            first.setdefault(own, where)
            prompt = _digest(alike(row["prompt"]))
            if side is sides[0]:
                trained.setdefault(prompt, where)
            elif prompt in trained:
                shared.append((f"{where}, and {trained[prompt]}", row))
    rows = [row for side in sides for row in side.rows]
    told = {what: what for what in CHECKED}
    if not any("chosen" in row and "rejected" in row for row in rows):
        told[TURNED] = BOTH if any("rejected" in row for row in rows) else ""
    return [
        Check(told[what], len(some), [Example(where, _fields(row)) for where, row in some[:SHOWN]])
        for what, some in found.items()
        if told[what]
    ]


def _digest(*texts: str) -> bytes:
    return hashlib.blake2b("\0".join(texts).encode(), digest_size=16).digest()


def alike(prompt: str | list[Row]) -> str:
    """The same for prompts that differ in case, spaces, width of letters or their last stop."""
    text = unicodedata.normalize("NFKC", readable(prompt)).casefold()
    return " ".join(text.split()).rstrip(" .?!:")


def readable(value: Any) -> str:
    """Messages as lines, a speaker each; anything else as text."""
    if not isinstance(value, list):
        return str(value)
    lines = []
    for turn in value:
        said = isinstance(turn, dict) and "role" in turn
        parts = (turn.get("content"), turn.get("tool_calls")) if said else (turn,)
        text = " ".join(str(part) for part in parts if part)
        lines.append(f"{turn['role']}: {text}" if said else text)
    return "\n".join(lines)


def counts(sides: Sequence[Side], lost: Sequence[Reason]) -> dict[str, dict[str, int]]:
    """By what is counted; of what did not happen only that all rows are kept."""
    rows = {side.name: len(side.rows) for side in sides}
    kept = {side.name: side.encoded.counts["kept"] for side in sides}
    whole = {name: count - kept[name] for name, count in rows.items()}
    before = sum(one.counts.get("file", 0) for one in lost)
    found = {"rows": rows, "kept": kept, "dropped": ({"file": before} if before else {}) | whole}
    found |= {f"dropped: {one.why}": one.counts for one in lost}
    for key, told in BESIDE.items():
        some = {side.name: side.encoded.counts[key] for side in sides}
        found |= {told: some} if any(some.values()) else {}
    return found


def dropped(task: Task, sides: Sequence[Side]) -> list[Reason]:
    """By reason, in the order in which rows are looked at."""
    found = [
        Reason(why, {"file": some.count}, [Example(at, _fields(row)) for at, row in some.examples])
        for why, some in task.dropped.items()
    ]
    for reason, why in FIXES.items():
        counts = {side.name: side.encoded.counts[f"dropped/{reason}"] for side in sides}
        examples = [
            Example(side.where(place), _fields(side.rows[place]))
            for side in sides
            for place in side.encoded.examples.get(reason, [])
        ]
        found += [Reason(why, counts, examples[:SHOWN])] if any(counts.values()) else []
    return found


def _fields(row: Row) -> dict[str, str]:
    more = (name for name in row if name not in (*FIELDS, "plain"))  # which is the same again
    names = [*(name for name in FIELDS if name in row), *more]
    return {name: shortened(readable(row[name]), LONG) for name in names}


def shortened(text: str, most: int) -> str:
    """The text with its middle left out where it is longer than ``most`` letters."""
    half = (most - 5) // 2
    return text if len(text) <= most else f"{text[:half]} ... {text[len(text) - half :]}"


def _subsets(sides: Sequence[Side]) -> dict[str, dict[str, int]]:
    found: dict[str, dict[str, int]] = {}
    for side in sides:
        for name, count in Counter(row.get("subset") for row in side.rows).items():
            if name is not None:
                found.setdefault(str(name), {})[side.name] = count
    return found


def evenly(pairs: Sequence[Pair], most: int) -> list[Pair]:
    """At most so many, from the first to the last."""
    step = max(len(pairs) / most, 1.0)
    return [pairs[int(n * step)] for n in range(min(len(pairs), most))]
