"""numbers.json and the csv files of a probability evolution in, matplotlib figures out."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
W, L, OTHERS = r"$\pi(y_w)$", r"$\pi(y_l)$", r"$\pi$(others)"
PARTS = {"chosen": "preferred answer", "rejected": "rejected answer", "others": "all others"}
# Okabe and Ito's palette, which colour-blind readers tell apart; shapes and places differ too
COLOURS = {"chosen": "#0072B2", "rejected": "#E69F00", "others": "#BBBBBB"}
GREW, FELL, INK = "#0072B2", "#D55E00", "#222222"
POLICIES = {
    "tabular": "tabular policy:\nanswers share nothing",
    "similar": "log-linear policy:\n$y_w$ and $y_l$ are similar",
}
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "figure.titlesize": 11.0,
    "svg.hashsalt": "spo_lightning",  # the same numbers give the same file
}
MICRO = 1e6  # short steps are shown in millionths


def read(path: Path) -> Rows:
    """Rows of a csv; what is a number becomes one."""
    with path.open(encoding="utf-8", newline="") as file:
        return [{name: _value(cell) for name, cell in row.items()} for row in csv.DictReader(file)]


def _value(cell: str) -> Any:
    try:
        return float(cell)
    except ValueError:
        return cell


def where(rows: Iterable[Mapping[str, Any]], **wanted: Any) -> Rows:
    return [dict(r) for r in rows if all(r[name] == value for name, value in wanted.items())]


def column(rows: Iterable[Mapping[str, Any]], name: str) -> list[float]:
    return [row[name] for row in rows]


def names(rows: Iterable[Mapping[str, Any]], name: str) -> list[str]:
    return list(dict.fromkeys(row[name] for row in rows))


def _grid(rows: int, columns: int, high: float, **more: Any) -> Any:
    """A figure of panels ``high`` inches high, and its axes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2.45 * columns + 0.8, high * rows + 1.0), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **more)


def _mark(text: str, **look: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], label=text, **look)


def _patches() -> list[Any]:
    from matplotlib.patches import Patch

    return [Patch(color=COLOURS[part], label=text) for part, text in PARTS.items()]


def _legend(figure: Any, handles: Sequence[Any]) -> None:
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


# -- evolution: from every start to its end


def evolution(numbers: Mapping[str, Any], directory: Path) -> Any:
    """pi(y_w) after against before, per start, and where the mass is on average."""
    starts, trained = read(directory / "starts.csv"), numbers["trained"]
    policies, methods = names(trained, "policy"), names(trained, "method")
    figure, axes = _grid(len(policies), len(methods) + 1, 2.5)
    low = max(1e-8, min(min(column(starts, f"chosen_{when}")) for when in ("before", "after")))
    for line, policy in zip(axes, policies):
        for axis, method in zip(line, methods):
            (told,) = where(trained, policy=policy, method=method)
            _ends(axis, where(starts, policy=policy, method=method), low)
            axis.set_title(f"{method}: {W} fell in {told['fell']:.0%}")
            axis.set_xlabel(f"{W} before training" if policy == policies[-1] else "")
            axis.tick_params(labelleft=method == methods[0])
        line[0].set_ylabel(f"{POLICIES.get(policy, policy)}\n\n{W} after training")
        _bars(line[-1], where(trained, policy=policy), methods)
    axes[-1, -1].set_xlabel("probability, mean over starts")
    figure.suptitle(
        "What preference training does to the probability of the preferred answer $y_w$. Each "
        f"mark is one of {numbers['starts']} initial policies;\nbelow the dashed line, {W} fell. "
        "A title gives the share that fell, the bars where the probability went."
    )
    grew = _mark(f"{W} grew", color=GREW, marker="o", linestyle="", markersize=5)
    fell = _mark(f"{W} fell", color=FELL, marker="v", linestyle="", markersize=5)
    _legend(figure, [grew, fell, *_patches()])
    return figure


