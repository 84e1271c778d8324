"""A table of jobs (``sweep.table``) in; capability against preference of every method out.

The layout is that of the paper's Table 2 (2507.07723v2): each objective bare and with SPO, beside
the policy before training and two controls, SFT on the chosen answers and SFT on the SFT set.
"""

import csv
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, NamedTuple

from spo_lightning.errors import UserError
from spo_lightning.report.reading import natural
from spo_lightning.report.settings import Setting, cell, less, table
from spo_lightning.report.style import FELL, GREW, INK, OTHER, STYLE, saved

INIT, CHOSEN, SFT_SET, SPO = "init", "SFT on chosen", "SFT on the SFT set", " + SPO"
BASES = {
    **{"dpo": "DPO", "cpo": "CPO", "dpop": "DPOP", "rdpo": "R-DPO", "simpo": "SimPO"},
    **{"alpha_dpo": "AlphaDPO", "rpo": "RPO", "ipo": "IPO"},
}
PANELS = 3  # in a row of the picture
DASHES = ("-", "--", ":", "-.")  # of the lines of a front
MARKERS = "osv^<>pP*X"  # of the values along a line
CAPABILITY, WIN_RATE, ACCURACY = "exact_match", "win_rate", "preference/accuracy"
HEADINGS = {
    CAPABILITY: "exact match",
    WIN_RATE: "win rate",
    ACCURACY: "preference accuracy",
    "displacement/rate": "displacement rate",
    "displacement/chosen": "change of log pi(y_w), nats",
}
UNSHOWN = ("nll/chosen", "rewards/margins")  # of what every file has
# words that make a method; words that vary along one method's front; the rest is the setting
MOVED = ("displacement/rate", "displacement/chosen")
METHOD = ("loss", "solver", "data.sft")
FRONT = ("optimizer.lr", "loss.beta", "loss.eta", "solver.weight")


class Job(NamedTuple):
    """``choices``: the words it was started with."""

    choices: Mapping[str, str]
    seed: int
    init: Mapping[str, float]
    final: Mapping[str, float]


@dataclass(frozen=True)
class Part:
    """Jobs of one setting, by method."""

    name: str
    methods: Mapping[str, Setting]
    more: Sequence[str] = ()  # names of numbers that a file has besides (sweep.numbers)

    @property
    def preference(self) -> str:
        """The win rate where the data has a judge, else how often the chosen is the likelier."""
        first = next(iter(self.methods.values()))
        return WIN_RATE if WIN_RATE in first.runs[0].final else ACCURACY

    @property
    def capability(self) -> str:
        """Exact match, or where the data has no answers the first task of the harness."""
        return next((name for name in self.more if name.startswith("tasks/")), CAPABILITY)

    @property
    def jobs(self) -> list[Any]:
        return [job for setting in self.methods.values() for job in setting.runs]

    @property
    def bases(self) -> list[str]:
        """Objectives that ran bare and with SPO."""
        bare = [method.removesuffix(SPO) for method in self.methods if method.endswith(SPO)]
        return [base for base in bare if base in self.methods]

    def values(self, method: str, name: str) -> dict[int, float]:
        """By seed; ``INIT`` is the policy before training, whatever was trained then."""
        if method != INIT:
            return self.methods[method].values(name)
        return Setting({}, self.jobs).values(name, "init")

    def has(self, name: str) -> bool:
        """Whether some job has the number."""
        return any(self.values(method, name) for method in self.methods)

    def both(self, method: str) -> bool:
        """Whether some job of the method has both numbers of a point."""
        return all(self.values(method, name) for name in (self.preference, self.capability))

    def point(self, method: str) -> tuple[float, float]:
        """Preference and capability in the mean."""
        x, y = (
            [*self.values(method, name).values()] for name in (self.preference, self.capability)
        )
        return sum(x) / len(x), sum(y) / len(y)


def report(path: Path) -> tuple[str, list[Path]]:
    """The tables of ``path`` as markdown, and the files they and the pictures are written to.

    Raises ``UserError`` where the file is no table of jobs, or a page of another stands there.
    """
    rows = read(path)
    names = (name.removeprefix("final/") for name in rows[0] if name.startswith("final/"))
    more = [name for name in names if name not in {*HEADINGS, *UNSHOWN}]
    main, front = parts(jobs(rows), more)
    if not any(part.both(method) for part in (*main, *front) for method in part.methods):
        raise UserError(
            f"{path}: no job has both capability and preference ({CAPABILITY} or a task's number, "
            f"{WIN_RATE} or {ACCURACY}): a page of the runs' directory shows what they have"
        )
    titled = [(part.name, cells(part)) for part in main]
    titled += [(f"Front, {part.name}", along(part)) for part in front]
    text = "\n\n".join("\n".join([f"**{name}**", "", *table(*told)]) for name, told in titled)
    where = path.with_suffix(".md")
    if where.exists() and not where.read_text("utf-8").startswith("**"):
        raise UserError(
            f"{where} is no table of jobs, which would be written there: rename either"
        )
    where.write_text(text + "\n", encoding="utf-8")
    return text + "\n", [where, *drawn(main, front, path)]


