"""A chart is a plotly figure as data: the page shows it as it is, matplotlib draws its still.

Text enters through ``plain``, so that plotly makes no markup of it.
"""

import html
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.report.style import COLOURS, STYLE, saved

GREY = "#808080"  # what is compared with; readable on white and on black
DASHES = ("solid", "dash", "dot", "dashdot")  # tell more lines apart than there are colours
MOST_LABELS = 24  # in a legend; page.js has the same number
# letters of a name in a still's legend that leave room for another beside it, and that it has
BESIDE, ALONE = 42, 85
LABEL, LETTERS = 14, 40  # of a name at the end of a line: px high, letters at most
WRAPPED = 60  # letters of a text beside a point
# matplotlib's words for plotly's
STILL_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
STILL_MARKS = {"circle": "o", "circle-open": "o", "diamond": "D", "square": "s", "x": "x"}

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
    "judge": "share of prompts",
    "images/frechet_distance": "squared units of the features",
    "tokens": "tokens, mean",
    "tasks": "the task's own",
    **{of: "share of prompts" for of in ("answers", "prompts")},
    **{f"{of}/tokens": "tokens an answer" for of in ("answers", "prompts")},
    **{f"{of}/distinct": "share of n-grams" for of in ("answers", "prompts")},
    "entropy": "bits",
    "mass": "probability",
    "loss/lower": "nats per token",
    "loss": "loss",
    "grad_norm": "norm",
    "learning_rate": "per step",
    "time/tokens_per_second": "tokens per second",
    "num_tokens": "tokens",
    "epoch": "passes over the pairs",
    "denoiser/loss": "mean squared error of the noise",
    "classifier/loss": "nats per pair",
    "classifier/accuracy": "share of pairs",
    "surrogate/loss": "mean squared error",
    "pearson": "correlation",
    "hypervolume": "volume",
    "diversity": "mean distance of two designs",
    "spread": "unevenness of gaps",
    "solver/weight": "weight",
    "solver": "nats per token, or a share",
    "rouge": "F1",
}


def unit(name: str) -> str:
    """What a number is measured in, for its axis."""
    plain_name = name.removeprefix("train/").removeprefix("eval/")
    found = max((key for key in UNITS if plain_name.startswith(key)), key=len, default=None)
    return UNITS[found] if found else plain_name


@dataclass(frozen=True)
class Chart:
    """``data`` and ``layout`` are plotly's."""

    key: str  # names the files and the place in the page
    title: str
    data: Sequence[Mapping[str, Any]]
    layout: Mapping[str, Any]
    high: int = 340  # px in the page


def plain(text: str) -> str:
    """Text of which plotly makes no markup."""
    cut = text if len(text) <= 4 * WRAPPED else text[: 4 * WRAPPED] + "..."
    return html.escape(cut, quote=False)


def axes(x: str, y: str, **more: Any) -> dict[str, Any]:
    across, up = ({"title": {"text": plain(text)}, "automargin": True} for text in (x, y))
    return {"xaxis": across | more, "yaxis": up | more}


def series(
    label: str,
    x: Sequence[float],
    y: Sequence[float],
    mode: str = "lines",
    colour: str = COLOURS[0],
    *,
    dash: str = "solid",
    mark: str = "circle",
    texts: Sequence[str] = (),
) -> dict[str, Any]:
    """Points or a line; ``texts`` show under the pointer."""
    size = 12 if "open" in mark else 8  # a ring around a point
    found = {"type": "scatter", "mode": mode, "name": plain(label), "x": x, "y": y}
    found |= {"line": {"color": colour, "dash": dash, "width": 1.8}}
    found |= {"marker": {"color": colour, "symbol": mark, "size": size}}
    if texts:
        found["text"] = [plain(text) for text in texts]
        found["hovertemplate"] = "%{text}<br>%{x:.4g}, %{y:.4g}"
    return found


