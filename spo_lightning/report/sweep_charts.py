"""Settings of a sweep in, its charts out: maps over the grid, the front, curves, methods."""

from collections.abc import Mapping
from typing import Any

from spo_lightning.report import paper
from spo_lightning.report.charts import COLOURS, DASHES, GREY, Chart, Heat, Series, unit
from spo_lightning.report.settings import CAPABILITY, Setting, Sweep

CURVES = ("logps/chosen", "logps/rejected", "displacement/chosen", "rewards/margins", "loss")
MOST_LINES = 24  # settings in a chart of curves: more cannot be told apart


def points(part: paper.Part, number: int) -> list[Chart]:
    """Capability over preference, from bare to + SPO; none where jobs have not both numbers."""
    if not all(paper.both(part, method) for method in (paper.INIT, *part.methods)):
        return []
    series = []
    for method, mark in ((paper.INIT, "diamond"), (paper.CHOSEN, "square"), (paper.SFT_SET, "x")):
        if method == paper.INIT or method in part.methods:
            x, y = paper.point(part, method)
            series.append(Series(method, [x], [y], "markers", GREY, mark=mark, texts=[method]))
    for base in part.bases:
        ends = [paper.point(part, base), paper.point(part, base + paper.SPO)]
        x, y = ([end[n] for end in ends] for n in (0, 1))
        series.append(Series(base, x, y, "lines+markers", texts=[base, base + paper.SPO]))
    x, y = zip(*(paper.point(part, base) for base in part.bases))
    series.append(Series("bare", x, y, "markers", GREY, mark="circle-open", texts=part.bases))
    names = (paper.HEADINGS[part.preference], "exact match")
    return [Chart(f"methods_{number}", f"Bare to + SPO {part.name}", *names, series)]


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
        best = sorted(p for p in known if not any(beats(q, p) for q in known))
        rest = [p for p in known if p not in best]
        series = []
        for name, some, mode, colour in (
            ("beaten", rest, "markers", GREY),
            ("front", best, "lines+markers", COLOURS[0]),
        ):
            x, y = [p[0] for p in some], [p[1] for p in some]
            if some:
                series.append(Series(name, x, y, mode, colour, texts=[p[2] for p in some]))
        title = f"{number} against displacement"
        key = f"front_{number.replace('/', '_')}"
        found.append(Chart(key, title, unit(moved), f"{number}, {unit(number)}", series))
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
