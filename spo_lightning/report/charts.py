"""A chart as plain data; what plotly draws of it in the page, and matplotlib as a still."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spo_lightning.report.evolution_figures import STYLE

# Okabe and Ito's colours, which colour-blind readers tell apart; dashes tell more lines apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#808080"  # what is compared with; readable on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")
STILL_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
MARKS = {"circle": "o", "circle-open": "o", "diamond": "D", "square": "s", "x": "x"}
SCALE = "Cividis"  # of heat maps: the same order to every eye
WRAPPED = 60  # letters of a text beside a point

# units of the axes, by the name of a number without its train/ or eval/
UNITS = {
    "logps": "log probability of an answer, nats",
    "nll": "nats per token",
    "rewards/accuracies": "share of pairs",
    "rewards": "beta x nats",
    "displacement/rate": "share of pairs below the reference",
    "displacement/chosen": "change of log pi(y_w), nats",
    "displacement/alarm": "1 where it sounds",
    "preference": "share of pairs",
    "exact_match": "share of prompts",
    "win_rate": "share of prompts, ties half",
    "entropy": "bits",
    "mass": "probability",
    "loss/lower": "nats per token",
    "loss": "loss",
    "grad_norm": "norm",
    "learning_rate": "per step",
    "time/tokens_per_second": "tokens per second",
    "num_tokens": "tokens",
    "epoch": "passes over the pairs",
    "solver/weight": "weight",
    "solver": "nats per token, or a share",
    "rouge": "F1",
}


def unit(name: str) -> str:
    """What a number is measured in, for its axis."""
    plain = name.removeprefix("train/").removeprefix("eval/")
    found = max((key for key in UNITS if plain.startswith(key)), key=len, default=None)
    return UNITS[found] if found else plain


@dataclass(frozen=True)
class Series:
    """Points or a line; ``texts`` stand beside points or show under the pointer."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    mode: str = "lines"  # lines, markers, lines+markers, markers+text
    colour: str | None = None
    dash: str = "solid"
    mark: str = "circle"
    texts: Sequence[str] = ()


