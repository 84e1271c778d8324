"""Which design is preferred, and what a set of them is worth: by hand."""

import numpy as np
import pytest
import torch

from spo_lightning.design.measures import diversity, hypervolume, spread
from spo_lightning.design.offline import Collecting
from spo_lightning.design.order import Order
from spo_lightning.design.preference import pairs
from spo_lightning.design.problem import Problem
from spo_lightning.errors import UserError

# four of a front, one that only the second and third dominate, one that all of these do
OBJECTIVES = np.array([[0.0, 10], [1, 6], [4, 3], [10, 0], [5, 7], [11, 11]])
# the spans are 10 and 10; of the second (4 - 0) / 10 and (10 - 3) / 10, in the mean 0.55; of the
# third (10 - 1) / 10 and (6 - 0) / 10, in the mean 0.75; ends are infinitely lonely, and for pymoo
# a front of one has no span
CROWDING = [np.inf, 0.55, 0.75, np.inf, 0, 0]


def zdt1(**more):
    known = {"variables": 4, "objectives": None, "generations": 8, "amateur": 0.45}
    return Problem(**{"name": "zdt1", **known, **more})


def test_ranks_and_crowding_by_hand():
    order = Order.of(OBJECTIVES)
    assert order.rank.tolist() == [0, 0, 0, 0, 1, 2]
    np.testing.assert_allclose(order.crowding, CROWDING)
    assert order.best_first.tolist() == [0, 3, 2, 1, 4, 5]


@pytest.mark.parametrize(
    "first, second, threshold, told",
    [
        (1, 4, 0.0, 1),  # a better front
        (4, 1, 0.0, -1),
        (4, 5, 100.0, 1),  # whatever the threshold
        (2, 1, 0.0, 1),  # the lonelier of one front
        (1, 2, 0.0, -1),
        (1, 2, 0.74, -1),
        (1, 2, 0.75, 0),  # not above the threshold
        (0, 3, 0.0, 0),  # equals
        (2, 2, 0.0, 0),
    ],
)
def test_preferences_by_hand(first, second, threshold, told):
    found = Order.of(OBJECTIVES).prefers(np.array([first]), np.array([second]), threshold)
    assert found.tolist() == [told]


def test_pairs_have_the_preferred_one_first():
    order = Order.of(OBJECTIVES)
    better, worse = pairs(order, 500, 0.0, torch.Generator().manual_seed(0))
    assert 300 < len(better) == len(worse) < 500  # 8 of 36 are equals
    assert (order.prefers(better.numpy(), worse.numpy(), 0.0) == 1).all()


def test_numbers_by_hand():
    """Two boxes up to 2.2: 2.2 * 1.2 each, less 1.2 * 1.2 that both have."""
    ends = np.array([[0.0, 1], [1, 0]])
    assert hypervolume(ends, 2.2) == pytest.approx(2 * 2.2 * 1.2 - 1.2**2)
    assert hypervolume(np.array([[3.0, 3]]), 2.2) == 0
    cube = np.array([[0.0, 0, 0]])
    assert hypervolume(cube, 2.0) == pytest.approx(8)
    assert diversity(ends) == pytest.approx(2**0.5)
    even, uneven = np.array([[0.0, 2], [1, 1], [2, 0]]), np.array([[0.0, 4], [1, 3], [4, 0]])
    assert spread(even) == pytest.approx(0)
    # gaps of 1 and 3 (times the root of 2) around 2: |1 - 2| + |3 - 2| over 4
    assert spread(uneven) == pytest.approx(0.5)


def test_the_top_of_the_ranking_is_not_known():
    problem = zdt1()
    how = {"population": 40, "held_out": 0.1}
    every = Collecting(rows=300, left_out=0.0, **how).of(problem, 3)
    known = Collecting(rows=300, left_out=0.4, **how).of(problem, 3)
    assert (len(every.designs), len(known.designs), known.held_out) == (300, 180, 18)
    best = every.best(120)
    gone = {tuple(row) for row in every.designs[best]}
    assert not gone & {tuple(row) for row in known.designs}
    np.testing.assert_allclose(problem.measured(known.designs), known.objectives)
    scaled = known.scaled(known.objectives)
    assert (scaled.min(0) == 0).all() and (scaled.max(0) == 1).all()
    again = Collecting(rows=300, left_out=0.4, **how).of(problem, 3)
    assert (again.designs == known.designs).all()


def test_constraints_are_one_objective_more():
    """A welded beam at its thickest bends and breaks nothing, but costs most."""
    beam = zdt1(name="welded_beam", variables=None)
    found = beam.measured(np.array([[1.0, 1, 1, 1], [-1, -1, -1, -1]]))
    assert found.shape == (2, 3)
    assert found[0, 0] > found[1, 0] and found[0, 2] == 0 and found[1, 2] > 0


@pytest.mark.parametrize(
    "more, told",
    [
        ({"name": "nope"}, "problem.name=nope: pymoo has no such problem"),
        ({"name": "sphere"}, "problem.name=sphere: it needs two objectives"),
        ({"objectives": 5}, "no such problem with {'n_var': 4, 'n_obj': 5}"),
    ],
)
def test_problems_that_cannot_be_are_refused_in_a_line(more, told):
    with pytest.raises(UserError) as refused:
        zdt1(**more)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_too_few_designs_are_refused():
    with pytest.raises(UserError, match="study.data.rows=12 leaves"):
        Collecting(rows=12, left_out=0.4, population=12, held_out=0.1).of(zdt1(), 0)
