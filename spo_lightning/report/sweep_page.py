"""Several runs' files in, the sections of one page out: which setting, how sure, at what price."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spo_lightning.report import paper
from spo_lightning.report.charts import COLOURS, DASHES, GREY, Chart, Heat, Series, unit
from spo_lightning.report.page import Note, Section, Table
from spo_lightning.report.reading import Run
from spo_lightning.report.table import interval, label, told_apart

# which number ranks, the first that the runs have; more is better
QUALITY = ("win_rate", "exact_match", "rougeL", "preference/accuracy", "rewards/accuracies")
CAPABILITY = ("exact_match", "rougeL")
LOSS = 0.02  # of capability against init, above which a setting is not ranked first
SHOWN = (
    *("exact_match", "win_rate", "rougeL", "preference/accuracy", "rewards/accuracies"),
    *("rewards/margins", "nll/chosen", "displacement/rate", "displacement/chosen"),
)
CURVES = ("logps/chosen", "logps/rejected", "displacement/chosen", "rewards/margins", "loss")
MOST_LINES = 24  # settings in a chart of curves: more cannot be told apart


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only."""

    told: Mapping[str, Any]  # what tells it from the others
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return label(self.told)

    def values(self, number: str, when: str = "final") -> dict[int, float]:
        """By seed."""
        found = ((run.seed, getattr(run, when)) for run in self.runs)
        return {seed: numbers[number] for seed, numbers in found if number in numbers}

    def mean(self, number: str) -> float | None:
        values = [*self.values(number).values()]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Sweep:
    """The runs of a page."""

    runs: Sequence[Run]

    @cached_property
    def settings(self) -> list[Setting]:
        """What did not come to its numbers is left out."""
        done = [run for run in self.runs if run.final and run.config]
        apart = told_apart([(run.path, {"choices": run.choices}, run.config) for run in done])
        found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
        for run in done:
            told = apart[run.path]
            found.setdefault(label(told), (told, []))[1].append(run)
        return [Setting(*both) for both in found.values()]

    @cached_property
    def names(self) -> list[str]:
        """Held-out numbers that some run has, in the order of ``SHOWN``."""
        return [n for n in SHOWN if any(setting.values(n) for setting in self.settings)]

    @cached_property
    def quality(self) -> str | None:
        return next((name for name in QUALITY if name in self.names), None)

    @cached_property
    def ranked(self) -> list[Setting]:
        """By quality; a setting that lost capability comes after those that kept it."""
        quality = self.quality
        if quality is None:
            return []
        some = [setting for setting in self.settings if setting.mean(quality) is not None]
        return sorted(some, key=lambda s: (kept(s) is not False, s.mean(quality)), reverse=True)


def kept(setting: Setting) -> bool | None:
    """Whether capability is within ``LOSS`` of that before training; None where unmeasured."""
    for name in CAPABILITY:
        before, after = setting.values(name, "init"), setting.values(name)
        both = [after[seed] - before[seed] for seed in after if seed in before]
        if both:
            return sum(both) / len(both) >= -LOSS
    return None


def sections(runs: Sequence[Run]) -> list[Section]:
    """The answer first, then what it stands on."""
    sweep = Sweep(runs)
    return [
        Section("The answer", [*answer(sweep), *troubles(runs)]),
        Section("Ranking", ranking(sweep), RANKING),
        Section("Differences by seed", differences(sweep), DIFFERENCES),
        Section("Methods, bare and with SPO", methods(sweep)),
        Section(
            "Over the grid",
            heats(sweep),
            "Means over seeds, and over whatever else varies; an empty field has no run.",
        ),
        Section("Quality against displacement", front(sweep), FRONT),
        Section("Curves", curves(sweep), "Means over seeds at each logged step."),
        Section("Runs", jobs(runs)),
        Section("What differs", [differing(sweep)] if sweep.settings else []),
    ]


RANKING = (
    "Mean ± 95% interval over seeds (Student's t). Settings that lost more than "
    f"{LOSS} of capability come last. Click a heading to sort."
)
DIFFERENCES = "The first of the ranking less each other, at the seeds that both have."
FRONT = "Settings on the front are not beaten in both; right is less displacement, up is better."


def answer(sweep: Sweep) -> list[Note]:
    """Which setting is best, whether that is significant, and what became of the good answers."""
    if not sweep.ranked or sweep.quality is None:
        return [Note("No run has come to its numbers yet.")]
    best, quality = sweep.ranked[0], sweep.quality
    lines = [f"Best by {quality}: {best.name}, {shown(best.values(quality).values())}."]
    for name in CAPABILITY:
        if name != quality and name in sweep.names:
            before = shown(best.values(name, "init").values())
            lines.append(f"{name} there: {shown(best.values(name).values())}, before {before}.")
    if kept(best) is False:
        lines.append(f"No setting kept capability within {LOSS} of that before training.")
    if len(sweep.ranked) > 1:
        second = sweep.ranked[1]
        lost = " (which lost capability)" if kept(second) is False else ""
        apart = less(best, second, quality)
        lines.append(f"Next: {second.name}{lost}; {verdict(apart)}.")
    moved = best.mean("displacement/chosen")
    if moved is not None:
        share = best.mean("displacement/rate")
        rate = "" if share is None else f"; {share:.0%} of pairs lost some"
        word = "lost" if moved < 0 else "gained"
        lines.append(
            f"With the best, chosen answers {word} {abs(moved):.2f} nats in the mean{rate}."
        )
    return [Note(" ".join(lines))]


