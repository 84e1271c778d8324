"""One run's files in, the sections of its page out."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import Any

from spo_lightning.report import design, mixture
from spo_lightning.report.charts import GREY, Chart, histogram, lines, series, unit
from spo_lightning.report.page import Browsed, Folded, Note, Picture, Samples, Section, Table
from spo_lightning.report.reading import (
    ALARM,
    DELTAS,
    LAST_LINES,
    TEXTS,
    Run,
    pairs_of,
)
from spo_lightning.report.style import COLOURS

WORST = 20  # pairs in the table of those that lost most
# charts everybody looks at: key, title, what is drawn; the rest of metrics.csv follows
MAIN = (
    (
        "logps",
        "Log-probability of the chosen and the rejected",
        ("logps/chosen", "logps/rejected"),
    ),
    ("mass", "Probability on the ten likeliest tokens", ("mass/top10",)),
    ("displacement_rate", "Pairs whose chosen answer lost probability", ("displacement/rate",)),
    ("displacement", "Change of log pi(y_w) against the reference", ("displacement/chosen",)),
    ("rewards", "Rewards and margin", ("rewards/chosen", "rewards/rejected", "rewards/margins")),
    ("accuracy", "Share of pairs told apart", ("rewards/accuracies", "preference/accuracy")),
    ("loss", "Loss and its upper level", ("loss", "loss/upper")),
    ("lower", "Lower level (SFT) and its value", ("loss/lower", "solver/value", "nll/chosen")),
    ("weight", "Weight of the lower level", ("solver/weight",)),
    ("violation", "Violation of the lower level", ("solver/violation",)),
    ("entropy", "Entropy of the ten likeliest tokens", ("entropy/top10",)),
    ("grad_norm", "Gradient norm", ("grad_norm",)),
    ("learning_rate", "Learning rate", ("learning_rate",)),
    ("speed", "Throughput", ("time/tokens_per_second",)),
)
GROUPED = (
    *("exact_match", "win_rate", "rewards/accuracies", "rewards/margins", "nll/chosen"),
    *("displacement/rate", "displacement/chosen", "answers/refused"),
)  # numbers of groups of held-out rows that the table shows
PROBABILITY = ("logps", "mass", "displacement_rate", "displacement")  # charts that come first
SPLITS = ("train", "eval")
PAIR_COLUMNS = (  # of pairs.jsonl that come first
    *("prompt", "chosen", "rejected", "rewards/margins", "verdict", "answer", "rival"),
)
KINDS = {  # of pairs: how the menu calls them, and which they are
    "wrong": ("margin below 0", lambda row: row.get("rewards/margins", 0) < 0),
    "won": ("answer won", lambda row: row.get("verdict", 0) > 0.5),
    "lost": ("answer lost", lambda row: row.get("verdict", 1) < 0.5),
    "displaced": ("chosen answer lost probability", lambda row: row.get("rewards/chosen", 0) < 0),
}
CHANGE = ("held out", "difference", "95% from", "to", "McNemar's p")
PAIRED = "What changed on the same prompts, and how sure that is:"
ABOUT = (
    "A margin may grow while the chosen answers lose probability (displacement): then the mass "
    "goes to answers that nobody chose. A dotted line marks the step of the alarm."
)


def sections(run: Run) -> list[Section]:
    """Everything the directory holds, what matters most first."""
    main = [chart for row in MAIN for chart in curves(run, *row)]
    goes = [chart for chart in main if chart.key in PROBABILITY]
    rest = [chart for chart in main if chart.key not in PROBABILITY]
    return [
        Section("Before and after", [*told(run), *numbers(run)], "Held-out numbers."),
        *design.sections(run),
        *mixture.sections(run),
        Section("Where the probability goes", [*goes, *balance(run)], ABOUT),
        Section("Pair by pair", [*spread(run), *lost(run)], "Held-out pairs: change in nats."),
        Section("Every pair", every_pair(run), "Numbers after training, as pairs.jsonl has them."),
        Section("Images", grids(run), "Of the same prompts, from the same noise."),
        Section(
            "Samples",
            [Samples(run.samples)] if run.samples else [],
            "Greedy answers to held-out prompts, before and after.",
        ),
        Section("The optimisation", rest),
        Section("Diagnostics", others(run), "Whatever else was logged."),
        Section("Configuration and environment", environment(run)),
    ]


def grids(run: Run) -> list[Any]:
    """Of a policy that draws: before and after side by side, and held-out pairs."""
    told = {"samples": "images before and after training", "pairs": "chosen and rejected images"}
    files = {run.path / f"{name}.png": text for name, text in told.items()}
    return [Picture(text, file.read_bytes()) for file, text in files.items() if file.is_file()]


def told(run: Run) -> list[Any]:
    """Its state and what went wrong."""
    status = run.status
    parts = [f"{group} {option}" for group, option in sorted(run.choices.items())]
    parts += [f"seed {run.seed}", f"state {run.state}"]
    if "step" in status:
        parts.append(f"step {status['step']} of {status.get('max_steps')}")
    if run.seconds:
        parts.append(f"{sum(run.seconds.values()):.0f} s")
    found: list[Any] = [Note(", ".join(parts) + ".")]
    if run.error:
        found.append(Note(f"Error: {run.error}", alarm=True))
    if run.alarm is not None:
        found.append(
            Note(
                f"Step {run.alarm}: the alarm sounded. Chosen answers lost probability while the "
                "margin rose. Remedies: loss=spo or solver=penalty, a higher solver.weight, a "
                "lower optimizer.lr.",
                alarm=True,
            )
        )
    return found + [Note(problem, alarm=True) for problem in run.problems]


def numbers(run: Run) -> list[Any]:
    if not run.init and not run.final:
        return [Note("No held-out numbers yet (metrics.json).")]
    head = ["init", "final", "difference", "unit"]
    found = [Table("numbers", ["held out", *head], moved(run.init, run.final))]
    rows = [
        [group, *row]
        for group, sides in run.by.items()
        for row in moved(*sides)
        if row[0] in GROUPED
    ]
    if rows:
        named = ["of the rows", "held out", *head]
        found += [Note("Some of them in groups of the rows:"), Table("by", named, rows)]
    if run.paired:
        found += [Note(PAIRED), Table("paired", CHANGE, sure(run.paired))]
    return found


def sure(paired: Mapping[str, Mapping[str, float]]) -> list[list[Any]]:
    """A row per number that was compared prompt by prompt."""
    return [
        [name, *(of[part] for part in ("difference", "low", "high")), of.get("p")]
        for name, of in paired.items()
    ]


def moved(init: Mapping[str, float], final: Mapping[str, float]) -> list[list[Any]]:
    """A row per number: before, after, difference and unit."""
    rows = []
    for name in {**init, **final}:
        before, after = init.get(name), final.get(name)
        difference = None if before is None or after is None else after - before
        rows.append([name, before, after, difference, unit(name)])
    return rows


def curves(run: Run, key: str, title: str, names: Sequence[str]) -> list[Chart]:
    """One colour per number, whatever the split; held-out points are joined by dashes."""
    data = []
    for colour, name in zip(cycle(COLOURS), names):
        for split in SPLITS:
            curve = run.curves.get(f"{split}/{name}")
            if curve is None:
                continue
            steps, values = curve.index.tolist(), curve.tolist()
            if split == "eval" and name in run.init and steps[0] > 0:
                steps, values = [0, *steps], [run.init[name], *values]
            alone = len(steps) == 1  # a line of one point is not seen
            mode = "lines+markers" if split == "eval" or alone else "lines"
            dash = "dash" if split == "eval" else "solid"
            data.append(series(f"{split}/{name}", steps, values, mode, colour, dash=dash))
    return [lines(key, title, "outer step", unit(names[0]), data, run.alarm)] if data else []


def balance(run: Run) -> list[Chart]:
    """The margin over the change of the chosen answers, step by step."""
    import pandas as pd

    for split in SPLITS:
        names = [f"{split}/{name}" for name in ("displacement/chosen", "rewards/margins")]
        if not run.curves.keys() >= set(names):
            continue
        both = pd.concat([run.curves[name] for name in names], axis=1, join="inner")
        if both.empty:
            continue
        texts = [f"step {step:g}" for step in both.index]
        x, y = (both[name].tolist() for name in names)
        data = [series("steps", x, y, "lines+markers", texts=texts)]
        sounding = run.curves.get(ALARM, pd.Series(dtype=float))
        loud = both[both.index.isin(sounding.index[sounding > 0])]
        if len(loud):
            x, y = (loud[name].tolist() for name in names)
            data.append(series("alarm", x, y, "markers", COLOURS[1], mark="x"))
        title = f"Margin against displacement, {split}"
        named = ("change of log pi(y_w), nats", "margin, beta x nats")
        return [lines("balance", title, *named, data)]
    return []


def spread(run: Run) -> list[Chart]:
    """The change of every held-out pair."""
    found = {
        side: [row[delta] for row in run.samples if row[delta] is not None]
        for side, delta in zip(("chosen", "rejected"), DELTAS)
    }
    if not found["chosen"]:
        return []
    told = histogram("deltas", "Change of log-probability per pair", "nats", found)
    rows = [row for row in run.samples if None not in (row[delta] for delta in DELTAS)]
    if not rows:
        return [told]
    data = []
    for label, right in (("right after", True), ("wrong after", False), ("pairs", None)):
        some = [row for row in rows if row["after_ok"] is right]
        if some:
            x, y = ([row[delta] for row in some] for delta in DELTAS)
            mark, texts = "x" if right is False else "circle", [r["prompt"][:80] for r in some]
            look = ("markers", COLOURS[len(data)])
            data.append(series(label, x, y, *look, mark=mark, texts=texts))
    ends = [f(row["chosen_delta"] for row in rows) for f in (min, max)]
    data.append(series("both move alike", ends, ends, colour=GREY, dash="dot"))
    named = ("change of log pi(y_w), nats", "change of log pi(y_l), nats")
    return [told, lines("pairs", "Chosen against rejected, a point per pair", *named, data)]


def lost(run: Run) -> list[Any]:
    """The pairs whose chosen answer lost most."""
    told = [row for row in run.samples if row["chosen_delta"] is not None]
    rows = sorted((r for r in told if r["chosen_delta"] < 0), key=lambda r: r["chosen_delta"])
    if not rows:
        return []
    cells = [[row[name] for name in (*TEXTS, *DELTAS)] for row in rows[:WORST]]
    note = (
        f"{len(rows)} of {len(told)} held-out pairs lost log-probability of their chosen answer; "
        f"the {len(cells)} that lost most, with the greedy answers before and after:"
    )
    head = [*TEXTS, "chosen, nats", "rejected, nats"]
    return [Note(note), Table("lost", head, cells, digits=2)]


def every_pair(run: Run) -> list[Any]:
    """To be sorted by any number and searched."""
    problems: list[str] = []
    rows = pairs_of(run, problems.append)
    names = dict.fromkeys(name for row in rows for name in row)
    first = [name for name in ("row", *PAIR_COLUMNS) if name in names]
    head = [*first, *(name for name in names if name not in first)]
    marks = [[mark for mark, (_, holds) in KINDS.items() if holds(row)] for row in rows]
    known = {mark for some in marks for mark in some}
    menu = {mark: told for mark, (told, _) in KINDS.items() if mark in known}
    cells = [[int(row[n]) if n in row and _whole(n) else row.get(n) for n in head] for row in rows]
    notes = [Note(problem, alarm=True) for problem in problems]
    told = [*map(" ".join, marks)]
    return [*notes, Browsed("every", head, cells, told, menu, digits=2)] if rows else notes


def _whole(name: str) -> bool:
    return name == "row" or name.startswith("tokens/")


def others(run: Run) -> list[Chart]:
    """Numbers of metrics.csv that no chart above shows, by the first part of their names."""
    shown = {name for *_, names in MAIN for name in names}
    shown |= {"displacement/alarm", "num_tokens", "epoch"}
    logged = dict.fromkeys(column.partition("/")[2] for column in run.curves)
    rest = [name for name in logged if name not in shown]
    groups = list(dict.fromkeys(name.partition("/")[0] for name in rest))
    rest.sort(key=lambda name: groups.index(name.partition("/")[0]))
    found = (curves(run, f"other_{name.replace('/', '_')}", name, [name]) for name in rest)
    return [chart for charts in found for chart in charts]


def environment(run: Run) -> list[Any]:
    import yaml

    known = ("version", "git", "started", "updated")
    rows = [[name, run.status[name]] for name in known if run.status.get(name)]
    rows += [[f"seconds/{stage}", str(value)] for stage, value in run.seconds.items()]
    rows += [["directory", str(run.path.absolute())]] if rows else []
    found: list[Any] = [Table("environment", ["what", "value"], rows)] if rows else []
    if run.config:
        found.append(Folded("config.yaml", yaml.safe_dump(run.config, sort_keys=False)))
    if run.log:
        found.append(Folded(f"train.log, its last {LAST_LINES} lines at most", run.log))
    return found
