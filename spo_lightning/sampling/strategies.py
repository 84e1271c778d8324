"""A prompt's answers and their scores in, the pairs to train on out: places (chosen, rejected).

A new strategy is a function here and a yaml in ``conf/strategy``. Equal texts are one answer;
answers without a score take no part; ``chance`` is the prompt's own.
"""

import math
import random
from collections.abc import Sequence

Scores = Sequence[float | None]
Places = list[tuple[int, int]]


def best_worst(texts: Sequence[str], scores: Scores, chance: random.Random) -> Places:
    """The answer of highest score against that of lowest; none where all are alike."""
    told = _distinct(texts, scores)
    if not told:
        return []
    best, worst = max(told, key=lambda n: scores[n]), min(told, key=lambda n: scores[n])  # type: ignore
    return [(best, worst)] if scores[best] != scores[worst] else []


def right_wrong(texts: Sequence[str], scores: Scores, chance: random.Random) -> Places:
    """A random answer with a score above 0 against a random one without."""
    told = _distinct(texts, scores)
    right = [n for n in told if scores[n] > 0]  # type: ignore[operator]
    wrong = [n for n in told if scores[n] <= 0]  # type: ignore[operator]
    return [(chance.choice(right), chance.choice(wrong))] if right and wrong else []


def all_pairs(texts: Sequence[str], scores: Scores, chance: random.Random, *, most: int) -> Places:
    """Every answer against every one of lower score; ``most`` at random where there are more."""
    told = _distinct(texts, scores)
    found = [(a, b) for a in told for b in told if scores[a] > scores[b]]  # type: ignore[operator]
    return found if len(found) <= most else sorted(chance.sample(found, most))


def rejection(
    texts: Sequence[str], scores: Scores, chance: random.Random, *, keep: int, beta: float
) -> Places:
    """Answers accepted by statistical rejection sampling, two by two. Liu et al. 2309.06657."""
    told = {place: score for place, score in enumerate(scores) if score is not None}
    places = [*told]
    kept = [places[n] for n in accepted([*told.values()], chance, keep, beta)]
    chance.shuffle(kept)  # those of high score came first
    both = zip(kept[::2], kept[1::2])
    ordered = [(a, b) if told[a] > told[b] else (b, a) for a, b in both]
    return [(a, b) for a, b in ordered if told[a] != told[b] and texts[a] != texts[b]]


def accepted(rewards: Sequence[float], chance: random.Random, keep: int, beta: float) -> list[int]:
    """Places of ``keep`` candidates, or of all, as the policy that is proportional to theirs times
    exp(reward / beta) would give them; ``beta`` 0: the highest. Algorithm 1 of the same paper.

    Sweep by sweep: the highest reward that is left is fixed, and each candidate that is left is
    accepted with probability exp((reward - highest) / beta), until there are enough.
    """
    left, found = list(range(len(rewards))), []
    if beta == 0:
        return sorted(left, key=lambda place: -rewards[place])[:keep]
    while left and len(found) < keep:
        highest, rest = max(rewards[place] for place in left), []
        for place in left:
            share = math.exp((rewards[place] - highest) / beta)
            took = len(found) < keep and chance.random() < share
            (found if took else rest).append(place)
        left = rest
    return found


def _distinct(texts: Sequence[str], scores: Scores) -> list[int]:
    """Places of the first of equal texts that have a score."""
    first: dict[str, int] = {}
    for place, (text, score) in enumerate(zip(texts, scores)):
        if score is not None:
            first.setdefault(text, place)
    return list(first.values())