def less(one: Setting, other: Setting, number: str) -> list[float]:
    """Differences at the seeds that both have; none between data that differ."""
    if one.told.get("data") != other.told.get("data"):
        return []
    left, right = one.values(number), other.values(number)
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def verdict(apart: Sequence[float]) -> str:
    if len(apart) < 2:
        return "fewer than two seeds on the same data, so nothing can be said of significance"
    mean, half = interval(apart)
    word = "significant" if abs(mean) > half else "not significant"
    return f"difference {mean:+.3f} ± {half:.3f} over {len(apart)} seeds, {word} at 95%"


def shown(values: Any) -> str:
    found = [*values]
    if not found:
        return "unknown"
    mean, half = interval(found)
    return f"{mean:.3f}" + (f" ± {half:.3f}" if half == half else " (one seed)")


def troubles(runs: Sequence[Run]) -> list[Note]:
    """Jobs that failed or wait, and files that could not be read."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    found = [Note(f"{len(runs)} runs: {states}.")]
    found += [Note(f"{run.name}: {run.error}", alarm=True) for run in runs if run.error]
    return found + [Note(f"{r.name}: {line}", alarm=True) for r in runs for line in r.problems]


def ranking(sweep: Sweep) -> list[Table]:
    if not sweep.ranked:
        return []
    head = ["rank", "setting", "seeds"]
    for name in sweep.names:
        head += [name, "±"]
    rows = []
    for place, setting in enumerate(sweep.ranked, 1):
        row: list[Any] = [place, setting.name, len({run.seed for run in setting.runs})]
        for name in sweep.names:
            values = [*setting.values(name).values()]
            mean, half = interval(values) if values else (None, None)
            row += [mean, half if half == half else None]
        rows.append(row)
    return [Table("ranking", head, rows, digits=3)]


def differences(sweep: Sweep) -> list[Table]:
    if len(sweep.ranked) < 2:
        return []
    best, rows = sweep.ranked[0], []
    for other in sweep.ranked[1:]:
        row: list[Any] = [other.name]
        for name in sweep.names:
            apart = less(best, other, name)
            row.append(paper.signed(apart) + star(apart) if len(apart) > 1 else "")
        if any(row[1:]):
            rows.append(row)
    head = [f"{best.name}, less", *sweep.names]
    note = Note("* the 95% interval does not hold zero.")
    return [Table("differences", head, rows), note] if rows else []  # type: ignore[list-item]


def star(apart: Sequence[float]) -> str:
    mean, half = interval(apart)
    return " *" if abs(mean) > half else ""


def methods(sweep: Sweep) -> list[Any]:
    """The layout of the paper's table, where objectives ran bare and with SPO."""
    rows = []
    for setting in sweep.settings:
        for run in setting.runs:
            told = {k: str(v) for k, v in setting.told.items() if k not in ("loss", "solver")}
            words = {"loss": run.choices.get("loss", ""), "solver": run.choices.get("solver", "")}
            rows.append((told | words, run.seed, paper.numbers_of(run.init, run.final)))
    found = []
    for part in paper.parts(rows)[0]:
        if any(
            base in part.methods and base + paper.SPO in part.methods
            for base in paper.BASES.values()
        ):
            head, cells = paper.cells(part)
            found.append(Note(part.name or "All runs:"))
            found.append(Table(f"methods {part.name}", head, cells))
            found.append(points(part, len(found)))
    return found


def points(part: paper.Part, number: int) -> Chart:
    """Capability over preference, from bare to + SPO."""
    series = []
    for method, mark in ((paper.INIT, "diamond"), (paper.CHOSEN, "square"), (paper.SFT_SET, "x")):
        if method == paper.INIT or method in part.methods:
            x, y = paper.point(part, method)
            series.append(Series(method, [x], [y], "markers", GREY, mark=mark, texts=[method]))
    for base in part.bases:
        ends = [paper.point(part, base), paper.point(part, base + paper.SPO)]
        x, y = ([end[n] for end in ends] for n in (0, 1))
        series.append(Series(base, x, y, "lines+markers", texts=[base, base + paper.SPO]))
    names = (paper.HEADINGS[part.preference], "exact match")
    return Chart(f"methods_{number}", f"Bare to + SPO {part.name}", *names, series)


