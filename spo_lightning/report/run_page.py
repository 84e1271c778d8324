"""One run's files in, the sections of its page out."""

import json
import math
from collections.abc import Sequence
from typing import Any

from spo_lightning.report.charts import GREY, Chart, Histogram, Series, unit
from spo_lightning.report.page import Folded, Note, Samples, Section, Table
from spo_lightning.report.reading import ALARM, Curve, Run

WORST = 20  # pairs in the table of those that lost most
LAST_LINES = 200  # of train.log
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
SPLITS = ("train", "eval")


def sections(run: Run) -> list[Section]:
    """Everything the directory holds, what matters most first."""
    run.read()
    return [
        Section("Before and after", [*told(run), *numbers(run)], "Held-out numbers."),
        Section("Where the probability goes", [*probability(run), *balance(run)], ABOUT),
        Section("Pair by pair", [*spread(run), *lost(run)], "Held-out pairs: change in nats."),
        Section("Samples", samples(run), "Greedy answers to held-out prompts, before and after."),
        Section("The optimisation", optimisation(run)),
        Section("Diagnostics", others(run), "Whatever else was logged."),
        Section("Configuration and environment", environment(run)),
    ]


ABOUT = (
    "A margin may grow while the chosen answers lose probability (displacement): then the mass "
    "goes to answers that nobody chose. A dotted line marks the step of the alarm."
)


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
    rows = []
    for name in {**run.init, **run.final}:
        before, after = run.init.get(name), run.final.get(name)
        moved = None if before is None or after is None else float(after - before)
        rows.append([name, _float(before), _float(after), moved, unit(name)])
    return [Table("numbers", ["held out", "init", "final", "difference", "unit"], rows)]


def _float(value: float | None) -> float | None:
    return None if value is None else float(value)


def lines(run: Run, key: str, title: str, names: Sequence[str]) -> list[Chart]:
    """Both splits of the numbers; held-out points are joined by dashes."""
    series = []
    for name in names:
        for split in SPLITS:
            curve = run.curves.get(f"{split}/{name}")
            if curve is None:
                continue
            if split == "eval" and name in run.init and curve[0][0] > 0:
                curve = [0, *curve[0]], [run.init[name], *curve[1]]
            alone = len(curve[0]) == 1  # a line of one point is not seen
            mode = "lines+markers" if split == "eval" or alone else "lines"
            dash = "dash" if split == "eval" else "solid"
            series.append(Series(f"{split}/{name}", *curve, mode=mode, dash=dash))
    if not series:
        return []
    upright = {} if run.alarm is None else {float(run.alarm): "alarm"}
    return [Chart(key, title, "outer step", unit(names[0]), _paired(series, names), upright)]


def _paired(series: Sequence[Series], names: Sequence[str]) -> list[Series]:
    """One colour per number, whatever the split."""
    from dataclasses import replace

    from spo_lightning.report.charts import COLOURS

    colour = {name: COLOURS[n % len(COLOURS)] for n, name in enumerate(names)}
    return [replace(one, colour=colour[one.label.partition("/")[2]]) for one in series]


def probability(run: Run) -> list[Chart]:
    return [chart for row in MAIN[:4] for chart in lines(run, *row)]


def balance(run: Run) -> list[Chart]:
    """The margin over the change of the chosen answers, step by step."""
    for split in SPLITS:
        moved, margin = (
            run.curves.get(f"{split}/{name}")
            for name in ("displacement/chosen", "rewards/margins")
        )
        if moved is None or margin is None:
            continue
        both = _joined(moved, margin)
        if not both:
            continue
        steps, x, y = (list(column) for column in zip(*both))
        texts = [f"step {step:g}" for step in steps]
        series = [Series("steps", x, y, "lines+markers", texts=texts)]
        sounding = dict(zip(*run.curves.get(ALARM, ([], []))))
        loud = [n for n, step in enumerate(steps) if sounding.get(step)]
        if loud:
            at = ([x[n] for n in loud], [y[n] for n in loud])
            series.append(Series("alarm", *at, "markers", mark="x"))
        title = f"Margin against displacement, {split}"
        named = ("change of log pi(y_w), nats", "margin, beta x nats")
        return [Chart("balance", title, *named, series)]
    return []


def _joined(one: Curve, two: Curve) -> list[tuple[float, float, float]]:
    other = dict(zip(*two))
    return [(step, value, other[step]) for step, value in zip(*one) if step in other]


