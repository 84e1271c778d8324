"""Runs in; settings, which differ in more than their seed, ranked by what they came to, out.

A number of a setting is a mean over its seeds with the 95% interval of Student's t; two settings
are compared at the seeds that both have.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations
from typing import Any

from spo_lightning.records.directory import IDLE
from spo_lightning.report.reading import Run

# which number ranks, the first that the runs have; more is better
QUALITY = (
    "hypervolume",
    "pearson",
    "win_rate",
    "exact_match",
    "rougeL",
    "preference/accuracy",
    "rewards/accuracies",
)
CAPABILITY = ("exact_match", "rougeL")
LOSS = 0.02  # of capability against init, above which a setting is not ranked first
# whose options tell settings apart
GROUPS = ("problem", "data", "model", "loop", "loss", "solver")
# two-sided 95% points of Student's t by degrees of freedom
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179)

MEANINGS = {  # of the numbers shown, in their order
    "hypervolume": "of designs drawn with guidance, measured by the problem; more is better",
    "hypervolume/unguided": "of designs drawn without guidance",
    "hypervolume/data": "of the best designs that were known",
    "hypervolume/surrogate": "of a search on a learned surrogate",
    "hypervolume/random": "of designs drawn at random",
    "diversity": "mean distance of two designs proposed with guidance, in scaled objectives",
    "spread": "how uneven their gaps are; less is better",
    "pearson": "correlation of the surrogate's margins with the true log-ratios of held-out "
    "pairs, the mean over methods",
    "exact_match": "share of prompts whose greedy answer is right; more is better",
    "win_rate": "how often a sampled answer beats one of the policy before training, by the "
    "data's judge, ties half; more is better",
    "images/frechet_distance": "of drawn images from the task's pictures, on features of a small "
    "classifier that was trained on these; less is better",
    "rougeL": "overlap of the greedy answer with the reference; more is better",
    "preference/accuracy": "share of pairs whose chosen answer is the likelier one",
    "rewards/accuracies": "share of pairs whose chosen answer gained more than the rejected one",
    "rewards/margins": "gain of the chosen answer over the reference minus that of the rejected "
    "one, times beta",
    "nll/chosen": "negative log-probability of the chosen answers; less is better",
    "displacement/rate": "share of pairs whose chosen answer is less likely than under the "
    "reference",
    "displacement/chosen": "change of log pi(y_w), the log-probability of the chosen answers, "
    "against the reference; below 0 it was lost to other answers",
}


@dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed only."""

    told: Mapping[str, Any]  # what tells it from the others
    runs: Sequence[Any]  # of reading.Run, or of whatever has its choices, seed, init and final

    @property
    def name(self) -> str:
        return label(self.told)

    @property
    def data(self) -> str:
        choices = self.runs[0].choices
        return choices.get("problem") or choices.get("data", "given")

    @property
    def seeds(self) -> set[int]:
        return {run.seed for run in self.runs}

    def values(self, number: str, when: str = "final") -> dict[int, float]:
        """By seed."""
        found = ((run.seed, getattr(run, when)) for run in self.runs)
        return {seed: numbers[number] for seed, numbers in found if number in numbers}

    def mean(self, number: str) -> float | None:
        values = [*self.values(number).values()]
        return sum(values) / len(values) if values else None

    def curve(self, name: str) -> Any:
        """A column of metrics.csv, the mean over seeds at steps that all of them logged; None
        where none did."""
        import pandas as pd

        every = [c for run in self.runs if (c := run.curves.get(name)) is not None]
        return pd.concat(every, axis=1, join="inner").mean(axis=1) if every else None


@dataclass(frozen=True)
class Sweep:
    """The runs of a page."""

    runs: Sequence[Run]

    @cached_property
    def settings(self) -> list[Setting]:
        """What did not come to its numbers is left out."""
        done = [run for run in self.runs if run.finished]
        found: dict[str, Setting] = {}
        for run, told in zip(done, told_apart(done)):
            setting = found.get(label(told), Setting(told, []))
            found[label(told)] = Setting(told, [*setting.runs, run])
        return list(found.values())

    @cached_property
    def names(self) -> list[str]:
        """Held-out numbers that some run has."""
        return [n for n in MEANINGS if any(setting.values(n) for setting in self.settings)]

    @cached_property
    def quality(self) -> str | None:
        return next((name for name in QUALITY if name in self.names), None)

    @cached_property
    def ranked(self) -> list[Setting]:
        """By quality; a setting that lost capability comes after those that kept it."""
        quality = self.quality
        if quality is None:
            return []
        some = [setting for setting in self.settings if setting.mean(quality) is not None]
        return sorted(some, key=lambda s: (kept(s) is not False, s.mean(quality)), reverse=True)

    @cached_property
    def rankings(self) -> list[list[Setting]]:
        """One for each data: numbers of one say nothing of another's."""
        every = dict.fromkeys(setting.data for setting in self.settings)
        found = ([one for one in self.ranked if one.data == data] for data in every)
        return [some for some in found if some]


