"""Win rates against hand-worked numbers, and length control against a truth that is known."""

import numpy as np
import pytest

from spo_lightning.evaluation.wins import Judged, Verdicts, _fitted, rates
from spo_lightning.judges.local import ByScore


def test_one_text_twice_is_a_tie_however_its_scores_round():
    rounded = iter([[1.0, 2.0, float("nan")], [1.0 + 1e-7, 3.0, 1.0]])
    judge = ByScore(lambda rows, texts: next(rounded))
    assert judge.compare([{}] * 3, ["a", "b", "c"], ["a", "x", "y"]).wins == [0.5, 0.0, None]


def test_ties_count_half_and_the_silent_do_not_count():
    wins = [1.0, 0.5, 0.0, None, 1.0]
    lengths = [(5, 3), (2, 2), (3, 7), (9, 9), (2, 4)]
    verdicts = Verdicts(wins, [True, False, None, None, None])
    found = Judged("abcde", "vwxyz", verdicts, lengths, "pqrst")
    numbers = found.numbers(range(5))
    assert numbers["win_rate"] == 2.5 / 4
    assert (numbers["tokens/answer"], numbers["tokens/rival"]) == (3.0, 4.0)
    assert numbers["judge/silent"] == pytest.approx(0.2)
    assert numbers["judge/contradicting"] == 0.5
    assert numbers["win_rate_low"] < 2.5 / 4 < numbers["win_rate_high"]
    assert found.numbers([0, 4])["win_rate"] == 1.0
    assert found.numbers([3]) == {"judge/silent": 1.0}
    told = Verdicts([1.0, 0.0], [None, None], {"judge/kappa/a/b": 0.3})
    found = Judged("ab", "cd", told, [(1, 1), (1, 1)], "pq")
    assert found.numbers([0, 1])["judge/kappa/a/b"] == 0.3
    assert "judge/kappa/a/b" not in found.numbers([0])
    even = rates([1.0, 0.0], [3, 3], [3, 3], "pq")  # no length differs: nothing is controlled for
    assert "win_rate_controlled" not in even


def test_the_interval_is_the_bootstraps():
    """Of a share of 200 it is that of the binomial, which is known."""
    wins = [1.0] * 120 + [0.0] * 80
    found = rates(wins, [1] * 200, [1] * 200, range(200))
    spread = 1.96 * (0.6 * 0.4 / 200) ** 0.5
    assert found["win_rate_low"] == pytest.approx(0.6 - spread, abs=0.01)
    assert found["win_rate_high"] == pytest.approx(0.6 + spread, abs=0.01)
    assert rates(wins, [1] * 200, [1] * 200, range(200)) == found


def test_rows_that_share_a_prompt_are_drawn_together():
    """Each of 50 prompts four times over tells no more than once: the interval of 50, not of 200.
    A prompt with more rows weighs more, in the rate and in every draw of it."""
    wins = [1.0] * 30 + [0.0] * 20
    once = rates(wins, [1] * 50, [1] * 50, range(50))
    fourfold = rates(wins * 4, [1] * 200, [1] * 200, [*range(50)] * 4)
    for end in ("win_rate", "win_rate_low", "win_rate_high"):
        assert fourfold[end] == pytest.approx(once[end])
    apart = rates(wins * 4, [1] * 200, [1] * 200, range(200))
    wide, narrow = (it["win_rate_high"] - it["win_rate_low"] for it in (fourfold, apart))
    assert 1.6 * narrow < wide < 2.4 * narrow  # twice, but for steps of a row and of a prompt
    uneven = rates([1.0] * 9 + [0.0], [1] * 10, [1] * 10, ["a"] * 9 + ["b"])
    assert (uneven["win_rate"], uneven["win_rate_low"], uneven["win_rate_high"]) == (0.9, 0.0, 1.0)


def test_a_controlled_rate_has_its_interval_over_prompts_too():
    chance = np.random.default_rng(1)
    wins = [*map(float, chance.random(40) < 0.6)]
    mine = [*map(int, chance.integers(5, 50, 40))]
    once = rates(wins, mine, [20] * 40, range(40))
    fourfold = rates(wins * 4, mine * 4, [20] * 160, [*range(40)] * 4)
    width = "win_rate_controlled_high", "win_rate_controlled_low"
    one, four = (it[width[0]] - it[width[1]] for it in (once, fourfold))
    assert four > 0.8 * one


@pytest.mark.parametrize("strength", [0.05, 1.0, 100.0])
def test_the_regression_is_at_its_least(strength):
    """No neighbour is lower, at kinks of the penalty and away from them."""
    chance = np.random.default_rng(0)
    x, won = np.tanh(chance.normal(0.5, 1, 60)), chance.choice([0.0, 0.5, 1.0], 60)
    weights = np.stack([np.ones(60), chance.multinomial(60, np.full(60, 1 / 60))])

    def cost(at, weights):
        score = at[0] + at[1] * x
        losses = np.logaddexp(0, score) - won * score
        return abs(at[1]) + strength * (weights * losses).sum()

    for found, some in zip(_fitted(x, won, weights.astype(float), np.array([strength])), weights):
        near = [found + step * chance.normal(size=2) for step in (1e-1, 1e-2, 1e-3, 1e-4) * 50]
        assert min(cost(at, some) for at in near) >= cost(found, some) - 1e-9
    if strength == 100.0:
        assert abs(found).min() > 1e-3


def test_without_a_penalty_it_is_the_plain_one():
    """Two lengths, so two shares, which a logistic regression meets exactly."""
    x = np.array([0.0] * 40 + [0.5] * 40)
    won = np.array([1.0] * 10 + [0.0] * 30 + [1.0] * 30 + [0.0] * 10)
    (level, slope) = _fitted(x, won, np.ones((1, 80)), np.array([1e9]))[0]
    assert 1 / (1 + np.exp(-level)) == pytest.approx(0.25, abs=1e-6)
    assert 1 / (1 + np.exp(-(level + slope / 2))) == pytest.approx(0.75, abs=1e-6)


def test_a_few_verdicts_leave_the_controlled_rate_unsure():
    chance = np.random.default_rng(3)
    wins = [float(one) for one in chance.random(24) < 0.55]
    found = rates(wins, [*map(int, chance.integers(5, 50, 24))], [20] * 24, range(24))
    assert found["win_rate_controlled_high"] - found["win_rate_controlled_low"] > 0.25
    all_won = rates([1.0] * 24, [*range(24)], [10] * 24, range(24))
    assert all_won["win_rate_controlled_low"] > 0.999


@pytest.mark.parametrize("better", [0.0, 0.3, 0.8])
def test_length_alone_raises_the_raw_rate_and_not_the_controlled_one(better):
    """A judge that loves length, of answers that are longer and ``better`` by so much. The truth
    is what it would say at equal length."""
    truth, inside, raw = 1 / (1 + np.exp(-better)), 0, []
    for seed in range(20):
        chance = np.random.default_rng(seed)
        theirs = chance.integers(20, 120, 300)
        mine = np.maximum(1, theirs + chance.normal(30, 30, 300).round().astype(int))
        x = np.tanh((mine - theirs) / (mine - theirs).std())
        likes = chance.random(300) < 1 / (1 + np.exp(-(better + 2.0 * x)))
        found = rates([*map(float, likes)], [*map(int, mine)], [*map(int, theirs)], range(300))
        raw.append(found["win_rate"])
        low, high = found["win_rate_controlled_low"], found["win_rate_controlled_high"]
        inside += low <= truth <= high
        assert high - low < 0.35
    assert min(raw) > truth + 0.1
    assert inside >= 17  # of 20, where 19 are expected
