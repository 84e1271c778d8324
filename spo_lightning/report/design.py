"""The files of a run that proposes designs in; its part of the page, methods.md and figures out.

Shown are the fronts: of each method the proposals that no other of its own dominates.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import write_text
from spo_lightning.report.charts import GREY, Chart, axes, lines, plain, series, still
from spo_lightning.report.page import Note, Section, Table
from spo_lightning.report.reading import Run, read, rows_of
from spo_lightning.report.settings import Setting, cell, starred, table
from spo_lightning.report.style import COLOURS

FILES = ("designs.csv", "guidance.csv")
NAMES = ("hypervolume", "diversity", "spread")
METHODS = {  # in designs.csv and metrics.json: what they are called
    "data": "best that was known",
    "guided": "guided",
    "unguided": "without guidance",
    "surrogate": "search on a surrogate",
    "random": "at random",
}
ASIDE = ("random",)  # far from the others: drawn where it is asked for in the legend
ABOUT = (
    "Fronts of what each method proposes, measured by the problem itself. Left and down are "
    "better; three objectives turn when they are dragged. Of what was known the top of the "
    "ranking is left out."
)
WEIGHTS = (
    "The same noise at every weight. Grey lines are what guidance is compared with; the known "
    "best is one of them."
)
MEASURES = (
    "Hypervolume: the volume that the proposals dominate up to study.reference, where the known "
    "designs reach from 0 to 1 in each objective; more is better. Diversity: the mean distance of "
    "two proposals there. Spread: how uneven their gaps are; less is better."
)
HEAD = ("method", *NAMES)
SEEDED = (
    "Hypervolume of the guided proposals over the seeds, and less that of each other method at "
    "the same seed (95% intervals; * where zero is outside). The weight is the one with the "
    "largest mean, chosen afterwards by the same proposals."
)
OTHERS = [method for method in METHODS if method != "guided"]
SEEDED_HEAD = ("setting", "seeds", "guided", *(f"minus {METHODS[it]}" for it in OTHERS), "weight")


def sections(run: Run) -> list[Section]:
    """None of a run that proposes no designs."""
    if not all((run.path / name).is_file() for name in FILES):
        return []
    try:
        designs, guidance = (rows_of(run.path / name) for name in FILES)
        weight = float(run.config["study"]["guidance"]["weight"])
        return [
            Section("Fronts", fronts(designs, weight), ABOUT),
            Section("Methods", [Table("methods", HEAD, methods(run))], MEASURES),
            Section("By guidance weight", by_weight(run, guidance), WEIGHTS),
        ]
    except (ValueError, KeyError, TypeError) as error:
        told = f"{' or '.join(FILES)}: unreadable ({str(error).splitlines()[0]})"
        return [Section("Fronts", [Note(told, alarm=True)])]


def fronts(designs: Any, weight: float) -> list[Chart]:
    """The first three objectives, which the page turns, or two."""
    named = [name for name in designs.columns if name[0] == "f" and name[1:].isdigit()]
    shown = named[:3]
    data = []
    for method, colour in zip(METHODS, COLOURS):
        asked = {"guided": ("guided", weight), "unguided": ("guided", 0.0)}
        kind, of = asked.get(method, (method, 0.0))
        some = designs[
            (designs["method"] == kind) & (designs["weight"] == of) & (designs["front"] == 1)
        ]
        if some.empty or (method == "unguided" and weight == 0):
            continue
        label = f"guided, weight {weight:g}" if method == "guided" else METHODS[method]
        aside = {"visible": "legendonly"} if method in ASIDE else {}
        data.append(points(label, [some[name].tolist() for name in shown], colour) | aside)
    title = "Fronts in objective space"
    title += f", {len(shown)} of {len(named)} objectives" if len(named) > len(shown) else ""
    if len(shown) == 2:
        return [Chart("fronts", title, data, axes(*shown), 480)]
    scene = {f"{side}axis": {"title": {"text": plain(n)}} for side, n in zip("xyz", shown)}
    return [Chart("fronts", title, data, {"scene": scene}, 600)]


def points(label: str, values: Sequence[Sequence[float]], colour: str) -> dict[str, Any]:
    x, y, *above = values
    if not above:
        return series(label, x, y, "markers", colour)
    found = {"type": "scatter3d", "mode": "markers", "name": plain(label), "x": x, "y": y}
    return found | {"z": above[0], "marker": {"color": colour, "size": 3}}


def methods(run: Run) -> list[list[Any]]:
    """A row of numbers for each method, as metrics.json has them."""
    rows = []
    for method, label in METHODS.items():
        names = [name if method == "guided" else f"{name}/{method}" for name in NAMES]
        rows.append([label, *(run.final.get(name) for name in names)])
    return rows


def by_weight(run: Run, guidance: Any) -> list[Chart]:
    """Each number over the weight, with the others' as level lines."""
    weights, found = guidance["weight"].tolist(), []
    for name, colour in zip(NAMES, COLOURS):
        data = [series("guided", weights, guidance[name].tolist(), "lines+markers", colour)]
        dashes = zip(("data", "surrogate", "random"), ("solid", "dash", "dot"))
        for method, dash in dashes:
            level = run.final.get(f"{name}/{method}")
            if level is not None:
                ends = [weights[0], weights[-1]]
                data.append(series(METHODS[method], ends, [level, level], colour=GREY, dash=dash))
        title = f"{name.capitalize()} by guidance weight"
        found.append(lines(f"{name}_by_weight", title, "guidance weight", name, data))
    return found


def over_seeds(settings: Sequence[Setting]) -> list[list[Any]]:
    """A row of a setting that proposes designs."""
    import pandas as pd

    rows = []
    for setting in settings:
        guided = setting.values("hypervolume")
        if not setting.values("hypervolume/data"):
            continue
        apart = (
            [guided[seed] - value for seed, value in setting.values(f"hypervolume/{it}").items()]
            for it in OTHERS
        )
        paths = [run.path / "guidance.csv" for run in setting.runs]
        at = [rows_of(path).set_index("weight")["hypervolume"] for path in paths if path.is_file()]
        means = pd.concat(at, axis=1).mean(axis=1) if at else None
        best = None if means is None else means.index[means.argmax()]
        rows.append(
            [setting.name, len(setting.seeds), cell(guided.values()), *map(starred, apart), best]
        )
    return rows


def seeded(settings: Sequence[Setting]) -> list[Section]:
    """Of a sweep: what guidance gains over each other method."""
    rows = over_seeds(settings)
    found = Section("Guided against the others", [Table("guided", SEEDED_HEAD, rows)], SEEDED)
    return [found] * bool(rows)


def markdown(settings: Sequence[Setting]) -> str:
    """The same for table.md; nothing of other runs."""
    rows = over_seeds(settings)
    return "\n".join(["", SEEDED, "", *table(SEEDED_HEAD, rows), ""]) if rows else ""


def report(directory: Path) -> list[Path]:
    """Write methods.md and the figures; returns what was written."""
    run = read(directory, directory.name, {})
    rows = [
        [label, *("" if it is None else f"{it:.4f}" for it in numbers)]
        for label, *numbers in methods(run)
    ]
    text = ["# What each method proposes", "", *table(HEAD, rows), "", MEASURES]
    write_text(directory / "methods.md", "\n".join(text) + "\n")
    room = directory / "figures"
    room.mkdir(exist_ok=True)
    written = [directory / "methods.md"]
    for chart in (block for section in sections(run) for block in section.blocks):
        if isinstance(chart, Chart):
            written += still(chart, room)
    return written