def _ends(axis: Any, rows: Rows, low: float) -> None:
    before, after = column(rows, "chosen_before"), column(rows, "chosen_after")
    _by_fate(axis, before, after, [b > a for b, a in zip(before, after)])
    axis.plot([low, 1], [low, 1], color=INK, linestyle="--", linewidth=1)
    axis.set(xscale="log", yscale="log", ylim=(low / 2, 1.6), xlim=(min(before) / 1.5, 1.3))
    axis.minorticks_off()


def _by_fate(axis: Any, x: Sequence[float], y: Sequence[float], fell: Sequence[bool]) -> None:
    """Blue discs where y_w grew, red triangles where it fell."""
    for fate, colour, marker in ((False, GREW, "o"), (True, FELL, "v")):
        some = [(a, b) for a, b, f in zip(x, y, fell) if f is fate]
        axis.scatter(*zip(*some or [((), ())]), s=9, c=colour, marker=marker, lw=0, alpha=0.7)


def _bars(axis: Any, rows: Rows, methods: Sequence[str]) -> None:
    """Stacked mean masses: the start, then every method."""
    labels = ["start", *methods]
    masses = [[rows[0][f"{part}_before"] for part in PARTS]]
    masses += [[where(rows, method=m)[0][f"{part}_after"] for part in PARTS] for m in methods]
    left = [0.0] * len(labels)
    for part, widths in zip(PARTS, zip(*masses)):
        axis.barh(labels, widths, left=left, color=COLOURS[part], height=0.7)
        left = [a + b for a, b in zip(left, widths)]
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), title="Where the probability went")
    axis.tick_params(axis="y", length=0)


# -- trajectories: along training


