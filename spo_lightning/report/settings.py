"""Runs in; settings, which differ in more than their seed, ranked by what they came to, out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from spo_lightning.report.reading import Run
from spo_lightning.report.table import label, told_apart

# which number ranks, the first that the runs have; more is better
QUALITY = ("win_rate", "exact_match", "rougeL", "preference/accuracy", "rewards/accuracies")
CAPABILITY = ("exact_match", "rougeL")
LOSS = 0.02  # of capability against init, above which a setting is not ranked first
SHOWN = (
    *("exact_match", "win_rate", "rougeL", "preference/accuracy", "rewards/accuracies"),
    *("rewards/margins", "nll/chosen", "displacement/rate", "displacement/chosen"),
)

MEANINGS = {
    "exact_match": "share of prompts whose greedy answer is right; more is better",
    "win_rate": "how often a sampled answer beats one of the policy before training, by the "
    "data's judge, ties half; more is better",
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
    runs: Sequence[Run]

    @property
    def name(self) -> str:
        return label(self.told)

    def values(self, number: str, when: str = "final") -> dict[int, float]:
        """By seed."""
        found = ((run.seed, getattr(run, when)) for run in self.runs)
        return {seed: numbers[number] for seed, numbers in found if number in numbers}

    def mean(self, number: str) -> float | None:
        values = [*self.values(number).values()]
        return sum(values) / len(values) if values else None


@dataclass(frozen=True)
class Sweep:
    """The runs of a page."""

    runs: Sequence[Run]

    @cached_property
    def settings(self) -> list[Setting]:
        """What did not come to its numbers is left out."""
        done = [run for run in self.runs if run.final and run.config]
        apart = told_apart([(run.path, {"choices": run.choices}, run.config) for run in done])
        found: dict[str, tuple[dict[str, Any], list[Run]]] = {}
        for run in done:
            told = apart[run.path]
            found.setdefault(label(told), (told, []))[1].append(run)
        return [Setting(*both) for both in found.values()]

    @cached_property
    def names(self) -> list[str]:
        """Held-out numbers that some run has, in the order of ``SHOWN``."""
        return [n for n in SHOWN if any(setting.values(n) for setting in self.settings)]

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
    if one.told.get("data") != other.told.get("data"):
        return []
    left, right = one.values(number), other.values(number)
    return [left[seed] - right[seed] for seed in sorted(left.keys() & right.keys())]