def spread(run: Run) -> list[Any]:
    """The change of every held-out pair."""
    found = {
        side: [row[f"{side}_delta"] for row in run.samples if _is_number(row, f"{side}_delta")]
        for side in ("chosen", "rejected")
    }
    if not found["chosen"]:
        return []
    return [
        Histogram("deltas", "Change of log-probability per pair", "nats", found),
        *_against(run),
    ]


def _against(run: Run) -> list[Chart]:
    rows = [r for r in run.samples if _is_number(r, "chosen_delta", "rejected_delta")]
    if not rows:
        return []
    groups = {
        "right after": [row for row in rows if row.get("after_ok") is True],
        "wrong after": [row for row in rows if row.get("after_ok") is False],
        "pairs": [row for row in rows if row.get("after_ok") is None],
    }
    series = [
        Series(
            label,
            [row["chosen_delta"] for row in some],
            [row["rejected_delta"] for row in some],
            "markers",
            mark="x" if label.startswith("wrong") else "circle",
            texts=[str(row.get("prompt", ""))[:80] for row in some],
        )
        for label, some in groups.items()
        if some
    ]
    ends = [min(r["chosen_delta"] for r in rows), max(r["chosen_delta"] for r in rows)]
    series.append(Series("both move alike", ends, ends, colour=GREY, dash="dot"))
    named = ("change of log pi(y_w), nats", "change of log pi(y_l), nats")
    return [Chart("pairs", "Chosen against rejected, a point per pair", *named, series)]


def _is_number(row: dict[str, Any], *names: str) -> bool:
    values = [row.get(name) for name in names]
    return all(isinstance(value, (int, float)) and math.isfinite(value) for value in values)


def lost(run: Run) -> list[Any]:
    """The pairs whose chosen answer lost most."""
    rows = [row for row in run.samples if _is_number(row, "chosen_delta")]
    rows = [r for r in sorted(rows, key=lambda r: r["chosen_delta"]) if r["chosen_delta"] < 0]
    if not rows:
        return []
    names = ("prompt", "reference", "chosen", "rejected", "before", "after")
    cells = [
        [
            *(_written(row.get(name)) for name in names),
            float(row["chosen_delta"]),
            _number(row),
        ]
        for row in rows[:WORST]
    ]
    told = sum(_is_number(row, "chosen_delta") for row in run.samples)
    return [
        Note(
            f"{len(rows)} of {told} held-out pairs lost log-probability of their chosen answer; "
            f"the {len(cells)} that lost most, with the greedy answers before and after:"
        ),
        Table("lost", [*names, "chosen, nats", "rejected, nats"], cells, digits=2),
    ]


def _number(row: dict[str, Any]) -> float | None:
    return float(row["rejected_delta"]) if _is_number(row, "rejected_delta") else None


def _written(value: Any) -> str:
    return value if isinstance(value, str) else "" if value is None else json.dumps(value)


def samples(run: Run) -> list[Any]:
    texts = ("prompt", "reference", "before", "after")
    rows = [row | {name: _written(row.get(name)) for name in texts} for row in run.samples]
    return [Samples(rows)] if rows else []


def optimisation(run: Run) -> list[Chart]:
    return [chart for row in MAIN[4:] for chart in lines(run, *row)]


def others(run: Run) -> list[Chart]:
    """Numbers of metrics.csv that no chart above shows, by the first part of their names."""
    shown = {name for *_, names in MAIN for name in names} | {
        "displacement/alarm",
        "num_tokens",
        "epoch",
    }
    groups: dict[str, list[str]] = {}
    for column in run.curves:
        name = column.partition("/")[2]
        if name not in shown and name not in groups.get(name.partition("/")[0], []):
            groups.setdefault(name.partition("/")[0], []).append(name)
    return [
        chart
        for group, names in groups.items()
        for name in names
        for chart in lines(run, f"other_{name.replace('/', '_')}", name, [name])
    ]


def environment(run: Run) -> list[Any]:
    import yaml

    found: list[Any] = []
    known = ("version", "git", "started", "updated")
    rows = [[name, str(run.status[name])] for name in known if run.status.get(name)]
    rows += [[f"seconds/{stage}", str(value)] for stage, value in run.seconds.items()]
    if rows:
        found.append(
            Table(
                "environment", ["what", "value"], [*rows, ["directory", str(run.path.absolute())]]
            )
        )
    if run.config:
        found.append(Folded("config.yaml", yaml.safe_dump(run.config, sort_keys=False)))
    log = run.log(LAST_LINES)
    if log:
        found.append(Folded(f"train.log, its last {LAST_LINES} lines at most", log))
    return found