def nth(number: int) -> dict[str, str]:
    """Colour and dash of one of many series."""
    dash = DASHES[number // len(COLOURS) % len(DASHES)]
    return {"colour": COLOURS[number % len(COLOURS)], "dash": dash}


def lines(
    key: str,
    title: str,
    x: str,
    y: str,
    data: Sequence[Mapping[str, Any]],
    alarm: int | None = None,
) -> Chart:
    """Series over the same axes; an upright line at the step of the ``alarm``."""
    layout = axes(x, y)
    if alarm is not None:
        layout |= upright(alarm, "alarm")
    return Chart(key, title, data, layout)


def labelled(key: str, title: str, x: str, y: str, data: Sequence[Mapping[str, Any]]) -> Chart:
    """Series with their names at their ends, for more of them than a legend tells apart."""
    ends = sorted(data, key=lambda one: one["y"][-1])
    low, top = (pick(v for one in data for v in one["y"]) for pick in (min, max))
    first, last = (pick(v for one in data for v in one["x"]) for pick in (min, max))
    gap, beside = (top - low) / len(data), (last - first) / 20
    names = [one["name"][:LETTERS] for one in ends]
    layout: dict[str, Any] = axes(x, y) | {"margin": {"r": 15 + 6 * max(map(len, names))}}
    layout["xaxis"]["range"] = [first, last + beside]
    layout["yaxis"]["range"] = [low - gap, top + gap]
    layout["annotations"] = [
        {"text": name, "x": one["x"][-1], "y": one["y"][-1]}
        | {"axref": "x", "ayref": "y", "ax": last + beside, "ay": place, "xanchor": "left"}
        | {"arrowhead": 0, "arrowwidth": 0.5, "arrowcolor": one["line"]["color"]}
        | {"font": {"size": 10, "color": one["line"]["color"]}}
        for name, one, place in zip(names, ends, spread([one["y"][-1] for one in ends], gap, top))
    ]
    return Chart(key, title, data, layout, 100 + LABEL * len(data))


def spread(rising: Sequence[float], gap: float, top: float) -> list[float]:
    """The values, moved so that neighbours are ``gap`` apart and none is above ``top``."""
    found: list[float] = []
    for value in rising:
        found.append(max(value, found[-1] + gap) if found else value)
    return [min(v, top - gap * left) for v, left in zip(found, reversed(range(len(found))))]


def heat(
    key: str, title: str, x: str, y: str, columns: Sequence[str], rows: Sequence[str], z: Any
) -> Chart:
    """A number over two settings; ``z`` by row, None where there is no run."""
    data: dict[str, Any] = {"type": "heatmap", "z": z, "hoverongaps": False}
    data |= {"x": [plain(name) for name in columns], "y": [plain(name) for name in rows]}
    data |= {"text": [["" if v is None else f"{v:.3f}" for v in row] for row in z]}
    # Cividis has the same order to every eye
    data |= {"texttemplate": "%{text}", "colorscale": "Cividis", "colorbar": {"thickness": 12}}
    return Chart(key, title, [data], axes(x, y, type="category"), 120 + 30 * len(rows))


def histogram(key: str, title: str, x: str, values: Mapping[str, Sequence[float]]) -> Chart:
    """How often the values of each label fall where."""
    data = [
        {"type": "histogram", "x": some, "name": plain(label), "nbinsx": 50, "opacity": 0.6}
        | {"marker": {"color": colour}}
        for (label, some), colour in zip(values.items(), COLOURS)
    ]
    return Chart(key, title, data, axes(x, "rows") | {"barmode": "overlay"})


def bars(
    key: str,
    title: str,
    x: str,
    counted: Mapping[str, Mapping[str, Any]],
    limit: float | None = None,
    word: str = "",
) -> Chart:
    """The same of counts that were made elsewhere, in bars of one width from a start on; an
    upright line at the ``limit``."""
    data = []
    for (label, one), colour in zip(counted.items(), COLOURS):
        at = [one["start"] + (n + 0.5) * one["width"] for n in range(len(one["bars"]))]
        drawn = {"type": "bar", "x": at, "y": one["bars"], "width": one["width"], "opacity": 0.6}
        data.append(drawn | {"name": plain(label), "marker": {"color": colour}})
    layout = axes(f"{x}; the last bar holds all above", "rows") | {"barmode": "overlay"}
    if limit is not None:
        layout |= upright(limit, word)
    return Chart(key, title, data, layout)


def upright(at: float, word: str) -> dict[str, Any]:
    """A line across all values, and its word."""
    look = {"color": COLOURS[1], "dash": "dot", "width": 1.5}
    line = {"type": "line", "x0": at, "x1": at, "yref": "paper", "y0": 0, "y1": 1, "line": look}
    said = {"x": at, "yref": "paper", "y": 1, "text": word, "showarrow": False}
    said |= {"xanchor": "left", "yanchor": "top", "font": {"size": 11}}
    return {"shapes": [line], "annotations": [said]}


def still(chart: Chart, folder: Path) -> list[Path]:
    """The chart as SVG and PNG, named by its key."""
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context({**STYLE, "text.parse_math": False}):
        # a chart of many rows or names is as high as on the page
        figure = Figure(figsize=(6.2, max(4.2, chart.high / 80)), layout="constrained")
        scene = chart.layout.get("scene")
        axis = figure.subplots(subplot_kw={} if scene is None else {"projection": "3d"})
        sides = chart.layout if scene is None else scene
        told = {f"{side}label": sides.get(f"{side}axis") for side in "xyz"}
        told = {key: html.unescape(it["title"]["text"]) for key, it in told.items() if it}
        axis.set(title="\n".join(textwrap.wrap(chart.title, 80)), **told)
        for one in chart.data:
            if one.get("visible") != "legendonly":
                STILLS[one["type"]](axis, one)
        for label in (it for it in chart.layout.get("annotations", ()) if "ax" in it):
            _still_label(axis, label)
        for upright, word in zip(*(chart.layout.get(n, ()) for n in ("shapes", "annotations"))):
            axis.axvline(upright["x0"], color=upright["line"]["color"], linestyle=":", linewidth=1)
            at = axis.get_xaxis_transform()
            axis.text(word["x"], 1, word["text"], transform=at, va="top", fontsize=7)
        handles, labels = axis.get_legend_handles_labels()
        if 1 < len(labels) <= MOST_LABELS:
            columns = 2 if max(map(len, labels)) <= BESIDE else 1
            figure.set_figheight(figure.get_figheight() + 0.15 * max(0, len(labels) / columns - 4))
            how = {"loc": "outside lower center", "ncols": columns, "fontsize": 7}
            figure.legend(handles, labels, **how)
        return saved(figure, folder / chart.key, dpi=130)


def _still_series(axis: Any, one: Mapping[str, Any]) -> None:
    mark = one["marker"]["symbol"]
    drawn = STILL_DASHES[one["line"]["dash"]] if "lines" in one["mode"] else ""
    drawn += STILL_MARKS[mark] if "markers" in one["mode"] else ""
    ring = {"mfc": "none", "markersize": 8} if "open" in mark else {"markersize": 5}
    label = html.unescape(one["name"])[:ALONE]
    axis.plot(one["x"], one["y"], drawn, color=one["marker"]["color"], label=label, **ring)


def _still_space(axis: Any, one: Mapping[str, Any]) -> None:
    label = html.unescape(one["name"])[:ALONE]
    axis.scatter(one["x"], one["y"], one["z"], s=6, color=one["marker"]["color"], label=label)


def _still_label(axis: Any, one: Mapping[str, Any]) -> None:
    colour = one["font"]["color"]
    how = {"va": "center", "fontsize": 6, "color": colour, "annotation_clip": False}
    how["arrowprops"] = {"arrowstyle": "-", "relpos": (0, 0.5), "linewidth": 0.4, "color": colour}
    text = html.unescape(one["text"])
    axis.annotate(text, (one["x"], one["y"]), (one["ax"], one["ay"]), **how)


def _still_histogram(axis: Any, one: Mapping[str, Any]) -> None:
    label, colour = html.unescape(one["name"]), one["marker"]["color"]
    axis.hist(one["x"], one["nbinsx"], alpha=one["opacity"], label=label, color=colour)


def _still_heat(axis: Any, one: Mapping[str, Any]) -> None:
    values = [[math.nan if v is None else v for v in row] for row in one["z"]]
    image = axis.imshow(values, cmap="cividis", aspect="auto", origin="lower")
    for ticks, names in ((axis.set_xticks, one["x"]), (axis.set_yticks, one["y"])):
        ticks(range(len(names)), [html.unescape(name) for name in names])
    axis.figure.colorbar(image)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                ink = "black" if value > sum(image.get_clim()) / 2 else "white"
                axis.text(x, y, f"{value:.3f}", ha="center", va="center", color=ink, fontsize=8)


STILLS = {
    "scatter": _still_series,
    "scatter3d": _still_space,
    "histogram": _still_histogram,
    "heatmap": _still_heat,
}
