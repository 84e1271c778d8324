"""Settings of a sweep in, its charts out: maps over the grid, the front, curves, methods."""

from collections.abc import Sequence
from typing import Any

from spo_lightning.report import paper
from spo_lightning.report.charts import GREY, Chart, heat, labelled, lines, nth, series, unit
from spo_lightning.report.overoptimisation import path
from spo_lightning.report.settings import CAPABILITY, Setting, Sweep
from spo_lightning.report.style import COLOURS

CURVES = ("logps/chosen", "logps/rejected", "displacement/chosen", "rewards/margins", "loss")
MOST_LINES = 24  # settings in a chart of curves with a legend: more cannot be told apart
MOST_LABELLED = 60  # with a name at the end of each line; of still more, the best MOST_LINES


def points(part: paper.Part, number: int) -> list[Chart]:
    """Capability over preference, from bare to + SPO; none where jobs have not both numbers."""
    if not all(part.both(method) for method in (paper.INIT, *part.methods)):
        return []
    data = []
    for method, mark in ((paper.INIT, "diamond"), (paper.CHOSEN, "square"), (paper.SFT_SET, "x")):
        if method == paper.INIT or method in part.methods:
            x, y = part.point(method)
            data.append(series(method, [x], [y], "markers", GREY, mark=mark, texts=[method]))
    for n, base in enumerate(part.bases):
        ends = [base, base + paper.SPO]
        x, y = zip(*map(part.point, ends))
        data.append(series(base, x, y, "lines+markers", texts=ends, **nth(n)))
    x, y = zip(*map(part.point, part.bases))
    data.append(series("bare", x, y, "markers", GREY, mark="circle-open", texts=part.bases))
    names = (paper.HEADINGS[part.preference], "exact match")
    return [lines(f"methods_{number}", f"Bare to + SPO {part.name}", *names, data)]


def heats(sweep: Sweep) -> list[Chart]:
    """A map per number over the two keys that take most values; its title says over what else,
    and how many runs, a field is a mean."""
    levels = {name: values_of(sweep, name) for name in keys(sweep)}
    axes = sorted((n for n in levels if len(levels[n]) > 1), key=lambda n: -len(levels[n]))[:2]
    if len(axes) < 2:
        return []
    x, y = sorted(axes, key=lambda name: (name.startswith("solver"), name))
    columns, rows = levels[x], levels[y]
    found = []
    for number in sweep.names:
        z: list[list[float | None]] = [[None] * len(columns) for _ in rows]
        fields = []  # the settings of each
        for up, b in enumerate(rows):
            for across, a in enumerate(columns):
                here = [s for s in sweep.settings if (s.told.get(x), s.told.get(y)) == (a, b)]
                values = [value for s in here for value in s.values(number).values()]
                if values:
                    z[up][across] = sum(values) / len(values)
                    fields.append(here)
        if len(fields) > max(len(columns), len(rows)):  # a line of fields is no map
            title = f"{number} ({unit(number)}){averaged(fields, number)}"
            key = f"heat_{number.replace('/', '_')}"
            found.append(heat(key, title, x, y, [*map(str, columns)], [*map(str, rows)], z))
    return found


def averaged(fields: Sequence[Sequence[Setting]], number: str) -> str:
    """Of how many runs a field is the mean, and what differs between them."""
    counts = sorted(sum(len(s.values(number)) for s in field) for field in fields)
    names = dict.fromkeys(name for field in fields for s in field for name in s.told)
    over = [
        name
        for name in names
        if any(len({repr(s.told.get(name)) for s in field}) > 1 for field in fields)
    ]
    if any(len(s.values(number)) > 1 for field in fields for s in field):
        over.append("seed")
    runs = str(counts[0]) if counts[0] == counts[-1] else f"{counts[0]} to {counts[-1]}"
    return f": a field is the mean of {runs} runs, over {' and '.join(over)}" if over else ""


def keys(sweep: Sweep) -> list[str]:
    return list(dict.fromkeys(name for setting in sweep.settings for name in setting.told))


def values_of(sweep: Sweep, name: str) -> list[Any]:
    """The values that a key takes, numbers in their order."""
    every = [setting.told.get(name) for setting in sweep.settings]
    found = {value for value in every if isinstance(value, str | int | float)}
    return sorted(found, key=str if any(isinstance(value, str) for value in found) else None)


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
        looks = (("beaten", rest, "markers", GREY), ("front", best, "lines+markers", COLOURS[0]))
        data = []
        for label, some, mode, colour in looks:
            if some:
                x, y, names = zip(*some)
                data.append(series(label, x, y, mode, colour, texts=names))
        title, key = f"{number} against displacement", f"front_{number.replace('/', '_')}"
        found.append(lines(key, title, unit(moved), f"{number}, {unit(number)}", data))
    return found


def beats(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    no_worse = one[0] >= other[0] and one[1] >= other[1]
    return no_worse and (one[0] > other[0] or one[1] > other[1])


def shown(sweep: Sweep) -> list[Setting]:
    """The settings that a chart of lines has room for."""
    chosen = sweep.ranked or sweep.settings
    return chosen[:MOST_LINES] if len(chosen) > MOST_LABELLED else chosen


def margins(sweep: Sweep) -> list[Chart]:
    """What the chosen answers pay for the margin, held out: a line per setting along its run, a
    mark per look. At the same place across, margins are equal, whatever the loss and its beta."""
    data = []
    for n, setting in enumerate(shown(sweep)):
        chosen, rejected = (path(setting, f"logps/{side}") for side in ("chosen", "rejected"))
        if chosen is not None and rejected is not None:
            up, down = chosen - chosen.iloc[0], rejected - rejected.iloc[0]
            texts = [f"{setting.name}, step {step:g}" for step in up.index]
            x, y = (up - down).tolist(), up.tolist()
            data.append(series(setting.name, x, y, "lines+markers", texts=texts, **nth(n)))
    names = ("change of log pi(y_w) - log pi(y_l), nats", "change of log pi(y_w), nats")
    return [lines("margins", "Chosen answers over the margin", *names, data)] if data else []


def curves(sweep: Sweep) -> list[Chart]:
    """Small multiples: a chart per number, a line per setting."""
    chosen = shown(sweep)
    draw = lines if len(chosen) <= MOST_LINES else labelled
    found = []
    for name in CURVES:
        means = [(setting.name, setting.curve(f"train/{name}")) for setting in chosen]
        data = [
            series(label, mean.index.tolist(), mean.tolist(), **nth(n))
            for n, (label, mean) in enumerate(means)
            if mean is not None and len(mean)
        ]
        if data:
            key = f"curves_{name.replace('/', '_')}"
            found.append(draw(key, f"train/{name}", "outer step", unit(name), data))
    return found