def told_apart(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Per run what distinguishes it besides its seed: options of groups, then keys."""
    leaves = [dotted(_telling(run.config)) for run in runs]
    chosen = [{group: run.choices.get(group) for group in GROUPS} for run in runs]
    groups = [group for group in GROUPS if len({options[group] for options in chosen}) > 1]
    follows = {  # keys that have the run's seed wherever they stand, such as sft.seed
        name
        for name in set().union(*leaves)
        if all(found.get(name, run.seed) == run.seed for found, run in zip(leaves, runs))
    }
    alike: dict[str, list[int]] = {}  # another option brings other keys, which tell nothing more
    for place, options in enumerate(chosen):
        alike.setdefault(repr(options), []).append(place)
    told = [{group: options[group] for group in groups} for options in chosen]
    for places in alike.values():
        columns: dict[tuple[str, ...], str] = {}
        for name in sorted(set().union(*(leaves[place] for place in places)) - follows):
            column = tuple(repr(leaves[place].get(name)) for place in places)
            if len(set(column)) > 1:  # of keys that vary alike, as solver.beta does, the first
                columns.setdefault(column, name)
        for place in places:
            told[place] |= {name: leaves[place].get(name) for name in columns.values()}
    return told


def _telling(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a configuration decides numbers."""
    hardware = config.get("hardware")
    precision = hardware.get("precision") if isinstance(hardware, dict) else None
    kept = {key: value for key, value in config.items() if key not in IDLE}
    return kept | ({"hardware": {"precision": precision}} if precision else {})


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, sub in tree.items()
        for name, leaf in dotted(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def label(told: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in told.items()) or "run"


def kept(setting: Setting) -> bool | None:
    """Whether capability is within ``LOSS`` of that before training; None where unmeasured."""
    for name in CAPABILITY:
        before, after = setting.values(name, "init"), setting.values(name)
        both = [after[seed] - before[seed] for seed in after if seed in before]
        if both:
            return sum(both) / len(both) >= -LOSS
    return None


def less(one: Setting, other: Setting, number: str) -> list[float]:
    """Differences at the seeds that both have; none between data that differ."""
    if one.data != other.data:
        return []
    left, right = one.values(number), other.values(number)
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and the half width of its 95% interval (Student's t); nan for one value."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
    t = T95[min(len(values) - 2, len(T95) - 1)]
    return mean, t * math.sqrt(variance / len(values))


def cell(values: Iterable[float], form: str = ".3f") -> str:
    """A mean and its 95% interval, where there are values."""
    found = [*values]
    if not found:
        return ""
    mean, half = interval(found)
    return f"{mean:{form}}" + ("" if math.isnan(half) else f" ± {half:.3f}")


def starred(apart: Sequence[float]) -> str:
    """A mean difference, with a star where it is significant; one seed alone says nothing."""
    if len(apart) < 2:
        return ""
    mean, half = interval(apart)
    return cell(apart, "+.3f") + (" *" if abs(mean) > half else "")


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Lines of a table in Markdown."""
    every = [[str(cell).replace("|", "\\|") for cell in cells] for cells in (head, *rows)]
    lines = [f"| {' | '.join(cells)} |" for cells in every]
    return [lines[0], "|---" * len(head) + "|", *lines[1:]]


def markdown(sweep: Sweep) -> str:
    """Per setting the mean and 95% interval over seeds, then differences by seed."""
    head = ["run", "seeds", *sweep.names]
    rows = []
    for data in sorted({setting.data for setting in sweep.settings}, reverse=True):
        every = [run for one in sweep.settings if one.data == data for run in one.runs]
        before = _row(f"init (data={data})", Setting({}, every), sweep.names, "init")
        rows += [before] if any(before[2:]) else []  # a study begins with none
    rows += [_row(setting.name, setting, sweep.names, "final") for setting in sweep.settings]
    lines = table(head, rows)
    apart = []
    for one, other in combinations(sweep.settings, 2):
        seeds = len(one.seeds & other.seeds)
        if seeds > 1 and one.data == other.data:
            cells = [cell(less(other, one, name)) for name in sweep.names]
            apart.append([f"{other.name} less {one.name}", seeds, *cells])
    if apart:
        lines += ["", "Differences between runs of the same seed, mean and 95% interval:", ""]
        lines += table(head, apart)
    return "\n".join(lines) + "\n"


def _row(name: str, some: Setting, numbers: Sequence[str], when: str) -> list[Any]:
    return [name, len(some.seeds), *(cell(some.values(n, when).values()) for n in numbers)]
