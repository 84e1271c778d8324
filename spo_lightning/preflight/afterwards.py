"""``python -m spo_lightning.preflight.afterwards DIR...``: did it come as it was foreseen?

The directories hold preflights, and runs that they looked ahead at. Every preflight is laid beside
the end of its run, and beside first pilots of the same run that took more steps: how well its
score, its first pilot and the mean of all rank the held-out pairs by what then became of
log pi(y_w), and whether the mean fell where it was foreseen. Written into --output:
afterwards.html, table.md and figures/.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.report import beside

HEAD = (
    *(
        "run",
        "seed",
        "pilots",
        "of steps",
        "step",
        "pairs",
        "score ranks",
        "first ranks",
        "pilots rank",
    ),
    *("foreseen", "likely", "measured", "inside", "displaced, foreseen", "displaced"),
)
ABOUT = (
    "Ranks: Spearman's correlation, over held-out pairs, with the change of log pi(y_w) at the "
    "step. Foreseen: the interval of the mean, nats, where the pilot holds that far; and what is "
    "likely within it."
)


@dataclass(frozen=True)
class Ahead:
    """A preflight."""

    run: Mapping[str, Any]
    steps: int  # of a pilot
    pilots: int
    score: Mapping[int, float]  # by row
    first: Mapping[int, float]
    measured: Mapping[int, float]
    alone: Mapping[int, float]  # in the first pilot


@dataclass(frozen=True)
class Came:
    """What became of log pi(y_w) of held-out rows, nats."""

    run: Mapping[str, Any]
    step: int
    changes: Mapping[int, float]


def main() -> None:
    beside.main("afterwards", __doc__, "preflights and runs", report)


def report(directories: Sequence[Path], output: Path) -> str:
    """Write the page; the table as markdown."""
    from spo_lightning.records.disk import write_text
    from spo_lightning.report.charts import still
    from spo_lightning.report.page import Section, Table, page
    from spo_lightning.report.settings import table

    ahead = [foretold(path) for path in places(directories, "preflight.json")]
    came = [then for path in places(directories, "metrics.json") if (then := ended(path))]
    alone = {(json.dumps(one.run, sort_keys=True), one.steps): one for one in ahead}
    came += [Came(one.run, one.steps, one.alone) for one in alone.values()]
    both = [
        (one, then)
        for one in ahead
        for then in came
        if one.run == then.run and one.steps < then.step and one.score.keys() & then.changes.keys()
    ]
    if not both:
        raise UserError(
            f"{', '.join(map(str, directories))}: no preflight stands beside a run of the same "
            "data, loss, solver, optimizer, seed and batch_size, nor beside a longer pilot of it"
        )
    rows = sorted((row(*pair) for pair in both), key=lambda cells: cells[:5])
    output.mkdir(parents=True, exist_ok=True)
    drawn = charts(both)
    sections = [
        Section("Did it come so?", [Table("afterwards", HEAD, rows)], ABOUT),
        Section("Pair by pair", drawn, "Held-out pairs of every seed, at the last step known."),
    ]
    write_text(output / "afterwards.html", page("Afterwards", sections))
    text = "\n".join(table(HEAD, [[*map(shown, cells)] for cells in rows])) + "\n"
    write_text(output / "table.md", text)
    (output / "figures").mkdir(exist_ok=True)
    for chart in drawn:
        still(chart, output / "figures")
    return text


def places(directories: Sequence[Path], name: str) -> list[Path]:
    """Every directory in or below them with such a file."""
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}")
    found = (path.parent for top in directories for path in sorted(top.rglob(name)))
    return list(dict.fromkeys(found))


def foretold(directory: Path) -> Ahead:
    from spo_lightning.preflight.asked import telling

    path = directory / "preflight.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        numbers = (
            {int(pair["row"]): float(pair[name]) for pair in found["pairs"]}
            for name in ("score", "first", "measured", "alone")
        )
        return Ahead(
            telling(found["run"]), int(found["pilot_steps"]), len(found["pilots"]), *numbers
        )
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path}: not as a preflight writes it ({error}): look again") from error


def ended(directory: Path) -> Came | None:
    """None of a run that has not come to its end."""
    import yaml

    from spo_lightning.preflight.asked import telling
    from spo_lightning.records.disk import json_rows
    from spo_lightning.report.page import numbered

    try:
        config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        numbers = json.loads((directory / "metrics.json").read_text(encoding="utf-8"))
        if not numbers.get("final"):
            return None
        steps = int(numbers["steps"])
        changes = {
            int(row["row"]): row["logps/chosen"] - row["reference/chosen"]
            for row in json_rows(directory / "pairs.jsonl")
        }
    except (OSError, KeyError, TypeError, ValueError, yaml.YAMLError) as error:
        told = f"{directory}: no config.yaml, metrics.json and pairs.jsonl of a run ({error})"
        raise UserError(told) from error
    return Came(numbered(telling(config)), steps, changes)


def common(one: Ahead, then: Came) -> list[int]:
    return sorted(one.score.keys() & then.changes.keys())


def row(one: Ahead, then: Came) -> list[Any]:
    """Of the table."""
    from spo_lightning.preflight import judgement

    rows = common(one, then)
    score, first, alone, mean, changes = (
        [numbers[at] for at in rows]
        for numbers in (one.score, one.first, one.alone, one.measured, then.changes)
    )
    ranks = (judgement.spearman(numbers, changes) for numbers in (score, alone, mean))
    came = judgement.moved(changes)
    ahead = judgement.foreseen(first, mean, alone, one.pilots, one.steps, then.step)
    interval = inside = share = likely = ""
    if ahead["step"] == then.step:
        likely = ahead["mean"]
        interval = f"{ahead['low']:+.2f} to {ahead['high']:+.2f}"
        inside = "yes" if ahead["low"] <= came["mean"] <= ahead["high"] else "no"
        low, high = ahead["displaced"]
        share = f"{low:.0%} to {high:.0%}"
    pilots = [one.pilots, one.steps]
    place = [method(one.run), one.run["seed"], *pilots, then.step, len(rows), *ranks]
    return [*place, interval, likely, came["mean"], inside, share, f"{came['displaced']:.0%}"]


def method(run: Mapping[str, Any]) -> str:
    """Its loss and its solver, short."""
    loss, solver = (str(run[part]["_target_"]).rpartition(".")[2] for part in ("loss", "solver"))
    weight = run["solver"].get("weight")
    held = "" if solver == "NoLower" else f" + {solver}" + (f" {weight:g}" if weight else "")
    return f"{loss}{held}, lr {run['optimizer']['lr']:g}"


def charts(both: Sequence[tuple[Ahead, Came]]) -> list[Any]:
    """Of every method two clouds, its score's and its pilot's, over what came at the last step."""
    from spo_lightning.report.charts import lines, nth, series

    by: dict[str, list[tuple[Ahead, Came]]] = {}
    for one, then in both:
        by.setdefault(method(one.run), []).append((one, then))
    found = []
    for number, (name, pairs) in enumerate(sorted(by.items())):
        last = max(then.step for _, then in pairs)
        for what in ("score", "measured"):
            data = []
            seeds = {}  # of several preflights of a seed that of the most steps
            for one, then in sorted(pairs, key=lambda it: it[0].pilots * it[0].steps):
                if then.step == last:
                    seeds[one.run["seed"]] = (one, then)
            for n, (seed, (one, then)) in enumerate(sorted(seeds.items())):
                rows = common(one, then)
                x, y = ([part[at] for at in rows] for part in (getattr(one, what), then.changes))
                colour = nth(n)["colour"]
                data.append(series(f"seed {seed}", x, y, "markers", colour))
            across = "score, nats a step" if what == "score" else "change in the pilots, nats"
            title = f"{name}: {'score' if what == 'score' else 'pilots'} and step {last}"
            found.append(lines(f"{what}_{number}", title, across, "change then, nats", data))
    return found


def shown(value: Any) -> str:
    return f"{value:.2f}" if isinstance(value, float) else "" if value is None else str(value)


if __name__ == "__main__":
    main()
