"""numbers.json and the csv files of a probability evolution in, matplotlib figures out."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.report.reading import rows_of
from spo_lightning.report.style import FELL, GREW, INK, OTHER, STYLE, saved

W, L, OTHERS = r"$\pi(y_w)$", r"$\pi(y_l)$", r"$\pi$(others)"
PARTS = {"chosen": "preferred answer", "rejected": "rejected answer", "others": "all others"}
COLOURS = {"chosen": GREW, "rejected": "#E69F00", "others": "#BBBBBB"}
POINTS = {"chosen": (GREW, "o"), "rejected": ("#E69F00", "s"), "others": (OTHER, "D")}
POLICIES = {
    "tabular": "tabular policy:\nanswers share nothing",
    "similar": "log-linear policy:\n$y_w$ and $y_l$ are similar",
}
MICRO = 1e6  # short steps are shown in millionths


def drawn(numbers: Mapping[str, Any], directory: Path) -> list[Path]:
    """evolution, trajectories and theory in the directory of their numbers."""
    import matplotlib

    written = []
    for draw in (evolution, trajectories, theory):
        with matplotlib.rc_context(STYLE):
            figure = draw(numbers, directory)
            figure.draw_without_rendering()
            figure.set_layout_engine("none")  # laid out; once is enough
            written += saved(figure, directory / draw.__name__, dpi=160)
    return written


def _trained(numbers: Mapping[str, Any]) -> tuple[Any, list[str], list[str]]:
    """What training came to, by policy and method; both in their order."""
    import pandas as pd

    rows = pd.DataFrame(numbers["trained"])
    names = rows["policy"].unique().tolist(), rows["method"].unique().tolist()
    return rows.set_index(["policy", "method"]), *names


def _grid(rows: int, columns: int, high: float, **more: Any) -> Any:
    """A figure of panels ``high`` inches high, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.45 * columns + 0.8, high * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _mark(text: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=text, **look)


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _by_fate(axis: Any, x: Any, y: Any, fell: Any) -> None:
    """Blue discs where y_w grew, red triangles where it fell."""
    for some, colour, marker in ((~fell, GREW, "o"), (fell, FELL, "v")):
        axis.scatter(x[some], y[some], s=9, c=colour, marker=marker, lw=0, alpha=0.7)


# -- evolution: from every start to its end


def evolution(numbers: Mapping[str, Any], directory: Path) -> Any:
    """pi(y_w) after against before, per start, and where the mass is on average."""
    from matplotlib.patches import Patch

    starts = rows_of(directory / "starts.csv")
    trained, policies, methods = _trained(numbers)
    figure, axes = _grid(len(policies), len(methods) + 1, 2.5)
    low = max(1e-8, starts[["chosen_before", "chosen_after"]].min(axis=None))
    for line, policy in zip(axes, policies):
        for axis, method in zip(line, methods):
            some = starts[(starts["policy"] == policy) & (starts["method"] == method)]
            before, after = some["chosen_before"], some["chosen_after"]
            _by_fate(axis, before, after, before > after)
            axis.plot([low, 1], [low, 1], color=INK, linestyle="--", linewidth=1)
            limits = {"ylim": (low / 2, 1.6), "xlim": (before.min() / 1.5, 1.3)}
            axis.set(xscale="log", yscale="log", **limits)
            axis.minorticks_off()
            axis.set_title(f"{method}: {W} fell in {trained.at[(policy, method), 'fell']:.0%}")
            axis.set_xlabel(f"{W} before training" if policy == policies[-1] else "")
            axis.tick_params(labelleft=method == methods[0])
        line[0].set_ylabel(f"{POLICIES.get(policy, policy)}\n\n{W} after training")
        _bars(line[-1], trained.loc[policy])
    axes[-1, -1].set_xlabel("probability, mean over starts")
    figure.suptitle(
        "What preference training does to the probability of the preferred answer $y_w$. Each "
        f"mark is one of {numbers['starts']} initial policies;\nbelow the dashed line, {W} fell. "
        "A title gives the share that fell, the bars where the probability went."
    )
    grew = _mark(f"{W} grew", color=GREW, marker="o", linestyle="", markersize=5)
    fell = _mark(f"{W} fell", color=FELL, marker="v", linestyle="", markersize=5)
    patches = [Patch(color=COLOURS[part], label=text) for part, text in PARTS.items()]
    _legend(figure, [grew, fell, *patches])
    return figure


def _bars(axis: Any, methods: Any) -> None:
    """Stacked mean masses: the start, then every method."""
    labels = ["start", *methods.index]
    left = [0.0] * len(labels)
    for part in PARTS:
        widths = [methods[f"{part}_before"].iloc[0], *methods[f"{part}_after"]]
        axis.barh(labels, widths, left=left, color=COLOURS[part], height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), title="Where the probability went")
    axis.tick_params(axis="y", length=0)


# -- trajectories: along training


