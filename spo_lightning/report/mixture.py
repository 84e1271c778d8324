"""The files of a run on a mixture in; its part of the page, methods.md and figures out; and over
several seeds, each method's numbers with their intervals."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import write_text
from spo_lightning.report.charts import Chart, lines, nth, series, still
from spo_lightning.report.mixture_figures import drawn
from spo_lightning.report.page import Note, Picture, Section, Table
from spo_lightning.report.reading import Run, read, rows_of
from spo_lightning.report.settings import Setting, cell, table

FILES = ("moments.csv", "pairs.csv", "density.csv")
COLUMNS = {  # of metrics.json, by group: what they are called
    "follows": {
        "pearson/surrogate": "Pearson",
        "spearman/surrogate": "Spearman",
        "pearson/one": "Pearson, one draw",
        "pearson/bound": "Pearson, bound's weights",
        "slope/surrogate": "slope",
        "slope/bound": "slope, bound's weights",
        "accuracy/truth": "accuracy, true",
        "accuracy/surrogate": "accuracy, surrogate",
    },
    "displaced": {
        "displacement/truth": "log p(x_w), true",
        "displacement/surrogate": "l(x_w), surrogate",
        "displacement/bound": "l(x_w), bound's weights",
        "displaced/truth": "share displaced, true",
        "displaced/surrogate": "share displaced, surrogate",
        "margin/truth": "margin, true",
        "margin/surrogate": "margin, surrogate",
    },
    "plane": {
        "kl_from_best": "KL(best, p)",
        "kl_to_best": "KL(p, best)",
        "reward": "reward",
        "mass": "integral",
    },
}
ASIDE = {"plane": ("reference",)}  # rows beside the methods
ABOUT = {
    "follows": "Held-out pairs at the end: the change of the surrogate's margin against the "
    "reference, beside the true log-ratio log p(x_w) - log p_ref(x_w) less the same of x_l. "
    "Slope: surrogate per nat. The bound's weights make the surrogate a variational bound, in "
    "nats. One draw: of time and noise, as a step of training sees a pair.",
    "displaced": "Mean change of the chosen points against the reference, in nats or in units of "
    "the surrogate, and the share that lost. Does the surrogate see what the likelihood does?",
    "plane": "The best policy is p_ref exp(r / beta): no other has as much reward less beta "
    "times KL from the reference. KL(best, p) is large where p lacks what the best has (it asks "
    "to cover), KL(p, best) where p has what the best lacks (it asks to seek). The integral is "
    "that of p over the grid, 1 if it is fine and wide enough.",
}
TITLES = {
    "follows": "Does the surrogate follow the likelihood?",
    "displaced": "Displacement, in truth and in the surrogate",
    "plane": "Densities",
}
PICTURES = {
    "follows": ("pairs", "surrogate margin over true log-ratio, a panel per method"),
    "displaced": ("displacement", "change of the chosen points over training, a panel per method"),
    "plane": ("densities", "densities of the reference, the best policy and each method"),
}

FOLLOWS = {"surrogate": "surrogate", "bound": "bound's weights"}


def sections(run: Run) -> list[Section]:
    """None of a run without a mixture."""
    if not all((run.path / name).is_file() for name in FILES):
        return []
    try:
        moments = rows_of(run.path / "moments.csv")
        charts = {
            "follows": [chart(moments, "pearson", "Correlation with the true log-ratio", FOLLOWS)],
        }
        found = []
        for group, title in TITLES.items():
            rows = [
                [method, *(run.final.get(f"{name}/{method}") for name in COLUMNS[group])]
                for method in [*ASIDE.get(group, ()), *methods_of([run])]
            ]
            shown: list[Any] = [Table(group, ["method", *COLUMNS[group].values()], rows)]
            if group in PICTURES:
                name, told = PICTURES[group]
                file = run.path / "figures" / f"{name}.png"
                shown += [Picture(told, file.read_bytes())] if file.is_file() else []
            found.append(Section(title, [*shown, *charts.get(group, [])], ABOUT[group]))
        return found
    except (ValueError, KeyError, TypeError) as error:
        told = f"{' or '.join(FILES)}: unreadable ({str(error).splitlines()[0]})"
        return [Section(TITLES["follows"], [Note(told, alarm=True)])]


def methods_of(runs: Sequence[Run]) -> list[str]:
    """Titles of the methods that some run trained."""
    head = "pearson/surrogate/"
    names = dict.fromkeys(name for run in runs for name in run.final if name.startswith(head))
    return [name.removeprefix(head) for name in names]


def chart(moments: Any, name: str, title: str, kinds: dict[str, str]) -> Chart:
    """A number over training; a colour per method, a dash per kind."""
    data = []
    for place, method in enumerate(moments["method"].unique()):
        some = moments[moments["method"] == method]
        for (kind, told), dash in zip(kinds.items(), ("solid", "dash")):
            x, y = some["step"].tolist(), some[f"{name}/{kind}"].tolist()
            look = nth(place) | {"dash": dash}
            data.append(series(f"{method}, {told}", x, y, "lines+markers", **look))
    return lines(f"{name}_by_step", f"{title}, held-out pairs", "step", title.lower(), data)


def tables(runs: Sequence[Run]) -> dict[str, tuple[list[str], list[list[str]]]]:
    """By group the head and rows of a table: means and 95% intervals over the runs."""
    found = {}
    for group, names in COLUMNS.items():
        rows = []
        for title in [*ASIDE.get(group, ()), *methods_of(runs)]:
            every = ([r.final[k] for r in runs if (k := f"{n}/{title}") in r.final] for n in names)
            rows.append([title, *map(cell, every)])
        found[group] = (["method", *names.values()], rows)
    return found


def seeded(settings: Sequence[Setting]) -> list[Section]:
    """Of a sweep: each setting's methods over its seeds."""
    blocks: list[Any] = []
    for setting in (it for it in settings if methods_of(it.runs)):
        for group, (head, rows) in tables(setting.runs).items():
            blocks.append(Note(f"{setting.name}, {len(setting.seeds)} seeds. {TITLES[group]}"))
            blocks.append(Table(f"{group}{len(blocks)}", head, rows))
    return [Section("Each method over the seeds", blocks, " ".join(ABOUT.values()))] * bool(blocks)


def markdown(settings: Sequence[Setting]) -> str:
    """The same for table.md; nothing of other runs."""
    lines = []
    for setting in (it for it in settings if methods_of(it.runs)):
        for group, content in tables(setting.runs).items():
            lines += ["", f"{setting.name}, {len(setting.seeds)} seeds. {TITLES[group]}", ""]
            lines += table(*content)
    return "\n".join([*lines, ""]) if lines else ""


def report(directory: Path) -> list[Path]:
    """Write methods.md and the figures; returns what was written."""
    run = read(directory, directory.name, {})
    text = ["# A mixture: the bound beside the likelihood", ""]
    for group, content in tables([run]).items():
        text += [f"## {TITLES[group]}", "", *table(*content), "", ABOUT[group], ""]
    write_text(directory / "methods.md", "\n".join(text))
    room = directory / "figures"
    room.mkdir(exist_ok=True)
    written = [directory / "methods.md", *drawn(directory, room, run.final)]
    for chart in (block for section in sections(run) for block in section.blocks):
        if isinstance(chart, Chart):
            written += still(chart, room)
    return written
