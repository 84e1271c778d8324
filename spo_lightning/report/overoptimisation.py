"""Runs that were followed in, over-optimisation out: where quality turns, and what warned of it.

Shi et al. 2410.11677: quality rises with the likelihood of the chosen answers and then falls; the
turn of the top-10 entropy, or the fall of their mass, is to tell where to stop.
"""

from collections.abc import Sequence
from typing import Any

from spo_lightning.report.charts import GREY, Chart, lines, nth, series, unit
from spo_lightning.report.page import Note, Table
from spo_lightning.report.reading import Run
from spo_lightning.report.settings import QUALITY, Setting, Sweep, cell

LIKELY, ALARM = "logps/chosen", "overoptimisation/alarm"
SIGNS = ("entropy/top10", "mass/top10")
HEAD = (
    *("setting", "best", "at step", "alarm at step", "quality there", "at the end"),
    *("there less the end", "stopping was"),
)
ABOUT = (
    "Quality of held-out answers at every look (diagnostics.quality), from before training on. A "
    "ring marks the alarm of diagnostics.overoptimisation: top-10 entropy has turned down, or "
    "top-10 mass falls while it rises. Means over seeds; an alarm at its first seed."
)


def blocks(sweep: Sweep) -> list[Any]:
    """Charts and the table, where quality was followed over steps."""
    name = next((n for n in QUALITY if any(path(s, n) is not None for s in sweep.settings)), None)
    followed = [s for s in sweep.settings if name is not None and path(s, name) is not None]
    if name is None or not followed:
        return []
    found: list[Any] = [over_likelihood(followed, name), *fits(followed, name)]
    found += [over_steps(followed, number) for number in (name, *SIGNS)]
    return [*found, Table("stopping", HEAD, [stopping(s, name) for s in followed], digits=3)]


def path(setting: Setting, name: str) -> Any:
    """A number over steps from 0 on, its mean over seeds; None where it was not followed."""
    import pandas as pd

    some = [curve for run in setting.runs if (curve := followed(run, name)) is not None]
    return pd.concat(some, axis=1, join="inner").mean(axis=1) if some else None


def followed(run: Run, name: str) -> Any:
    """A held-out number of one run over steps, from before training on."""
    import pandas as pd

    curve = run.curves.get(f"eval/{name}")
    if curve is None or len(curve) < 2 or name not in run.init:
        return None
    return pd.concat([pd.Series({0: run.init[name]}), curve])


def alarm(run: Run) -> int | None:
    curve = run.curves.get(f"eval/{ALARM}")
    loud = () if curve is None else curve.index[curve > 0]
    return next(map(int, loud), None)


def first_alarm(setting: Setting) -> int | None:
    return min((step for run in setting.runs if (step := alarm(run)) is not None), default=None)


def over_likelihood(settings: Sequence[Setting], name: str) -> Chart:
    data = []
    for n, setting in enumerate(settings):
        both = together(setting, name)
        texts = [f"{setting.name}, step {step:.0f}" for step in both.index]
        data.append(
            series(setting.name, [*both[0]], [*both[1]], "lines+markers", texts=texts, **nth(n))
        )
        stop = first_alarm(setting)
        if stop is not None and stop in both.index:
            x, y = ([float(both[side][stop])] for side in (0, 1))
            said = [f"{setting.name}, alarm at step {stop}"]
            ring = series("", x, y, "markers", GREY, mark="circle-open", texts=said)
            data.append(ring | {"showlegend": False})
    title, axis = f"{name} over the likelihood of the chosen answers", f"{name}, {unit(name)}"
    return lines("overoptimisation_likelihood", title, unit(LIKELY), axis, data)


def together(setting: Setting, name: str) -> Any:
    """Likelihood (0) and quality (1) at the steps that have both."""
    import pandas as pd

    return pd.concat([path(setting, LIKELY), path(setting, name)], axis=1, join="inner")


def fits(settings: Sequence[Setting], name: str) -> list[Note]:
    """Whether quality has a peak in between: a parabola against a line through all points."""
    import numpy as np
    import pandas as pd

    both = pd.concat([together(setting, name) for setting in settings])
    if len(set(both[0])) < 4:
        return []
    left = []
    for degree in (1, 2):
        curve = np.polynomial.Polynomial.fit(both[0], both[1], degree)
        left.append(float(np.sqrt(np.mean((curve(both[0]) - both[1]) ** 2))))
    less = f"{1 - left[1] / left[0]:.0%} less" if left[0] else "the same"
    return [
        Note(
            f"A line through the {len(both)} points misses {name} by {left[0]:.3f} (root mean "
            f"square), a parabola by {left[1]:.3f}, {less}."
        )
    ]


def over_steps(settings: Sequence[Setting], name: str) -> Chart:
    data = []
    for n, setting in enumerate(settings):
        curve = path(setting, name)
        if curve is None:
            continue
        data.append(
            series(setting.name, [*curve.index], [*curve], "lines+markers", **nth(n)),
        )
        stop = first_alarm(setting)
        if stop is not None and stop in curve.index:
            ring = {"mark": "circle-open", "texts": [f"{setting.name}, alarm"]}
            at = series("", [stop], [float(curve[stop])], "markers", GREY, **ring)
            data.append(at | {"showlegend": False})
    key = f"overoptimisation_{name.replace('/', '_')}"
    return lines(key, f"{name} as training goes on", "outer step", unit(name), data)


def stopping(setting: Setting, name: str) -> list[Any]:
    """A row of the table: whether the alarm's step was better than the last one."""
    mean = path(setting, name)
    row: list[Any] = [setting.name, float(mean.max()), int(mean.idxmax())]
    curves = [(alarm(run), followed(run, name)) for run in setting.runs]
    rung = [(step, curve) for step, curve in curves if curve is not None and step in curve.index]
    end = cell(float(curve.iloc[-1]) for _, curve in curves if curve is not None)
    if not rung:
        return [*row, "none", "", end, "", ""]
    there = [float(curve[step]) for step, curve in rung]
    gained = [at - float(curve.iloc[-1]) for at, (_, curve) in zip(there, rung)]
    word = "right" if sum(gained) > 0 else "too early" if sum(gained) < 0 else "the same"
    steps = ", ".join(str(step) for step, _ in rung)
    return [*row, steps, cell(there), end, cell(gained, "+.3f"), word]
