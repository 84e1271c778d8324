"""Several runs' files in, the sections of one page out: which setting, how sure, at what price."""

from collections.abc import Sequence
from typing import Any

from spo_lightning.report import design, mixture, overoptimisation, paper
from spo_lightning.report.charts import unit
from spo_lightning.report.page import Note, Section, Table
from spo_lightning.report.reading import Run
from spo_lightning.report.run_page import lost
from spo_lightning.report.settings import (
    CAPABILITY,
    LOSS,
    MEANINGS,
    Setting,
    Sweep,
    cell,
    interval,
    kept,
    less,
    starred,
)
from spo_lightning.report.sweep_charts import curves, front, heats, keys, margins, points

RANKING = (
    "Mean ± 95% interval over seeds (Student's t). Settings that lost more than "
    f"{LOSS} of capability (exact_match or rougeL against before training) come last. Click a "
    "heading to sort."
)
DIFFERENCES = "The first of a ranking minus each other, at the seeds that both have."
FRONT = (
    "Right is less displacement, up is better; no setting is better in both than one on the "
    "front. Point at a dot for its setting."
)
MARGINS = (
    "Held-out pairs along each run, from the start at zero: at the same place across, margins are "
    "equal and the higher line has kept more. Means over seeds."
)
CURVES = (
    "On the training pairs; means over seeds at each logged step. Losses of objectives differ."
)
OWN = (
    "Whether each setting lowered the loss that it trains on, on held-out rows; it does not "
    "compare them. A loss that follows earlier batches, or how far the policy has moved, is "
    "another one at every look."
)
OWN_HEAD = ("setting", "at first", "at last", "change", "lowest", "at step")
NUMBERS = ("number", "meaning")
JOBS = ("run", "state", "seconds, all stages", "displacement alarm at step", "error")


def sections(runs: Sequence[Run]) -> list[Section]:
    """The answer first, then what it stands on."""
    sweep = Sweep(runs)
    best = sweep.ranked[0].runs[0] if sweep.ranked else None
    seconds = [float(sum(run.seconds.values())) or None for run in runs]
    jobs = [[r.name, r.state, took, r.alarm, r.error or ""] for r, took in zip(runs, seconds)]
    names = keys(sweep)
    alike = [] if names or not sweep.settings else [Note("All settings are alike.")]
    differing = [[str(s.told.get(name, "")) for name in names] for s in sweep.settings]
    meanings = [[name, f"{MEANINGS[name]} ({unit(name)})"] for name in sweep.names]
    return [
        Section("The answer", [*answer(sweep), *troubles(runs)]),
        Section("Ranking", ranking(sweep), RANKING),
        Section("Differences by seed", differences(sweep), DIFFERENCES),
        Section("Methods, bare and with SPO", methods(sweep)),
        *design.seeded(sweep.settings),
        *mixture.seeded(sweep.settings),
        Section("Over the grid", heats(sweep), "An empty field has no run."),
        Section("Quality against displacement", front(sweep), FRONT),
        Section("At equal margin", margins(sweep), MARGINS),
        Section("Curves", curves(sweep), CURVES),
        Section("Own loss", own_loss(sweep), OWN),
        Section("Over-optimisation", overoptimisation.blocks(sweep), overoptimisation.ABOUT),
        Section(
            "Pair by pair, with the best setting",
            lost(best) if best else [],
            f"Held-out pairs of {best.name}: change in nats." if best else "",
        ),
        Section("Runs", [Table("runs", JOBS, jobs, digits=0)]),
        Section("What differs", [Table("config", names, differing)] if names else alike),
        Section("The numbers", [Table("meanings", NUMBERS, meanings)] if meanings else []),
    ]


def answer(sweep: Sweep) -> list[Note]:
    """Of each data which setting is best, whether that is significant, and what became of the good
    answers."""
    if not sweep.ranked:
        return [Note("No run has come to its numbers yet.")]
    return [Note(" ".join(said(sweep, ranked))) for ranked in sweep.rankings]


def said(sweep: Sweep, ranked: Sequence[Setting]) -> list[str]:
    best, quality = ranked[0], sweep.quality
    assert quality is not None
    where = f"{best.data}: " if len(sweep.rankings) > 1 else ""
    lines = [f"{where}Best by {quality}: {best.name}, {shown(best.values(quality).values())}."]
    for name in CAPABILITY:
        if name != quality and name in sweep.names:
            before = shown(best.values(name, "init").values())
            lines.append(f"{name} there: {shown(best.values(name).values())}, before {before}.")
    if kept(best) is False:
        lines.append(f"No setting kept capability within {LOSS} of that before training.")
    lines += runner_up(quality, *ranked[:2])
    moved = best.mean("displacement/chosen")
    if moved is not None:
        share = best.mean("displacement/rate")
        rate = "" if share is None else f"; {share:.0%} of pairs lost some"
        word = "lost" if moved < 0 else "gained"
        change = shown(best.values("displacement/chosen").values())
        lines.append(
            f"With the best, held-out chosen answers {word} log-probability in the mean: "
            f"{change} nats{rate}."
        )
    return lines