@dataclass(frozen=True)
class Chart:
    """``upright``: x of vertical lines with their words, such as the step of an alarm."""

    key: str  # names the files and the place in the page
    title: str
    x: str
    y: str
    series: Sequence[Series] = ()
    upright: Mapping[float, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Heat:
    """A number over two settings; ``z`` by row, None where there is no run."""

    key: str
    title: str
    x: str
    y: str
    columns: Sequence[str]
    rows: Sequence[str]
    z: Sequence[Sequence[float | None]]


@dataclass(frozen=True)
class Histogram:
    """How often values fall where."""

    key: str
    title: str
    x: str
    values: Mapping[str, Sequence[float]]  # by label


Drawing = Chart | Heat | Histogram


def coloured(series: Sequence[Series]) -> list[Series]:
    """Series without a colour get one, and a dash where colours run out."""
    from dataclasses import replace

    found, number = [], 0
    for one in series:
        if one.colour is None:
            dash = DASHES[number // len(COLOURS) % len(DASHES)]
            one = replace(one, colour=COLOURS[number % len(COLOURS)], dash=dash)
            number += 1
        found.append(one)
    return found


def plotly(chart: Drawing) -> dict[str, Any]:
    """``data`` and ``layout`` of a plotly figure. Text is given as text, never as markup."""
    layout: dict[str, Any] = {
        "xaxis": {"title": {"text": plain(chart.x)}, "automargin": True},
        "yaxis": {"automargin": True},
    }
    if isinstance(chart, Heat):
        layout["xaxis"] |= {"type": "category"}
        layout["yaxis"] |= {"title": {"text": plain(chart.y)}, "type": "category"}
        shown = [["" if v is None else f"{v:.3f}" for v in row] for row in chart.z]
        across, up = ([plain(name) for name in names] for names in (chart.columns, chart.rows))
        heat = {"type": "heatmap", "x": across, "y": up, "z": chart.z}
        heat |= {
            "text": shown,
            "texttemplate": "%{text}",
            "colorscale": SCALE,
            "hoverongaps": False,
        }
        return {"data": [heat], "layout": layout}
    if isinstance(chart, Histogram):
        layout |= {"barmode": "overlay"}
        layout["yaxis"] |= {"title": {"text": "pairs"}}
        data = [
            {"type": "histogram", "x": values, "name": plain(label), "opacity": 0.6}
            | {"marker": {"color": COLOURS[n % len(COLOURS)]}, "nbinsx": 50}
            for n, (label, values) in enumerate(chart.values.items())
        ]
        return {"data": data, "layout": layout}
    layout["yaxis"] |= {"title": {"text": plain(chart.y)}}
    lines = [
        {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1}
        | {"line": {"color": COLOURS[1], "dash": "dot", "width": 1.5}}
        for at in chart.upright
    ]
    words = [
        {"x": at, "yref": "paper", "y": 1, "text": plain(text), "showarrow": False}
        | {"xanchor": "left", "yanchor": "top", "font": {"size": 11}}
        for at, text in chart.upright.items()
    ]
    return {
        "data": [_trace(one) for one in coloured(chart.series)],
        "layout": layout | {"shapes": lines, "annotations": words},
    }


def _trace(one: Series) -> dict[str, Any]:
    size = 12 if "open" in one.mark else 8  # a ring around a point
    found: dict[str, Any] = {
        "type": "scatter",
        "mode": one.mode,
        "name": plain(one.label),
        "x": one.x,
        "y": one.y,
        "line": {"color": one.colour, "dash": one.dash, "width": 1.8},
        "marker": {"color": one.colour, "symbol": one.mark, "size": size},
    }
    if one.texts:
        found |= {"text": [plain(text) for text in one.texts], "textposition": "top right"}
        found |= {"textfont": {"size": 10}, "hovertemplate": "%{text}<br>%{x:.4g}, %{y:.4g}"}
    return found


def plain(text: str) -> str:
    """Text of which plotly makes no markup."""
    cut = text if len(text) <= 4 * WRAPPED else text[: 4 * WRAPPED] + "..."
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def numbered(value: Any) -> Any:
    """The same with what JSON has no word for, nan and infinities, as null; floats rounded."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: numbered(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbered(one) for one in value]
    return value


def embedded(value: Any) -> str:
    """JSON that stands in a script element whatever texts it holds."""
    text = json.dumps(numbered(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def still(chart: Drawing, folder: Path) -> list[Path]:
    """The chart as SVG and PNG, named by its key."""
    import matplotlib
    from matplotlib.figure import Figure

    found = [folder / f"{chart.key}.svg", folder / f"{chart.key}.png"]
    with matplotlib.rc_context({**STYLE, "text.parse_math": False}):
        figure = Figure(figsize=(6.2, 4.2), layout="constrained")
        axis = figure.subplots()
        axis.set(title=chart.title, xlabel=chart.x)
        if isinstance(chart, Heat):
            _still_heat(chart, axis)
        elif isinstance(chart, Histogram):
            axis.set_ylabel("pairs")
            for n, (label, values) in enumerate(chart.values.items()):
                axis.hist(values, 50, alpha=0.6, label=label, color=COLOURS[n % len(COLOURS)])
        else:
            _still_lines(chart, axis)
        handles, labels = axis.get_legend_handles_labels()
        if 1 < len(labels) <= 24:
            figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=7)
        figure.savefig(found[0], metadata={"Date": None})
        figure.savefig(found[1], dpi=130)
    return found


def _still_heat(chart: Heat, axis: Any) -> None:
    values = [[math.nan if v is None else v for v in row] for row in chart.z]
    image = axis.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    axis.set(ylabel=chart.y)
    axis.set_xticks(range(len(chart.columns)), chart.columns)
    axis.set_yticks(range(len(chart.rows)), chart.rows)
    axis.figure.colorbar(image)
    middle = image.norm.vmin is not None and (image.norm.vmin + image.norm.vmax) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                ink = "black" if value > middle else "white"
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=8)


def _still_lines(chart: Chart, axis: Any) -> None:
    axis.set_ylabel(chart.y)
    for one in coloured(chart.series):
        line = STILL_DASHES[one.dash] if "lines" in one.mode else ""
        mark = MARKS[one.mark] if "markers" in one.mode else ""
        label = one.label[:WRAPPED]
        ring = {"mfc": "none", "markersize": 8} if "open" in one.mark else {"markersize": 5}
        axis.plot(one.x, one.y, line + mark, color=one.colour, label=label, **ring)
        if "text" in one.mode:
            for x, y, text in zip(one.x, one.y, one.texts):
                axis.annotate(text, (x, y), (3, 3), textcoords="offset points", fontsize=6)
    for at, text in chart.upright.items():
        axis.axvline(at, color=COLOURS[1], linestyle=":", linewidth=1)
        axis.text(at, 1, text, transform=axis.get_xaxis_transform(), va="top", fontsize=7)