def trajectories(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Mean masses along training; y_w's from rare and from likely starts."""
    rows = rows_of(directory / "evolution.csv")
    trained, policies, methods = _trained(numbers)
    figure, axes = _grid(len(policies), len(methods), 2.5, sharex=True, sharey=True)
    lines = {  # text -> group, part and look
        "all others": ("all", "others", {"color": COLOURS["others"], "lw": 2.5}),
        "rejected answer": ("all", "rejected", {"color": COLOURS["rejected"], "lw": 2, "ls": ":"}),
        "preferred, likely starts": ("likely", "chosen", {"color": GREW, "lw": 2.5}),
        "preferred, rare starts": ("rare", "chosen", {"color": GREW, "lw": 2, "ls": "--"}),
    }
    curves = rows.set_index(["policy", "method", "group"]).sort_index(kind="stable")
    low = min(rows[rows["group"] == group][part].min() for group, part, _ in lines.values())
    for line, policy in zip(axes, policies):
        for axis, method in zip(line, methods):
            for group, part, look in lines.values():
                curve = curves.loc[(policy, method, group)]
                axis.plot(curve["step"], curve[part], **look)
            told = trained.loc[(policy, method)]
            rare, likely = (told[f"{g}_after"] / told[f"{g}_before"] for g in ("rare", "likely"))
            axis.set_title(f"{method}: rare ×{rare:.2g}, likely ×{likely:.2g}")
            axis.set(yscale="log", ylim=(max(1e-6, low / 2), 1.5), xlim=(0, numbers["steps"]))
            axis.minorticks_off()
        line[0].set_ylabel(f"{POLICIES.get(policy, policy)}\n\nprobability, mean over starts")
    for axis in axes[-1]:
        axis.set_xlabel("gradient step")
    figure.suptitle(
        f"How {W} changes from the third of starts where it is rarest and the third where it is "
        "likeliest (titles: by which factor),\nand the probability of the rejected and of all "
        "other answers"
    )
    _legend(figure, [_mark(text, **look) for text, (*_, look) in lines.items()])
    return figure


# -- theory: single steps


def theory(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Predicted against measured steps; what the start and the similarity decide."""
    import pandas as pd

    rows, varied = (rows_of(directory / f"{name}.csv") for name in ("theory", "condition"))
    found = pd.DataFrame(numbers["theory"])
    found = found[(found["form"] == "idealised") & ~found["own"]]
    told = pd.DataFrame(numbers["condition"]).set_index("method")
    methods, policies = rows["method"].unique(), rows["policy"].unique()
    plain, last = methods[0], methods[-1]
    figure, axes = _grid(2, max(4, len(methods)), 2.6)
    for axis in (*axes[0, len(methods) :], *axes[1, 4:]):
        axis.set_axis_off()
    for axis, method in zip(axes[0], methods):
        _predicted(axis, rows[rows["method"] == method], ("chosen", "rejected"))
        least = found[found["method"] == method]["correlation"].min()
        axis.set_title(f"{method}: correlation {least:.4f}")
        axis.set_xlabel(r"predicted change ($10^{-6}$ nats)")
    axes[0, 0].set_ylabel("measured change of\nlog-probability ($10^{-6}$ nats)")
    others, rare, falls, kept = axes[1, :4]
    some = rows[rows["method"] == plain]
    _predicted(others, some[some["policy"] == policies[-1]], ("others",))
    others.set_title(f"{plain}: what all others gain")
    others.set_xlabel(f"predicted change of {OTHERS} ($10^{{-6}}$)")
    others.set_ylabel(f"measured change of\n{OTHERS} ($10^{{-6}}$)")
    first = (some["policy"] == policies[0]) & (some["quantity"] == "chosen") & (some["step"] == 0)
    _rarity(rare, some[first])
    rare.set_title(f"{plain}: a rare $y_w$ gains little")
    for axis, method in ((falls, plain), (kept, last)):
        starts = varied[varied["method"] == method]
        _by_fate(axis, starts["excess"], MICRO * starts["change"], starts["change"] < 0)
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.axvline(0, color=INK, linewidth=1.2, linestyle=":")
        axis.set_title(f"{method}: {W} falls in {told.at[method, 'fell']:.0%}")
        axis.set_xlabel(r"$\langle g_w, g_l\rangle - |g_w|^2$")
    falls.set_ylabel(f"change of log {W},\nfirst step ($10^{{-6}}$ nats)")
    figure.suptitle(
        f"First-order theory predicts every step at lr {numbers['theory_lr']:g} (top, bottom "
        "left). Bottom right, the first step where similarity varies:\nunder a preference loss "
        "alone the preferred answer falls right of the dotted line, where "
        r"$\langle g_w, g_l\rangle > |g_w|^2$"
    )
    marks = {W: POINTS["chosen"], L: POINTS["rejected"], OTHERS: POINTS["others"]}
    marks[f"{W} fell"] = (FELL, "v")
    handles = [
        _mark(text, color=colour, marker=marker, linestyle="", markersize=5)
        for text, (colour, marker) in marks.items()
    ]
    handles.append(_mark("prediction", color=INK, linestyle="--", marker="+", markersize=7))
    _legend(figure, handles)
    return figure


def _predicted(axis: Any, rows: Any, quantities: Sequence[str]) -> None:
    rows = rows[rows["quantity"].isin(quantities)]
    for quantity in quantities:
        colour, marker = POINTS[quantity]
        x, y = (MICRO * rows[rows["quantity"] == quantity][n] for n in ("idealised", "measured"))
        axis.scatter(x, y, s=10, lw=0, alpha=0.6, c=colour, marker=marker)
    ends = [MICRO * rows["idealised"].min(), MICRO * rows["idealised"].max()]
    axis.plot(ends, ends, color=INK, ls="--", lw=1)


def _rarity(axis: Any, rows: Any) -> None:
    """The gain of pi(y_w) in one step: measured, and pi(y_w) times the predicted d log pi(y_w)."""
    rows = rows.sort_values("chosen_before")
    start = rows["chosen_before"]
    axis.scatter(start, MICRO * start * rows["measured"], s=12, c=GREW, lw=0)
    axis.scatter(start, MICRO * start * rows["idealised"], s=30, c=INK, marker="+", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel=f"{W} before the step")
    axis.set_ylabel(f"change of {W} ($10^{{-6}}$)")
