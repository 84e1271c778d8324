"""What ``inspect`` found in, as plain JSON; the sections of its page out."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.disk import write_text
from spo_lightning.report.charts import bars
from spo_lightning.report.page import Browsed, Lines, Note, Section, Table, Text, page

SEEN = 600  # letters of a text that stand open
FIELDS = ("prompt", "chosen", "rejected")
QUANTILES = ("lowest", "median", "p90", "p99", "highest")
MENU = {
    "train": "train",
    "held-out": "held out",
    "cut": "as long as max_length",
    "chosen": "chosen answer longer",
    "rejected": "rejected answer longer",
    "context": "with tokens in an answer that are not scored",
}
NUMBERED = "Three rows of each reason. Rows are numbered within train and within held-out."
USES = (
    "Green: what is scored. Violet: special tokens. Every token has a line before it and its id "
    "under the pointer."
)

Found = Mapping[str, Any]


def write(found: Found, path: Path, more: Sequence[Section] = ()) -> Path:
    """The page as one file, whole or not there; ``more`` sections at its end."""
    try:
        write_text(path, page(f"Data: {found['name']}", [*sections(found), *more]))
    except OSError as error:
        raise UserError(f"output={path}: {error.strerror}: name another place") from error
    return path


def sections(found: Found) -> list[Section]:
    """What became of the rows first, then what they are, then the rows themselves."""
    return [
        Section("What became of the rows", [*answer(found), counts(found), columns(found)]),
        Section("Dropped", dropped(found), NUMBERED),
        Section("Checks", checks(found), "Of all rows, before any is dropped."),
        Section("Lengths", lengths(found), "Tokens, before max_length cuts them."),
        Section("Margins and subsets", [*margins(found), *subsets(found)]),
        Section(f"One {noun(found)}, token by token", one_pair(found), USES),
        Section("Rows", browsed(found), "From the first to the last, evenly."),
    ]


def noun(found: Found) -> str:
    """What its rows are: single answers are no pairs."""
    return "pair" if found["longer"] else "row"


def answer(found: Found) -> list[Note]:
    """The layout in a line, then what else was said of the rows."""
    counted = ", ".join(f"{name} {count:,}" for name, count in found["source"].items() if count)
    layout = f"Layout: {found['layout']}"
    notes = [Note(note, alarm=not note.startswith(layout)) for note in found["notes"]]
    return [*notes, *([Note(f"Source: {counted}.")] if counted else [])]


def columns(found: Found) -> Table:
    return Table("columns", ["column", "what it holds"], list(found["columns"].items()))


def counts(found: Found) -> Table:
    heads = list(found["counts"]["dropped"])
    rows = [[name, *map(some.get, heads)] for name, some in found["counts"].items()]
    return Table("counts", ["", *heads], rows)


def dropped(found: Found) -> list[Table]:
    rows = examples((one["why"], one["examples"]) for one in found["dropped"])
    return [Table("dropped", ["why", "which", "the row"], rows)] if rows else []


def checks(found: Found) -> list[Table]:
    counted = [[one["what"], one["count"]] for one in found["checks"]]
    rows = examples((one["what"], one["examples"]) for one in found["checks"])
    told = [Table("checked", ["what", "which", "the row"], rows)] if rows else []
    return [Table("checks", ["what", "rows"], counted), *told]


def examples(some: Iterable[tuple[str, Sequence[Found]]]) -> list[list[Any]]:
    return [[why, one["where"], fields(one["fields"])] for why, found in some for one in found]


def fields(row: Mapping[str, str]) -> Text:
    named = ((f"{name}: ", f"{text}\n") for name, text in row.items())
    return Text([piece for name, text in named for piece in ((name, "name", ""), (text, "", ""))])


def lengths(found: Found) -> list[Any]:
    some = found["lengths"]
    if not some:
        return [Note("No pair is left.", alarm=True)]
    (cut, lost, tokens), limit = found["cut"], found["max_length"]
    pairs = some["prompt"]["count"]
    told = (
        f"max_length={limit} cuts {cut:,} of {pairs:,} {noun(found)}s ({cut / pairs:.1%}) and "
        f"{lost:,} of {tokens:,} tokens ({lost / tokens:.1%})."
    )
    shares = {name: f"{count:,} ({count / pairs:.1%})" for name, count in found["longer"].items()}
    more = (
        f"The longer answer is the chosen one in {shares['chosen']} pairs, the rejected one in "
        f"{shares['rejected']}; they are equally long in {shares['as long']}."
        if shares
        else None  # texts have one answer
    )
    *_, whole = some
    parts = {name: some[name] for name in FIELDS if name in some}
    both = {f"{whole} answer": some[whole]}
    line = limit if limit < 2 * some[whole]["p99"] else None  # else far to the right
    return [
        Note(told, alarm=cut > 0),
        *([Note(more)] if more else []),
        spreads("lengths", "tokens of", some),
        bars("lengths", "Tokens of each part", "tokens", parts),
        bars("limit", "Tokens that max_length limits", "tokens", both, line, "max_length"),
    ]


def spreads(key: str, what: str, some: Mapping[str, Found]) -> Table:
    rows = [[name, *(one[quantile] for quantile in QUANTILES)] for name, one in some.items()]
    return Table(key, [what, "lowest", "median", "90%", "99%", "highest"], rows, digits=2)


def margins(found: Found) -> list[Any]:
    if found["margins"] is None:
        return []
    some = {"margin": found["margins"]}
    return [spreads("margins", "of", some), bars("margins", "Margins of the rows", "margin", some)]


def subsets(found: Found) -> list[Table]:
    rows, totals = [], found["counts"]["rows"]
    for name, some in found["subsets"].items():
        row: list[Any] = [name]
        for side, whole in totals.items():
            row += [some.get(side, 0), f"{some.get(side, 0) / max(whole, 1):.1%}"]
        rows.append(row)
    head = ["subset", *(name for side in totals for name in (side, "share"))]
    return [Table("subsets", head, rows)] if rows else []


def one_pair(found: Found) -> list[Any]:
    pair = found["pair"]
    if pair is None:
        return []
    sides = sides_of(found)
    tokens: dict[str, int] = dict(zip(FIELDS, pair["tokens"]))
    names = [f"{side}, {tokens[side]} tokens" for side in sides]
    texts = [Text([token(piece) for piece in pair[side]]) for side in sides]
    where = Note(f"{pair['side']}, row {pair['row'] + 1}.")
    return [where, *(Lines(name, text) for name, text in zip(names, texts))]


def sides_of(found: Found) -> tuple[str, ...]:
    """The parts of its pairs; texts have no rejected answer, and labels may all be alike."""
    return tuple(side for side in FIELDS if side in found["lengths"])


def token(piece: Found) -> tuple[str, str, str]:
    ids = " ".join(map(str, piece["ids"]))
    return piece["text"].replace("\n", "⏎\n"), f"token {classes(piece)}", ids


def classes(piece: Found) -> str:
    return piece["use"] + " special" * piece["special"]


def browsed(found: Found) -> list[Browsed]:
    rows, marks, sides = [], [], sides_of(found)
    for pair in found["rows"]:
        texts = [text(pair[side], ends=side == "prompt") for side in sides]
        tokens = [n for side, n in zip(FIELDS, pair["tokens"]) if side in sides]
        rows.append([f"{pair['side']} {pair['row'] + 1}", *texts, *tokens])
        marks.append(" ".join(marked(pair, found["max_length"])))
    known = set(" ".join(marks).split())
    menu = {mark: told for mark, told in MENU.items() if mark in known}
    head = ["row", *sides, *(f"{side}, tokens" for side in sides)]
    return [Browsed("rows", head, rows, marks, menu)] if rows else []


def marked(pair: Found, limit: int) -> Iterable[str]:
    prompt, chosen, rejected = pair["tokens"]
    yield pair["side"]
    if prompt + max(chosen, rejected) >= limit:
        yield "cut"
    if chosen and rejected and chosen != rejected:
        yield "chosen" if chosen > rejected else "rejected"
    if any(piece["use"] == "context" for side in FIELDS for piece in pair[side]):
        yield "context"


def text(pieces: Sequence[Found], *, ends: bool) -> Text:
    """Its first letters open, or its last ones; the rest is folded."""
    room, seen, folded = SEEN, [], []
    for piece in reversed(pieces) if ends else pieces:
        whole, look = piece["text"], classes(piece)
        at = max(len(whole) - room, 0) if ends else room
        open_, shut = (whole[at:], whole[:at]) if ends else (whole[:at], whole[at:])
        room = max(room - len(whole), 0)
        seen += [(open_, look, "")] if open_ else []
        folded += [(shut, look, "")] if shut else []
    return Text(seen[::-1], folded[::-1], True) if ends else Text(seen, folded)