def runner_up(quality: str, best: Setting, second: Setting | None = None) -> list[str]:
    """How far the best is ahead of the next, in what ranks and in capability."""
    if second is None:
        return []
    lost = " (which lost capability)" if kept(second) is False else ""
    apart = verdict(less(best, second, quality))
    lines = [f"Next: {second.name}{lost}; {quality}: {apart}."]
    for name in CAPABILITY:
        found = less(best, second, name)
        if name != quality and len(found) > 1:
            lines.append(f"{name}: {verdict(found)}.")
    return lines


def verdict(apart: Sequence[float]) -> str:
    if len(apart) < 2:
        return "fewer than two seeds on the same data, so nothing can be said of significance"
    mean, half = interval(apart)
    word = "significant" if abs(mean) > half else "not significant"
    return f"difference {mean:+.3f} ± {half:.3f} over {len(apart)} seeds, {word} at 95%"


def shown(values: Any) -> str:
    found = [*values]
    return (cell(found) + (" (one seed)" if len(found) == 1 else "")) or "unknown"


def troubles(runs: Sequence[Run]) -> list[Note]:
    """Jobs that failed or wait, and files that could not be read."""
    counts: dict[str, int] = {}
    for run in runs:
        counts[run.state] = counts.get(run.state, 0) + 1
    states = ", ".join(f"{count} {state}" for state, count in sorted(counts.items()))
    known = [run for run in runs if run.config]  # one that was refused left none
    shared = [
        f"{group} {option}"
        for group, option in (known[0].choices.items() if known else ())
        if all(run.choices.get(group) == option and heeds(run, group) for run in known)
    ]
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in known}))
    alike = f" All: {', '.join(shared)}." if shared else ""
    alike += f" Seeds: {seeds}." if seeds else ""
    found = [Note(f"{len(runs)} runs: {states}.{alike}")]
    found += [Note(f"{run.name}: {run.error}", alarm=True) for run in runs if run.error]
    return found + [Note(f"{r.name}: {line}", alarm=True) for r in runs for line in r.problems]


def heeds(run: Run, group: str) -> bool:
    """Whether the option changes anything: a study reads few."""
    study = run.config.get("study")
    return not study or group in ("experiment", "problem", *study.get("reads", ()))


def ranking(sweep: Sweep) -> list[Table]:
    if not sweep.ranked:
        return []
    head = ["rank", "setting", "seeds", "capability"]
    for name in sweep.names:
        head += [name, "±"]
    head.append("training, seconds")
    rows = []
    placed = [(place, one) for some in sweep.rankings for place, one in enumerate(some, 1)]
    for place, setting in placed:
        word = {None: "", True: "kept", False: "lost"}[kept(setting)]
        row: list[Any] = [place, setting.name, len(setting.seeds), word]
        for name in sweep.names:
            values = [*setting.values(name).values()]
            mean, half = interval(values) if values else (None, None)
            row += [mean, half if half == half else None]
        took = [run.seconds["training"] for run in setting.runs if "training" in run.seconds]
        row.append(sum(took) / len(took) if took else None)
        rows.append(row)
    return [Table("ranking", head, rows, digits=3)]


def differences(sweep: Sweep) -> list[Any]:
    tables = []
    for best, *others in sweep.rankings:
        rows = []
        for other in others:
            apart = [less(best, other, name) for name in sweep.names]
            if any(len(values) > 1 for values in apart):
                rows.append([other.name, *map(starred, apart)])
        key = "differences" + f" {best.data}" * bool(tables)
        tables += [Table(key, [f"{best.name}, minus", *sweep.names], rows)] if rows else []
    return [*tables, Note("* the 95% interval does not hold zero.")] if tables else []


def own_loss(sweep: Sweep) -> list[Table]:
    """Held-out loss of each setting over its looks; none where it was looked at once."""
    rows = []
    for setting in sweep.settings:
        curve = setting.curve("eval/loss")
        if curve is not None and len(curve) > 1:
            first, last, lowest = (
                float(it) for it in (curve.iloc[0], curve.iloc[-1], curve.min())
            )
            rows.append([setting.name, first, last, last - first, lowest, int(curve.idxmin())])
    return [Table("own_loss", OWN_HEAD, rows)] if rows else []


def methods(sweep: Sweep) -> list[Any]:
    """The layout of the paper's table, where objectives ran bare and with SPO."""
    rows = []
    for setting in sweep.settings:
        for run in setting.runs:
            told = {k: str(v) for k, v in setting.told.items() if k not in ("loss", "solver")}
            words = {name: run.choices.get(name, "") for name in ("loss", "solver")}
            data = run.config.get("data")
            words["data.sft"] = str(data.get("sft")) if isinstance(data, dict) else ""
            rows.append(paper.Job(told | words, run.seed, run.init, run.final))
    found = []
    for part in paper.parts(rows)[0]:
        if (part.has(paper.CAPABILITY) or part.has(part.preference)) and any(
            base in part.methods and base + paper.SPO in part.methods
            for base in paper.BASES.values()
        ):
            head, cells = paper.cells(part)
            found.append(Note(part.name or "All runs:"))
            found.append(Table(f"methods {part.name}", head, cells))
            found += points(part, len(found))
    return found