def read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    if not rows or not {"config", "words"} <= rows[0].keys():
        raise UserError(f"{path}: no row of a job: name a file that sweep.table wrote")
    return rows


def jobs(rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """The rows of the file, taken apart."""
    found = []
    for row in rows:
        words: dict[str, str] = {}
        for word in row["words"].split():
            key, _, value = word.lstrip("+~").partition("=")
            words[key] = value.replace("\\", "")  # Hydra's, before braces
        init, final = (
            {name[len(when) :]: float(v) for name, v in row.items() if name.startswith(when) and v}
            for when in ("init/", "final/")
        )
        found.append(Job(words, int(words.pop("seed", 0)), init, final))
    return found


def parts(jobs: Sequence[Job], more: Sequence[str] = ()) -> tuple[list[Part], ...]:
    """The settings with their methods, and those in which a method was followed along a front:
    words of ``FRONT`` that vary within it. Where it names none, it stands in both."""
    every: dict[str, dict[str, list[Job]]] = {}
    for job in jobs:
        words = job.choices
        setting = " ".join(f"{k}={v}" for k, v in words.items() if k not in (*METHOD, *FRONT))
        every.setdefault(setting, {}).setdefault(method_of(words), []).append(job)
    main: list[Part] = []
    fronts: list[Part] = []
    for name in sorted(every, key=natural):
        alone: dict[str, Setting] = {}
        along: dict[str, Setting] = {}
        for method, some in sorted(every[name].items(), key=place):
            varied = [k for k in FRONT if len({job.choices.get(k) for job in some}) > 1]
            points: dict[tuple[str | None, ...], list[Job]] = {}
            for job in some:
                points.setdefault(tuple(job.choices.get(k) for k in varied), []).append(job)
            for values in sorted(points, key=lambda values: [*map(size, values)]):
                told = dict(zip(varied, values))
                named = [f"{k.split('.')[1]} {v}" for k, v in told.items() if v is not None]
                if not named:
                    alone[method] = Setting({}, points[values])
                if varied:
                    name_here = ", ".join([method, *(named or ["default"])])
                    along[name_here] = Setting(told, points[values])
        main += [Part(name, alone, more)] if alone else []
        # in its picture the controls too, and what SPO is held against
        moved = [name.split(", ")[0] for name in along]
        bare = sorted({name.removesuffix(SPO) for name in moved if name.endswith(SPO)})
        held = (name for name in (CHOSEN, SFT_SET, *bare) if name not in moved)
        beside = {name: alone[name] for name in held if name in alone}
        fronts += [Part(name, beside | along, more)] if along else []
    return main, fronts


def size(value: str | None) -> tuple[float, str]:
    """To sort by: numbers first; none before them."""
    try:
        return float(value or "-inf"), ""
    except ValueError:
        return float("inf"), value or ""


def method_of(words: Mapping[str, str]) -> str:
    """What the paper calls a job of these words."""
    loss = words.get("loss") or "spo"
    solver = words.get("solver") or ("penalty" if loss == "spo" else "none")  # what loss=spo takes
    if loss == "sft":
        return SFT_SET if words.get("data.sft") == "own" else CHOSEN
    base = BASES.get("dpo" if loss == "spo" else loss, loss)
    return base + {"none": "", "penalty": SPO}.get(solver, f" + {solver}")


def place(item: tuple[str, Any]) -> tuple[int, str]:
    """Where a method stands: the controls first, then in the paper's order."""
    order = [CHOSEN, SFT_SET, *(base + end for base in BASES.values() for end in ("", SPO))]
    return (order.index(item[0]) if item[0] in order else len(order), item[0])


def cells(part: Part) -> tuple[list[str], list[list[Any]]]:
    """Means and 95% intervals over seeds, and + SPO's differences, paired by seed."""
    columns = [name for name in shown_of(part) if part.has(name)]
    pair = [name for name in columns if name not in MOVED]
    head = ["method", "seeds", *map(heading, columns)]
    head += [f"{heading(name)}, minus {other}" for other in ("bare", CHOSEN) for name in pair]
    rows: list[list[Any]] = []
    for method in (INIT, *part.methods):
        shown = (
            [] if method == INIT and n in MOVED else part.values(method, n).values()
            for n in columns
        )
        row = [cell(values) for values in shown]
        for other in (method.removesuffix(SPO), CHOSEN):
            one, two = part.methods.get(method), part.methods.get(other)
            apart = [[]] * len(pair)
            if method.endswith(SPO) and one and two:
                apart = [less(one, two, name) for name in pair]
            row += [cell(values, "+.3f") for values in apart]
        rows.append([method, len(part.values(method, columns[0])), *row])
    return head, rows


def along(part: Part) -> tuple[list[str], list[list[Any]]]:
    """The same of a front, a row per point."""
    columns = shown_of(part)
    rows = [
        [method, len(setting.seeds), *(cell(setting.values(name).values()) for name in columns)]
        for method, setting in part.methods.items()
        if setting.told  # the others stand in the table above
    ]
    return ["method", "seeds", *map(heading, columns)], rows


def shown_of(part: Part) -> list[str]:
    """The numbers of a table, in their order."""
    return [*dict.fromkeys((part.capability, part.preference, *MOVED, *part.more))]


def heading(name: str) -> str:
    return HEADINGS.get(name, name.removeprefix("tasks/"))


def drawn(main: Sequence[Part], front: Sequence[Part], path: Path) -> list[Path]:
    """A panel per setting: capability over preference, bare to + SPO by an arrow."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        panels = [*((part, methods) for part in main), *((part, points) for part in front)]
        columns = min(PANELS, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(4.3 * columns, 3.7 * rows), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for (part, draw), axis in zip(panels, axes):
            draw(part, axis)
            title = f"front: {part.name}" if draw is points else part.name
            axis.set_title("\n".join(textwrap.wrap(title, 46)))
            axis.set_xlabel(f"{HEADINGS[part.preference]}, held out")
            axis.set_ylabel(f"{heading(part.capability)}, held out")
        for axis in axes[len(panels) :]:
            axis.remove()
        return saved(figure, path.with_suffix(""), dpi=150, kinds=("png", "svg"))


def methods(part: Part, axis: Any) -> None:
    """The controls in grey; every objective, and from its bare form an arrow to that with SPO."""
    controls(part, axis)
    bare = [m for m in part.methods if m not in (CHOSEN, SFT_SET) and not m.endswith(SPO)]
    for number, base in enumerate(method for method in bare if part.both(method)):
        at = part.point(base)
        axis.plot(*at, "o", color=FELL, mfc="white", label="bare")
        if base in part.bases and part.both(base + SPO):
            held = part.point(base + SPO)
            axis.annotate("", held, at, arrowprops={"arrowstyle": "->", "color": "#999999"})
            axis.plot(*held, "o", color=GREW, label="+ SPO")
        x, side = (5, "left") if number % 2 else (-5, "right")  # neighbours' names apart
        axis.annotate(base, at, (x, 3), textcoords="offset points", ha=side, fontsize=7, color=INK)
    named = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(named.values(), named.keys(), fontsize=7)


def controls(part: Part, axis: Any) -> None:
    for method, marker in ((INIT, "D"), (CHOSEN, "s"), (SFT_SET, "^")):
        if (method == INIT or method in part.methods) and part.both(method):
            axis.plot(*part.point(method), marker, color=OTHER, label=method)


def points(part: Part, axis: Any) -> None:
    """A front: of every method a line through the values of the first word that varies, marked by
    value, and one for each value of the others; rings where a job names none."""
    controls(part, axis)
    lines: dict[str, list[tuple[str, tuple[float, float]]]] = {}
    for method, setting in part.methods.items():
        if method in (CHOSEN, SFT_SET):
            continue
        told = [(k.split(".")[1], v) for k, v in setting.told.items()]
        name, at = method.split(", ")[0], part.point(method)
        if not any(v for _, v in told):
            axis.plot(*at, "o", color=GREW if SPO in name else FELL, mfc="white", ms=7)
            axis.annotate(name, at, (5, 3), textcoords="offset points", fontsize=7, color=INK)
            continue
        (first, value), *others = told
        name = ", ".join([name, *(f"{k} {v}" for k, v in others)])
        lines.setdefault(name, []).append((f"{first} {value}", at))
    every = dict.fromkeys(value for line in lines.values() for value, _ in line)
    marks = dict(zip(every, cycle(MARKERS)))
    for number, (name, line) in enumerate(lines.items()):
        look = {"color": GREW if SPO in name else FELL}
        axis.plot(*zip(*(at for _, at in line)), DASHES[number % 4], label=name, lw=1, **look)
        for value, at in line:
            axis.plot(*at, marks[value], markersize=4, **look)
    for value, mark in marks.items():
        axis.plot([], [], mark, color=INK, label=value, markersize=4)
    axis.legend(fontsize=7)