def trajectories(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Mean masses along training; y_w's from rare and from likely starts."""
    rows, trained = read(directory / "evolution.csv"), numbers["trained"]
    policies, methods = names(trained, "policy"), names(trained, "method")
    figure, axes = _grid(len(policies), len(methods), 2.5, sharex=True, sharey=True)
    lines = {  # group and part -> look
        ("all", "others"): {"color": COLOURS["others"], "lw": 2.5},
        ("all", "rejected"): {"color": COLOURS["rejected"], "lw": 2, "ls": ":"},
        ("likely", "chosen"): {"color": COLOURS["chosen"], "lw": 2.5},
        ("rare", "chosen"): {"color": COLOURS["chosen"], "lw": 2, "ls": "--"},
    }
    low = min(min(column(where(rows, group=group), part)) for group, part in lines)
    for line, policy in zip(axes, policies):
        for axis, method in zip(line, methods):
            for (group, part), look in lines.items():
                curve = where(rows, policy=policy, method=method, group=group)
                axis.plot(column(curve, "step"), column(curve, part), **look)
            (told,) = where(trained, policy=policy, method=method)
            by = {g: told[f"{g}_after"] / told[f"{g}_before"] for g in ("rare", "likely")}
            axis.set_title(f"{method}: rare ×{by['rare']:.2g}, likely ×{by['likely']:.2g}")
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
    texts = ("all others", "rejected answer", "preferred, likely starts", "preferred, rare starts")
    _legend(figure, [_mark(text, **look) for text, look in zip(texts, lines.values())])
    return figure


# -- theory: single steps


def theory(numbers: Mapping[str, Any], directory: Path) -> Any:
    """Predicted against measured steps; what the start and the similarity decide."""
    rows, varied = read(directory / "theory.csv"), read(directory / "condition.csv")
    methods, policies = names(rows, "method"), names(rows, "policy")
    plain, last = methods[0], methods[-1]
    figure, axes = _grid(2, max(4, len(methods)), 2.6)
    for axis in axes.flat[len(methods) : axes.shape[1]]:
        axis.set_axis_off()
    for axis, method in zip(axes[0], methods):
        _predicted(axis, where(rows, method=method), ("chosen", "rejected"))
        found = where(numbers["theory"], method=method, form="idealised", own=False)
        axis.set_title(f"{method}: correlation {min(column(found, 'correlation')):.4f}")
        axis.set_xlabel(r"predicted change ($10^{-6}$ nats)")
    axes[0, 0].set_ylabel("measured change of\nlog-probability ($10^{-6}$ nats)")
    others, rare, falls, kept = axes[1, :4]
    for axis in axes[1, 4:]:
        axis.set_axis_off()
    _predicted(others, where(rows, method=plain, policy=policies[-1]), ("others",))
    others.set_title(f"{plain}: what all others gain")
    others.set_xlabel(f"predicted change of {OTHERS} ($10^{{-6}}$)")
    others.set_ylabel(f"measured change of\n{OTHERS} ($10^{{-6}}$)")
    first = where(rows, method=plain, policy=policies[0], quantity="chosen", step=0.0)
    _rarity(rare, first)
    rare.set_title(f"{plain}: a rare $y_w$ gains little")
    for axis, method in ((falls, plain), (kept, last)):
        some = where(varied, method=method)
        change = [MICRO * moved for moved in column(some, "change")]
        _by_fate(axis, column(some, "excess"), change, [moved < 0 for moved in change])
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.axvline(0, color=INK, linewidth=1.2, linestyle=":")
        (told,) = where(numbers["condition"], method=method)
        axis.set_title(f"{method}: {W} falls in {told['fell']:.0%}")
        axis.set_xlabel(r"$\langle g_w, g_l\rangle - |g_w|^2$")
    falls.set_ylabel(f"change of log {W},\nfirst step ($10^{{-6}}$ nats)")
    figure.suptitle(
        f"First-order theory predicts every step at lr {numbers['theory_lr']:g} (top, bottom "
        "left). Bottom right, the first step where similarity varies:\nunder a preference loss "
        "alone the preferred answer falls right of the dotted line, where "
        r"$\langle g_w, g_l\rangle > |g_w|^2$"
    )
    _legend(figure, _theory_marks())
    return figure


def _theory_marks() -> list[Any]:
    look = {"linestyle": "", "markersize": 5}
    return [
        _mark(f"{W}", color=GREW, marker="o", **look),
        _mark(f"{L}", color=COLOURS["rejected"], marker="s", **look),
        _mark(OTHERS, color="#777777", marker="D", **look),
        _mark(f"{W} fell", color=FELL, marker="v", **look),
        _mark("prediction", color=INK, linestyle="--", marker="+", markersize=7),
    ]


def _predicted(axis: Any, rows: Rows, quantities: Sequence[str]) -> None:
    looks = {
        "chosen": {"c": GREW, "marker": "o"},
        "rejected": {"c": COLOURS["rejected"], "marker": "s"},
        "others": {"c": "#777777", "marker": "D"},
    }
    ends = []
    for quantity in quantities:
        some = where(rows, quantity=quantity)
        x, y = ([MICRO * v for v in column(some, name)] for name in ("idealised", "measured"))
        axis.scatter(x, y, s=10, lw=0, alpha=0.6, **looks[quantity])
        ends += x
    axis.plot([min(ends), max(ends)], [min(ends), max(ends)], color=INK, ls="--", lw=1)


def _rarity(axis: Any, rows: Rows) -> None:
    """The gain of pi(y_w) in one step: measured, and pi(y_w) times the predicted d log pi(y_w)."""
    rows = sorted(rows, key=lambda row: row["chosen_before"])
    start = column(rows, "chosen_before")
    gains = {
        name: [MICRO * p * moved for p, moved in zip(start, column(rows, name))]
        for name in ("measured", "idealised")
    }
    axis.scatter(start, gains["measured"], s=12, c=GREW, lw=0)
    axis.scatter(start, gains["idealised"], s=30, c=INK, marker="+", lw=0.8)
    axis.set(xscale="log", yscale="log", xlabel=f"{W} before the step")
    axis.set_ylabel(f"change of {W} ($10^{{-6}}$)")
