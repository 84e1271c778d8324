"""The tables of a run on a mixture in; pairs, displacement and densities (svg, png) out."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spo_lightning.report.reading import rows_of
from spo_lightning.report.style import COLOURS, GREW, INK, OTHER, STYLE, saved

WIDE = 4  # panels in a row
SHARES = (0.01, 0.03, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0)  # of the highest density: filled levels
BEST = {"best": "best: p_ref exp(r / beta)"}  # what a column is called in a title


def drawn(directory: Path, room: Path, final: Mapping[str, float]) -> list[Path]:
    import matplotlib

    with matplotlib.rc_context(STYLE):
        pairs, density = (rows_of(directory / f"{name}.csv") for name in ("pairs", "density"))
        figures = {
            "pairs": scattered(pairs, final),
            "displacement": displaced(rows_of(directory / "moments.csv")),
            "densities": planes(density, final),
        }
        return [file for name, it in figures.items() for file in saved(it, room / name, dpi=130)]


def panels(count: int, size: float, **how: Any) -> tuple[Any, list[Any]]:
    """A figure with so many square panels; what is left over is blank."""
    from matplotlib.figure import Figure

    down = -(-count // WIDE)
    across = -(-count // down)
    figure = Figure(figsize=(size * across, (size + 0.35) * down), layout="constrained")
    axes = list(figure.subplots(down, across, squeeze=False, **how).flat)
    for axis in axes[count:]:
        axis.set_visible(False)
    return figure, axes[:count]


def scattered(pairs: Any, final: Mapping[str, float]) -> Any:
    """A panel per method: each held-out pair's surrogate margin over its true log-ratio."""
    methods = list(pairs["method"].unique())
    figure, axes = panels(len(methods), 2.9)
    for axis, method in zip(axes, methods):
        some = pairs[pairs["method"] == method]
        x, y = (some[f"{it}_chosen"] - some[f"{it}_rejected"] for it in ("truth", "surrogate"))
        ends = [min(x.min(), y.min()), max(x.max(), y.max())]
        axis.plot(ends, ends, color=OTHER, linestyle=":", linewidth=1, label="equal")
        axis.axhline(0, color=INK, linewidth=0.5)
        axis.axvline(0, color=INK, linewidth=0.5)
        axis.scatter(x, y, s=7, lw=0, alpha=0.5, color=GREW)
        told = [f"{final[f'{name}/surrogate/{method}']:.2f}" for name in ("pearson", "spearman")]
        axis.set(title=f"{method}\nPearson {told[0]}, Spearman {told[1]}")
    figure.supxlabel("true log-ratio of the pair (nats)", fontsize=9)
    figure.supylabel("surrogate margin", fontsize=9)
    figure.suptitle("Held-out pairs at the end of training; dotted: surrogate = truth")
    return figure


def displaced(moments: Any) -> Any:
    """A panel per method: the mean change of chosen points over training, true and surrogate."""
    methods = list(moments["method"].unique())
    figure, axes = panels(len(methods), 2.7)
    for axis, method in zip(axes, methods):
        some = moments[moments["method"] == method]
        for kind, colour, look in (("truth", INK, "o-"), ("surrogate", GREW, "s--")):
            told = {"truth": "log p, nats", "surrogate": "surrogate"}[kind]
            axis.plot(
                some["step"], some[f"displacement/{kind}"], look, color=colour, ms=4, label=told
            )
        axis.axhline(0, color=OTHER, linewidth=0.8)
        axis.set(title=method, xscale="log")
    axes[0].legend(fontsize=8)
    figure.supxlabel("step", fontsize=9)
    figure.supylabel("change against the reference", fontsize=9)
    figure.suptitle("Chosen points of held-out pairs, the mean")
    return figure


def planes(density: Any, final: Mapping[str, float]) -> Any:
    """A panel per density, in levels of the best policy's, whose outline is over all."""
    import numpy as np

    names = [name for name in density.columns if name not in ("x", "y")]
    line = np.unique(density["x"])
    fields = {n: np.exp(density[n].to_numpy()).reshape(len(line), -1).T for n in names}
    top = fields["best"].max()
    levels = [share * top for share in SHARES]
    figure, axes = panels(len(names), 2.6, sharex=True, sharey=True)
    for axis, name in zip(axes, names):
        axis.contourf(line, line, fields[name], levels, cmap="cividis_r", extend="max")
        outline = {"colors": COLOURS[1], "linewidths": 0.8}
        if name != "best":
            axis.contour(line, line, fields["best"], [0.03 * top], **outline)
        told = BEST.get(name, name)
        if f"kl_from_best/{name}" in final:
            values = (final[f"{kl}/{name}"] for kl in ("kl_from_best", "kl_to_best"))
            told += "\nKL(best, p) {:.2f}, KL(p, best) {:.2f}".format(*values)
        axis.set_aspect("equal")
        axis.tick_params(labelbottom=True)  # below some of the upper row nothing stands
        axis.set_title(told, fontsize=8.5)
    figure.suptitle(
        "Densities over the plane; orange: where the best policy has 3% of its peak or more"
    )
    return figure
