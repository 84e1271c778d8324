"""The numbers of a loop's rounds in, its page out, in the look of the reports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spo_lightning.report.charts import Chart, lines, nth, series, unit
from spo_lightning.report.page import Section, Table, page

NAME = "loop.html"
WINS = (
    "Greedy held-out answers at a round's end against those of the loop's start and of the "
    "round's own start, by the loop's judge; ties half, 95% intervals over prompts in the table."
)
DISPLACED = "Held-out pairs under the round's end against its reference, the round's own."
# of the table: a heading, and where its number stands
COLUMNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("score", ("judged", "after")),
    ("win: start", ("judged", "start", "win_rate")),
    ("win: last", ("judged", "last", "win_rate")),
    ("exact match", ("final", "exact_match")),
    ("nll", ("final", "nll/chosen")),
    ("displaced", ("final", "displacement/rate")),
    ("tokens", ("final", "answers/tokens")),
    ("usable", ("usable",)),
    ("pairs", ("pairs",)),
    ("steps", ("steps",)),
    ("seconds", ("seconds",)),
)
Rounds = Sequence[Mapping[str, Any]]


def whole(rounds: Rounds) -> str:
    """The file."""
    return page("Loop", sections(rounds))


def sections(rounds: Rounds) -> list[Section]:
    """The table, then the rounds as curves; 0 is the loop's start."""
    count = [one["number"] for one in rounds]
    wins = {
        f"against the {words}": [_at(one, ("judged", of, "win_rate")) for one in rounds]
        for of, words in (("start", "loop's start"), ("last", "round's start"))
    }
    fate = {
        name: [one["final"].get(name) for one in rounds]
        for name in ("displacement/rate", "displacement/chosen")
    }
    usable = {"prompts that give a pair": [one["usable"] for one in rounds]}
    drawn = {"answers drawn": [one["score"] for one in rounds]}
    scored, long = ends(rounds, judged), ends(rounds, held("answers/tokens"))
    names = {name for one in rounds for name in one["final"]}
    can = [name for name in ("exact_match", *sorted(names)) if name.startswith(("tasks/", "exa"))]
    return [
        Section("Rounds", [Table("rounds", *cells(rounds))]),
        Section(
            "What the judge says",
            [
                *curve("wins", "Win rate", count, wins, "win_rate"),
                *curve("score", "Score of greedy held-out answers", *scored, "score"),
                *curve("drawn", "Score of the answers at a round's start", count, drawn, "score"),
            ],
            WINS,
        ),
        Section(
            "What it can still do",
            [
                *(
                    block
                    for name in dict.fromkeys(can)
                    for block in curve(name, name, *ends(rounds, held(name)), name)
                ),
                *curve("nll", "NLL of the chosen", *ends(rounds, held("nll/chosen")), "nll"),
                *curve("tokens", "Length of greedy answers", *long, "tokens"),
            ],
        ),
        Section(
            "Displacement",
            [
                block
                for name, values in fate.items()
                for block in curve(name, name, count, {name: values}, name)
            ],
            DISPLACED,
        ),
        Section("Pairs", curve("usable", "Prompts with a usable pair", count, usable, "prompts")),
    ]


def judged(one: Mapping[str, Any], end: str) -> float | None:
    """What the judge gives a round's answers, ``init`` or ``final``."""
    return one["judged"].get({"init": "before", "final": "after"}[end])


def held(name: str) -> Callable[[Mapping[str, Any], str], float | None]:
    """A held-out number of a round's run."""
    return lambda one, end: one[end].get(name)


def ends(
    rounds: Rounds, of: Callable[[Mapping[str, Any], str], float | None]
) -> tuple[list[int], dict[str, list[float | None]]]:
    """A number at the loop's start and at every round's end."""
    values = [of(rounds[0], "init"), *(of(one, "final") for one in rounds)]
    return [0, *(one["number"] for one in rounds)], {"": values}


def curve(
    key: str, title: str, x: Sequence[int], told: Mapping[str, Sequence[Any]], of: str
) -> list[Chart]:
    """One chart of the series that have numbers; none where none has."""
    found = []
    for place, (label, values) in enumerate(told.items()):
        known = [(at, value) for at, value in zip(x, values) if value is not None]
        if known:
            xs, ys = zip(*known)
            found.append(series(label, xs, ys, "lines+markers", **nth(place)))
    return [lines(key.replace("/", "-"), title, "round", unit(of), found)] if found else []


def cells(rounds: Rounds) -> tuple[list[str], list[list[Any]]]:
    """Headings that have a number in some round, and their numbers."""
    rows = [{name: _at(one, path) for name, path in COLUMNS} for one in rounds]
    told = [name for name, _ in COLUMNS if any(row[name] is not None for row in rows)]
    body = [[one["number"], *(row[name] for name in told)] for one, row in zip(rounds, rows)]
    return ["round", *told], body


def table(rounds: Rounds) -> str:
    """The same as plain text."""
    head, body = cells(rounds)
    text = [head, *([_shown(value) for value in row] for row in body)]
    wide = [max(len(row[place]) for row in text) for place in range(len(head))]
    return "\n".join("  ".join(c.rjust(w) for c, w in zip(row, wide)) for row in text)


def _at(one: Any, path: Sequence[str]) -> Any:
    for name in path:
        one = one.get(name) if isinstance(one, Mapping) else None
    return one


def _shown(value: Any) -> str:
    return "" if value is None else f"{value:.4f}" if isinstance(value, float) else str(value)