def heats(sweep: Sweep) -> list[Heat]:
    """A map per number over the two settings that vary most, by value."""
    axes = [name for name in keys(sweep) if len(levels(sweep, name)) > 1]
    if len(axes) < 2:
        return []
    axes = sorted(axes, key=lambda name: -len(levels(sweep, name)))[:2]
    x, y = sorted(axes, key=lambda name: (name.startswith("solver"), name))
    across, up = levels(sweep, x), levels(sweep, y)
    found = []
    for number in sweep.names:
        z = [[mean_at(sweep, number, {x: a, y: b}) for a in across] for b in up]
        filled = sum(v is not None for row in z for v in row)
        if filled > max(len(across), len(up)):  # a line of fields is no map
            title = f"{number} ({unit(number)})"
            key = f"heat_{number.replace('/', '_')}"
            found.append(Heat(key, title, x, y, [str(a) for a in across], [str(b) for b in up], z))
    return found


def keys(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(name for setting in sweep.settings for name in setting.told))


def levels(sweep: Sweep, name: str) -> list[Any]:
    """The values that a key takes, numbers in their order."""
    found = {s.told[name] for s in sweep.settings if name in s.told and _plain(s.told[name])}
    if all(isinstance(v, (int, float)) for v in found):
        return sorted(found)
    return sorted(found, key=str)


def _plain(value: Any) -> bool:
    return isinstance(value, (str, int, float))


def mean_at(sweep: Sweep, number: str, where: Mapping[str, Any]) -> float | None:
    values = [
        value
        for setting in sweep.settings
        if all(setting.told.get(name) == at for name, at in where.items())
        for value in setting.values(number).values()
    ]
    return sum(values) / len(values) if values else None


def front(sweep: Sweep) -> list[Chart]:
    """Every setting by quality and displacement, and those that no other beats in both."""
    quality, moved = sweep.quality, "displacement/chosen"
    if quality is None or moved not in sweep.names:
        return []
    found = []
    for number in dict.fromkeys((quality, *(n for n in CAPABILITY if n in sweep.names))):
        at = [(s.mean(moved), s.mean(number), s.name) for s in sweep.settings]
        known = [(x, y, name) for x, y, name in at if x is not None and y is not None]
        best = [p for p in known if not any(beats(q, p) for q in known)]
        best.sort()
        rest = [p for p in known if p not in best]
        series = [
            Series(title, *(list(column) for column in zip(*some)), mode=mode, colour=colour)  # type: ignore[misc]
            for title, some, mode, colour in (
                ("beaten", [p[:2] for p in rest], "markers", GREY),
                ("front", [p[:2] for p in best], "lines+markers", COLOURS[0]),
            )
            if some
        ]
        texts = {"beaten": [p[2] for p in rest], "front": [p[2] for p in best]}
        named = [Series(s.label, s.x, s.y, s.mode, s.colour, texts=texts[s.label]) for s in series]
        title = f"{number} against displacement"
        key = f"front_{number.replace('/', '_')}"
        found.append(Chart(key, title, unit(moved), f"{number}, {unit(number)}", named))
    return found


def beats(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    no_worse = one[0] >= other[0] and one[1] >= other[1]
    return no_worse and (one[0] > other[0] or one[1] > other[1])


def curves(sweep: Sweep) -> list[Chart]:
    """Small multiples: a chart per number, a line per setting."""
    chosen = sweep.ranked[:MOST_LINES] or sweep.settings[:MOST_LINES]
    found = []
    for name in CURVES:
        series = []
        for number, setting in enumerate(chosen):
            curve = mean_curve(setting, f"train/{name}")
            if curve is not None:
                colour = COLOURS[number % len(COLOURS)]
                dash = DASHES[number // len(COLOURS) % len(DASHES)]
                series.append(Series(setting.name, *curve, colour=colour, dash=dash))
        if series:
            key = f"curves_{name.replace('/', '_')}"
            found.append(Chart(key, f"train/{name}", "outer step", unit(name), series))
    return found


def mean_curve(setting: Setting, name: str) -> tuple[list[float], list[float]] | None:
    """Over the seeds, at steps that all of them logged."""
    every = [dict(zip(*run.curves[name])) for run in setting.runs if name in run.curves]
    if not every:
        return None
    steps = sorted(set(every[0]).intersection(*every))
    return steps, [sum(curve[step] for curve in every) / len(every) for step in steps]


def jobs(runs: Sequence[Run]) -> list[Table]:
    rows = []
    for run in runs:
        whole = float(sum(run.seconds.values())) or None
        rows.append([run.name, run.state, whole, run.alarm, run.error or ""])
    return [Table("runs", ["run", "state", "seconds", "alarm at step", "error"], rows, digits=0)]


def differing(sweep: Sweep) -> Table:
    """Keys in which settings differ, and nothing else."""
    names = keys(sweep)
    rows = [[str(s.told.get(name, "")) for name in names] for s in sweep.settings]
    return Table("config", names or ["setting"], rows if names else [["all alike"]])
