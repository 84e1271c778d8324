"""A table of jobs (``sweep.table``) in; capability against preference of every method out.

The layout is that of the paper's Table 2 (2507.07723v2): each objective bare and with SPO, beside
the policy before training and two controls, SFT on the chosen answers and SFT on the SFT set.
"""

import csv
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.report.evolution_figures import FELL, GREW, INK, STYLE
from spo_lightning.report.reading import natural
from spo_lightning.report.table import cell, interval

INIT, CHOSEN, SFT_SET, SPO = "init", "SFT on chosen", "SFT on the SFT set", " + SPO"
BASES = {
    **{"dpo": "DPO", "cpo": "CPO", "dpop": "DPOP", "rdpo": "R-DPO", "simpo": "SimPO"},
    "alpha_dpo": "AlphaDPO",
}
PANELS = 3  # in a row of the picture
OTHER = "#777777"  # of what is compared with
CAPABILITY, WIN_RATE, ACCURACY = "exact_match", "win_rate", "preference/accuracy"
HEADINGS = {
    CAPABILITY: "exact match",
    WIN_RATE: "win rate",
    ACCURACY: "preference accuracy",
    "displacement/rate": "displacement rate",
    "displacement/chosen": "change of log pi(y_w), nats",
}
# words that make a method; words that vary along one method's front; the rest is the setting
MOVED = ("displacement/rate", "displacement/chosen")
METHOD, FRONT = ("loss", "solver", "data.sft"), ("optimizer.lr", "solver.weight")


@dataclass(frozen=True)
class Part:
    """Jobs of one setting: per method and seed its numbers, ``init/NAME`` and ``final/NAME``."""

    name: str
    methods: Mapping[str, Mapping[int, Mapping[str, float]]]

    @property
    def preference(self) -> str:
        """The win rate where the data has a judge, else how often the chosen is the likelier."""
        numbers = next(iter(next(iter(self.methods.values())).values()))
        return WIN_RATE if f"final/{WIN_RATE}" in numbers else ACCURACY

    @property
    def bases(self) -> list[str]:
        """Objectives that ran bare and with SPO."""
        bare = [method.removesuffix(SPO) for method in self.methods if method.endswith(SPO)]
        return [base for base in bare if base in self.methods]

    def values(self, method: str, name: str) -> dict[int, float]:
        """By seed; ``INIT`` is the policy before training, whatever was trained then."""
        wanted = self.methods.values() if method == INIT else [self.methods[method]]
        key = f"init/{name}" if method == INIT else f"final/{name}"
        return {seed: row[key] for rows in wanted for seed, row in rows.items() if key in row}

    def has(self, name: str) -> bool:
        """Whether some job has the number."""
        return any(self.values(method, name) for method in self.methods)

    def less(self, method: str, other: str, name: str) -> list[float]:
        """Differences of two methods at the seeds that both have."""
        if other not in self.methods:
            return []
        one, two = self.values(method, name), self.values(other, name)
        return [one[seed] - two[seed] for seed in sorted(one.keys() & two.keys())]


def report(path: Path) -> tuple[str, list[Path]]:
    """The tables of ``path`` as markdown, and the files they and the pictures are written to.

    Raises ``UserError`` where the file is no table of jobs.
    """
    main, front = parts(jobs(read(path)))
    text = "\n\n".join([*map(table, main), *map(along, front)]) + "\n"
    where = path.with_suffix(".md")
    where.write_text(text, encoding="utf-8")
    return text, [where, *drawn(main, front, path)]


