"""Two answers in, the share of a saved ranker's odds that the first has out: in both orders."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from spo_lightning.data.chat import as_asked
from spo_lightning.errors import UserError
from spo_lightning.evaluation.wins import Verdicts
from spo_lightning.judges.local import Asked, Judge, Scores, each_against_all
from spo_lightning.models.policy import Policy
from spo_lightning.models.rankers import preferences


@dataclass(frozen=True)
class Ranker:
    """``model``: what ``loss=ranker`` has trained."""

    model: Policy
    asked: Asked
    requests: int = 0

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts:
        """Equal answers are a tie; none of what is empty or does not fit beside the other."""
        triples = []
        for row, *both in zip(rows, mine, theirs):
            one, other = (as_asked(row["prompt"], text) for text in both)
            triples.append((row["prompt"], one, other))
        how = {"max_length": self.asked.max_length, "batch_size": self.asked.batch_size}
        with self.asked.precision():
            odds = preferences(self.model, triples, **how)
        wins: Scores = []
        for it, a, b in zip(odds, mine, theirs):
            wins.append(0.5 if a == b else None if it is None else (1 + math.tanh(it / 2)) / 2)
        return Verdicts(wins, [None] * len(wins))

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return each_against_all(self, rows, texts)


def ranker(asked: Asked, *, model: str) -> Judge:
    """A pairwise ranker, RSO's (2309.06657)."""
    opened = asked.opened(model)
    if opened.template is None:
        raise UserError(f"judge.model={model} is no ranker: train one with loss=ranker")
    return Ranker(opened, asked)
