"""Several judges in, one out: what most of them say, or their mean, and how far they agree."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.evaluation.wins import Verdicts
from spo_lightning.judges.local import Asked, Judge, Scores, each_against_all


@dataclass(frozen=True)
class Panel:
    """Members that cannot tell do not vote."""

    members: Mapping[str, Judge]
    mean: bool

    @property
    def requests(self) -> int:
        return sum(judge.requests for judge in self.members.values())

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts:
        each = {name: judge.compare(rows, mine, theirs) for name, judge in self.members.items()}
        votes = {
            name: [win if self.mean or win is None else side(win) for win in found.wins]
            for name, found in each.items()
        }
        wins = [self._together(some) for some in zip(*votes.values())]
        mixed = [_any(some) for some in zip(*(found.contradicting for found in each.values()))]
        return Verdicts(wins, mixed, agreement({name: f.wins for name, f in each.items()}))

    def _together(self, votes: Sequence[float | None]) -> float | None:
        told = [vote for vote in votes if vote is not None]
        if not told:
            return None
        mean = sum(told) / len(told)
        return mean if self.mean else side(mean)

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        """By wins, as judges' scores have no common scale."""
        return each_against_all(self, rows, texts)


def _any(some: Sequence[bool | None]) -> bool | None:
    told = [one for one in some if one is not None]
    return any(told) if told else None


def side(win: float) -> float:
    """1, 0.5 or 0: who is named."""
    return (win > 0.5) + (win == 0.5) / 2


def agreement(wins: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Cohen's kappa of every two members, where both can tell."""
    found = {}
    for (one, mine), (other, theirs) in combinations(wins.items(), 2):
        told = [(a, b) for a, b in zip(mine, theirs) if a is not None and b is not None]
        both = [(side(a), side(b)) for a, b in told]
        if both:
            found[f"judge/kappa/{one}/{other}"] = kappa(both)
    return found


def kappa(both: Sequence[tuple[float, float]]) -> float:
    """Agreement above that of chance (Cohen 1960): 1 is complete, 0 is what chance gives."""
    count = len(both)
    same = sum(a == b for a, b in both) / count
    one, other = zip(*both)
    chance = sum(one.count(value) * other.count(value) for value in {*one, *other}) / count**2
    return 1.0 if chance == 1 else (same - chance) / (1 - chance)


def panel(asked: Asked, *, members: Mapping[str, Callable[[Asked], Any]], mean: bool) -> Judge:
    """``members``: judges by name, as their own options of ``judge`` make them."""
    if len(members) < 2:
        raise UserError(
            "judge.members: name two judges at least, +judge@judge.members.NAME=OPTION"
        )
    judges = {name: make(asked) for name, make in members.items()}
    for name, judge in judges.items():
        if judge is None:
            raise UserError(f"judge.members.{name}: this data has no judge: choose another")
    return Panel(judges, mean)
