"""``python -m spo_lightning.rounds.compare DIR...``: loops beside each other, round by round.

The directories hold loops. Those that differ in their seed only are one setting; a number is a
mean over its seeds with the 95% interval of Student's t. Settings that differ in one word, as in
solver, are compared at the seeds that both have. Written into --output: compare.html, table.md
and figures/.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.errors import UserError
from spo_lightning.report import beside

if TYPE_CHECKING:
    from spo_lightning.report.charts import Chart
    from spo_lightning.report.reading import Run
    from spo_lightning.report.settings import Setting

ABOUT = (
    "Greedy held-out answers of a round's end: their score by the loop's judge, and their wins "
    "against the answers of the loop's start; round 0 is that start. Displacement is against the "
    "round's own reference."
)
WINS = "win: start"


@dataclass(frozen=True)
class Rounds:
    """The rounds that loops of one setting have walked: of each the same runs, with the numbers of
    its end."""

    every: "list[Setting]"  # round 0 first

    @property
    def name(self) -> str:
        return self.every[0].name


def main() -> None:
    beside.main("compare", __doc__, "loops, or above them", report)


def report(directories: Sequence[Path], output: Path) -> str:
    """Write the page; the tables as markdown."""
    from spo_lightning.records.disk import write_text
    from spo_lightning.report.charts import still
    from spo_lightning.report.page import Section, Table, page
    from spo_lightning.report.settings import table

    found = settings(loops(directories))
    names = numbers_of(found)
    rounds = ["setting", "round", "seeds", *names], by_round(found, names)
    apart = ["less", "round", "seeds", *names], differences(found, names)
    drawn = curves(found, names)
    sections = [
        Section("Rounds", [Table("rounds", *rounds)], ABOUT),
        Section(
            "Differences by seed",
            [Table("apart", *apart)] if apart[1] else [],
            "A star: zero is outside.",
        ),
        Section("Round by round", drawn, "Means over the seeds."),
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "compare.html", page("Loops", sections))
    told = ["", *table(*apart)] if apart[1] else []
    text = "\n".join([*table(*rounds), *told]) + "\n"
    write_text(output / "table.md", text)
    (output / "figures").mkdir(exist_ok=True)
    for chart in drawn:
        still(chart, output / "figures")
    return text


def loops(directories: Sequence[Path]) -> "list[tuple[Run, list[dict[str, float]]]]":
    """Every loop that has come to the end of a round, with the numbers of its start and of each
    round."""
    from spo_lightning.report.reading import read
    from spo_lightning.sweep.again import LOOP

    found = []
    for top in directories:
        for path in sorted(top.rglob(LOOP)):
            try:
                rounds = json.loads(path.read_text(encoding="utf-8"))["rounds"]
                told = [numbers(one, "final", "after") for one in rounds]
                start = numbers(rounds[0], "init", "before") if rounds else {}
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path}: not as a loop writes it ({error})") from error
            if told:
                name = str(path.parent.relative_to(top))
                run = read(path.parent, name, {})
                own = {key: v for key, v in run.config.get("loop", {}).items() if key != "rounds"}
                found.append((replace(run, config={**run.config, "loop": own}), [start, *told]))
    if not found:
        where = ", ".join(map(str, directories))
        raise UserError(f"no loop that has come to the end of a round in {where}")
    return found


def numbers(one: Mapping[str, Any], end: str, judged: str) -> dict[str, float]:
    """Of a round's ``init`` or ``final``: what a table shows."""
    held, by_judge = one[end], one["judged"]
    wins = by_judge.get("start", {}).get("win_rate") if end == "final" else None
    told = {"score": by_judge.get(judged), WINS: wins}
    kept = ("exact_match", "nll/chosen", "displacement/rate", "answers/tokens")
    told |= {name: held.get(name) for name in kept}
    told |= {name: value for name, value in sorted(held.items()) if name.startswith("tasks/")}
    if end == "init":
        told["displacement/rate"] = None  # nothing has moved yet
    else:
        told["usable"] = one["usable"]
    return {name: value for name, value in told.items() if isinstance(value, int | float)}


def settings(found: "Sequence[tuple[Run, list[dict[str, float]]]]") -> list[Rounds]:
    """Loops that differ in their seed only, together."""
    from spo_lightning.report.settings import Setting, label, told_apart

    alike: dict[str, tuple[Mapping[str, Any], list[Any]]] = {}
    for (run, rounds), told in zip(found, told_apart([run for run, _ in found])):
        alike.setdefault(label(told), (told, []))[1].append((run, rounds))
    return [
        Rounds(
            [
                Setting(told, [replace(run, final=of[n]) for run, of in some if n < len(of)])
                for n in range(max(len(of) for _, of in some))
            ]
        )
        for told, some in alike.values()
    ]


def numbers_of(found: Sequence[Rounds]) -> list[str]:
    """The names of all numbers that some round has."""
    runs = (run for some in found for setting in some.every[::-1] for run in setting.runs)
    return list(dict.fromkeys(name for run in runs for name in run.final))


def by_round(found: Sequence[Rounds], names: Sequence[str]) -> list[list[Any]]:
    from spo_lightning.report.settings import cell

    return [
        [some.name, n, len(one.seeds), *(cell(one.values(name).values()) for name in names)]
        for some in found
        for n, one in enumerate(some.every)
    ]


def differences(found: Sequence[Rounds], names: Sequence[str]) -> list[list[Any]]:
    """Of settings that differ in one word, at the last round that both have; a loop that brings a
    loss is one word."""
    from spo_lightning.report.settings import less, starred

    rows = []
    for one, other in combinations(found, 2):
        last = min(len(one.every), len(other.every)) - 1
        left, right = one.every[last], other.every[last]
        words = left.told.keys() | right.told.keys()
        differ = {word for word in words if left.told.get(word) != right.told.get(word)}
        seeds = len(left.seeds & right.seeds)
        if (len(differ) == 1 or differ == {"loop", "loss"}) and seeds > 1:
            apart = [starred(less(right, left, name)) for name in names]
            if any(apart):  # none between data that differ
                rows.append([f"{right.name} less {left.name}", last, seeds, *apart])
    return rows


def curves(found: Sequence[Rounds], names: Sequence[str]) -> "list[Chart]":
    """A chart of each number, a line of each setting."""
    from spo_lightning.report.charts import lines, nth, series, unit

    charts = []
    for name in names:
        drawn = []
        for place, some in enumerate(found):
            means = [(n, one.mean(name)) for n, one in enumerate(some.every)]
            known = [(n, mean) for n, mean in means if mean is not None]
            if known:
                x, y = zip(*known)
                drawn.append(series(some.name, x, y, "lines+markers", **nth(place)))
        key = name.replace("/", "-").replace(": ", "-")
        charts.append(lines(key, name, "round", unit(name), drawn))
    return charts


if __name__ == "__main__":
    main()