def read(path: Path) -> list[dict[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: unreadable: {error}") from error
    if not rows or not {"config", "words"} <= rows[0].keys():
        raise UserError(f"{path}: no row of a job: name a file that sweep.table wrote")
    return rows


Job = tuple[Mapping[str, str], int, Mapping[str, float]]  # words, seed, numbers


def jobs(rows: Sequence[Mapping[str, str]]) -> list[Job]:
    """The rows of the file, taken apart."""
    found = []
    for row in rows:
        words: dict[str, str] = {}
        for word in row["words"].split():
            key, _, value = word.lstrip("+~").partition("=")
            words[key] = value.replace("\\", "")  # Hydra's, before braces
        numbers = {name: float(value) for name, value in row.items() if "/" in name and value}
        found.append((words, int(words.pop("seed", 0)), numbers))
    return found


def numbers_of(init: Mapping[str, float], final: Mapping[str, float]) -> dict[str, float]:
    """Under the names of a table's columns."""
    both = {"init": init, "final": final}
    return {f"{when}/{name}": v for when, found in both.items() for name, v in found.items()}


def parts(jobs: Sequence[Job]) -> tuple[list[Part], list[Part]]:
    """The settings with their methods, and those along whose front a method was followed."""
    main: dict[str, dict[str, dict[int, Any]]] = {}
    front: dict[str, dict[str, dict[int, Any]]] = {}
    for words, seed, numbers in jobs:
        method = method_of(words)
        kept = (f"{k}={v}" for k, v in words.items() if k not in (*METHOD, *FRONT))
        setting = " ".join(kept)
        if "optimizer.lr" in words:
            at = ", ".join(f"{k.split('.')[1]} {words[k]}" for k in FRONT if k in words)
            front.setdefault(setting, {}).setdefault(f"{method}, {at}", {})[seed] = numbers
        else:
            main.setdefault(setting, {}).setdefault(method, {})[seed] = numbers
    names = sorted(main, key=natural)
    ordered = {name: dict(sorted(main[name].items(), key=place)) for name in names}
    return [Part(*item) for item in ordered.items()], [Part(*item) for item in front.items()]


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
    columns = [name for name in (CAPABILITY, part.preference, *MOVED) if part.has(name)]
    pair = [name for name in columns if name not in MOVED]
    head = ["method", "seeds", *(HEADINGS[name] for name in columns)]
    head += [f"{HEADINGS[name]}, minus {other}" for other in ("bare", CHOSEN) for name in pair]
    rows: list[list[Any]] = []
    for method in (INIT, *part.methods):
        shown = columns if method != INIT else pair
        row = [cell([*part.values(method, name).values()]) for name in shown]
        row += [""] * (len(columns) - len(shown))
        for other in (method.removesuffix(SPO), CHOSEN):
            given = method.endswith(SPO)
            row += [signed(part.less(method, other, name)) if given else "" for name in pair]
        rows.append([method, len(part.values(method, columns[0])), *row])
    return head, rows


def table(part: Part) -> str:
    """The same as markdown."""
    head, rows = cells(part)
    lines = [f"**{part.name}**", "", _line(head), "|---" * len(head) + "|"]
    return "\n".join([*lines, *map(_line, rows)])


def along(part: Part) -> str:
    """Markdown: a row per point of a front."""
    columns = [CAPABILITY, part.preference, *MOVED]
    head = ["method", "seeds", *(HEADINGS[name] for name in columns)]
    lines = [f"**Front, {part.name}**", "", _line(head), "|---" * len(head) + "|"]
    for method, rows in part.methods.items():
        cells = [cell([*part.values(method, name).values()]) for name in columns]
        lines.append(_line([method, len(rows), *cells]))
    return "\n".join(lines)


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
            axis.set_ylabel("exact match, held out")
        for axis in axes[len(panels) :]:
            axis.remove()
        found = [path.with_suffix(f".{kind}") for kind in ("png", "svg")]
        for file in found:
            figure.savefig(
                file, dpi=150, metadata={"Date": None} if file.suffix == ".svg" else None
            )
    return found


def methods(part: Part, axis: Any) -> None:
    """The controls in grey; every objective from its bare form to the one with SPO."""
    for method, marker in ((INIT, "D"), (CHOSEN, "s"), (SFT_SET, "^")):
        if method == INIT or method in part.methods:
            axis.plot(*point(part, method), marker, color=OTHER, label=method)
    for number, base in enumerate(part.bases):
        bare, held = point(part, base), point(part, base + SPO)
        axis.annotate("", held, bare, arrowprops={"arrowstyle": "->", "color": "#999999"})
        axis.plot(*bare, "o", color=FELL, mfc="white", label="bare")
        axis.plot(*held, "o", color=GREW, label="+ SPO")
        x, side = (5, "left") if number % 2 else (-5, "right")  # neighbours' names apart
        axis.annotate(
            base, bare, (x, 3), textcoords="offset points", ha=side, fontsize=7, color=INK
        )
    named = dict(zip(*reversed(axis.get_legend_handles_labels())))
    axis.legend(named.values(), named.keys(), fontsize=7)


def points(part: Part, axis: Any) -> None:
    """A front: a line per weight through the rates, marked by rate."""
    axis.plot(*point(part, INIT), "D", color=OTHER, label=INIT)
    lines: dict[str, list[tuple[str, str]]] = {}
    for method in part.methods:  # "DPO + SPO, lr 3e-5, weight 1"
        name, rate, *weight = method.split(", ")
        lines.setdefault(", ".join([name, *weight]), []).append((rate, method))
    rates = sorted({rate for line in lines.values() for rate, _ in line}, key=_rate)
    for number, (name, line) in enumerate(lines.items()):
        line.sort(key=lambda at: _rate(at[0]))
        at = [point(part, method) for _, method in line]
        colour = GREW if SPO in name else FELL
        dash = ("-", "--", ":", "-.")[number % 4]
        axis.plot(*zip(*at), dash, color=colour, label=name, linewidth=1)
        for (rate, _), (x, y) in zip(line, at):
            axis.plot(x, y, "osv^"[rates.index(rate) % 4], color=colour, markersize=4)
    for rate in rates:
        axis.plot([], [], "osv^"[rates.index(rate) % 4], color=INK, label=rate, markersize=4)
    axis.legend(fontsize=7)


def _rate(text: str) -> float:
    return float(text.split()[-1])


def both(part: Part, method: str) -> bool:
    """Whether some job of the method has both numbers of a point."""
    return all(part.values(method, name) for name in (part.preference, CAPABILITY))


def point(part: Part, method: str) -> tuple[float, float]:
    """Preference and capability in the mean."""
    x, y = ([*part.values(method, name).values()] for name in (part.preference, CAPABILITY))
    return sum(x) / len(x), sum(y) / len(y)


def _line(cells: Sequence[Any]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def signed(values: Sequence[float]) -> str:
    """A mean difference and its 95% interval."""
    if not values:
        return ""
    mean, half = interval(values)
    return f"{mean:+.3f}" + (f" ± {half:.3f}" if half == half else "")
