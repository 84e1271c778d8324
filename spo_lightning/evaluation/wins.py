"""Verdicts on two answers to each prompt in, win rates out: raw and at equal length, in intervals.

Who gave the verdicts is not known here. A rate at equal length is AlpacaEval 2's (Dubois et al.
2404.04475), a logistic regression of the verdict on the difference of lengths, without its term
for the difficulty of each instruction, and with lengths in tokens.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from numpy import ndarray

DRAWS, FITTED = 1_000, 400  # of the bootstrap over prompts; those that a regression is fitted to
SEED = 0
FOLDS = 5  # that choose the strength of the l1 penalty, as there
STRENGTHS = (-4, 4, 10)  # from 1e-4 to 1e4 in ten
NEWTON, NEAR = 40, 1e-9  # steps at most, and the change that ends them


class Verdicts(NamedTuple):
    """What a judge says of each prompt's two answers."""

    wins: Sequence[float | None]  # of the first: 1, a tie 0.5, or a share; None: it cannot tell
    # whether it named another answer when they changed places; None: places make no difference
    contradicting: Sequence[bool | None]
    numbers: dict[str, float] = {}  # what else it tells of itself


class Comparing(Protocol):
    """A judge of two answers to each row's prompt."""

    @property
    def requests(self) -> int:
        """To an endpoint, for one row."""
        ...

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts: ...


class Against(NamedTuple):
    """What held-out answers are compared with, and who compares them."""

    texts: Sequence[str]
    judge: Comparing

    def told(self, rows: int, looks: int) -> str:
        """What so many looks at so many prompts take."""
        asks = self.judge.requests * rows * looks
        told = f"{rows} held-out prompts, answered and judged {looks} times"
        return f"{told}: {asks:,} requests at most" if asks else told


class Judged(NamedTuple):
    """Answers and their rivals, judged."""

    answers: Sequence[str]
    rivals: Sequence[str]
    verdicts: Verdicts
    lengths: Sequence[tuple[int, int]]  # tokens of both
    prompts: Sequence[Any]  # what stands for the prompt of each

    def numbers(self, places: Sequence[int]) -> dict[str, float]:
        """Of these prompts; without a rate where the judge could tell of none."""
        wins, mixed = self.verdicts.wins, self.verdicts.contradicting
        told = [
            (w, *self.lengths[place], self.prompts[place])
            for place in places
            if (w := wins[place]) is not None
        ]
        found = rates(*zip(*told)) if told else {}
        asked = [it for place in places if (it := mixed[place]) is not None]
        if asked:
            found["judge/contradicting"] = sum(asked) / len(asked)
        if len(told) < len(places):
            found["judge/silent"] = 1 - len(told) / len(places)
        if len(places) == len(wins):  # a judge tells of itself over all that it was asked
            found |= self.verdicts.numbers
        return found


def rates(
    wins: Sequence[float], mine: Sequence[int], theirs: Sequence[int], prompts: Sequence[Any]
) -> dict[str, float]:
    """Win rates with their 95% intervals, and mean lengths. Rows that share a prompt are drawn
    together, as they are no two prompts."""
    import numpy as np

    count, chance = len(wins), np.random.default_rng(SEED)
    won, apart = np.array(wins, float), np.array(mine, float) - np.array(theirs, float)
    places = {prompt: place for place, prompt in enumerate(dict.fromkeys(prompts))}
    of, some = np.array([places[prompt] for prompt in prompts]), len(places)  # [n]
    drawn = chance.multinomial(some, np.full(some, 1 / some), DRAWS).astype(float)[:, of]
    # the plain sum: a rate of halves and wholes is then exact
    found = {"win_rate": sum(wins) / count}
    found |= _interval("win_rate", drawn @ won / drawn.sum(1))
    spread = apart.std()
    if spread:
        x = np.tanh(apart / spread)
        strength = _chosen(x, won, of) if some >= 2 * FOLDS else np.ones(1)
        (whole,) = _level(x, won, np.ones((1, count)), strength)
        found["win_rate_controlled"] = float(whole)
        found |= _interval("win_rate_controlled", _level(x, won, drawn[:FITTED], strength))
    return found | {
        "tokens/answer": sum(mine) / count,
        "tokens/rival": sum(theirs) / count,
    }


def _interval(name: str, drawn: "ndarray") -> dict[str, float]:
    import numpy as np

    low, high = np.percentile(drawn, [2.5, 97.5])
    return {f"{name}_low": float(low), f"{name}_high": float(high)}


def _level(x: "ndarray", won: "ndarray", weights: "ndarray", strength: Any) -> "ndarray":
    """[m] the rate at equal length, where x is 0."""
    import numpy as np

    return 1 / (1 + np.exp(-_fitted(x, won, weights, strength)[:, 0]))


def _chosen(x: "ndarray", won: "ndarray", of: "ndarray") -> "ndarray":
    """[1] the strength under which the folds of prompts that were left out are likeliest."""
    import numpy as np

    strengths = np.logspace(*STRENGTHS)
    fold = np.random.default_rng(SEED).permutation(of.max() + 1)[of] % FOLDS
    losses = np.zeros(len(strengths))
    for out in (fold == number for number in range(FOLDS)):
        weights = np.tile((~out).astype(float), (len(strengths), 1))
        level, slope = _fitted(x, won, weights, strengths).T
        score = level[:, None] + slope[:, None] * x[out]
        losses += (np.logaddexp(0, score) - won[out] * score).sum(1)
    return strengths[[losses.argmin()]]


def _fitted(x: "ndarray", won: "ndarray", weights: "ndarray", strength: Any) -> "ndarray":
    """[m, 2] level and slope of least |slope| + strength * logistic loss, for each of the
    ``weights`` [m, n], by Newton's steps whose quadratic keeps the penalty as it is."""
    import numpy as np

    found, columns = np.zeros((len(weights), 2)), np.stack([np.ones_like(x), x])
    for _ in range(NEWTON):
        share = 1 / (1 + np.exp(-(found @ columns)))
        slope = (weights * (share - won)) @ columns.T  # [m, 2]
        bend = weights * share * (1 - share)
        level, cross, along = bend.sum(1), bend @ x, bend @ (x * x)
        curve = np.stack([level, along], 1) + 1e-6  # where all is certain, no step is endless
        step = found.copy()
        for at in [0, 1] * 15:  # one coordinate at a time, the other held
            pull = slope[:, at] + cross * (step - found)[:, 1 - at]
            aim = found[:, at] - pull / curve[:, at]
            # AlpacaEval's is on the level too: with few prompts it then is one half, and surely so
            least = at / (strength * curve[:, at])
            step[:, at] = np.sign(aim) * np.maximum(np.abs(aim) - least, 0)
        moved = np.clip(step - found, -2, 2)  # a full step may leap where the loss is flat
        found = found + moved
        if np.abs(moved).max() < NEAR:
            break
    return found
