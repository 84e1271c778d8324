"""A problem in; the designs that are known of it, the best of them left out, out.

As Off-MOO-Bench (Xue et al. 2024, 2406.03722) made its data: a genetic search (NSGA-II) that in
some generations keeps its worst instead of its best is run again and again, all its generations
are pooled, some rows are drawn of them, and the top of their ranking is left out, so that there is
something better than all that is known. Their files are in no package, so the rows are made here
by their recipe, and are not the same rows.
"""

from dataclasses import dataclass
from functools import partial

import numpy as np
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.operators.survival.rank_and_crowding import RankAndCrowding
from pymoo.optimize import minimize

from spo_lightning.design.order import Order
from spo_lightning.design.problem import Array, Problem, Scaled
from spo_lightning.errors import UserError


class Amateur(RankAndCrowding):
    """Survival that now and then keeps the worst: the same of the objectives turned round."""

    def __init__(self, share: float):
        super().__init__()
        self.share = share

    def _do(self, problem, pop, *args, random_state=None, **kwargs):
        assert random_state is not None
        keep = partial(super()._do, problem, pop, *args, random_state=random_state, **kwargs)
        if random_state.random() >= self.share:
            return keep()
        objectives = pop.get("F")
        pop.set("F", -objectives)
        survivors = keep()
        pop.set("F", objectives)
        return survivors


@dataclass(frozen=True)
class Offline:
    """N designs, what they were measured at, and their order."""

    designs: Array  # [N, D] in [-1, 1]
    objectives: Array  # [N, M]
    order: Order
    held_out: int  # of them, the last, which train nothing

    @property
    def low(self) -> Array:
        return self.objectives.min(axis=0)

    def scaled(self, objectives: Array) -> Array:
        """With 0 at the least and 1 at the most that is known of each objective."""
        span = self.objectives.max(axis=0) - self.low
        return (objectives - self.low) / np.where(span > 0, span, 1)

    def best(self, count: int) -> Array:
        """[count] places of the designs that the order has first."""
        return self.order.best_first[:count]


@dataclass(frozen=True)
class Collecting:
    """How much is known."""

    rows: int  # measured designs, with those that are left out
    left_out: float  # share of them, the top of the ranking
    population: int  # of the search that they are from
    held_out: float  # share of the rest that trains no net

    def of(self, problem: Problem, seed: int) -> Offline:
        draws = np.random.default_rng(seed)
        designs, objectives = self._pooled(problem, draws)
        drawn = draws.permutation(len(designs))[: self.rows]
        designs, objectives = designs[drawn], objectives[drawn]
        top = Order.of(objectives).best_first[: round(self.left_out * len(designs))]
        designs, objectives = (np.delete(one, top, axis=0) for one in (designs, objectives))
        held = round(self.held_out * len(designs))
        if held < 2 or len(designs) - held < 2:
            raise UserError(
                f"study.data.rows={self.rows} leaves {len(designs) - held} designs to learn from "
                f"and {held} held out: at least 2 of each are needed: raise it"
            )
        return Offline(designs, objectives, Order.of(objectives), held)

    def _pooled(self, problem: Problem, draws: np.random.Generator) -> tuple[Array, Array]:
        """Every generation of as many searches as it takes: each design once, if what it was
        measured at is finite."""
        count = problem.measured(np.zeros((1, problem.width))).shape[1]
        searched = Scaled(problem.width, count, problem.measured)
        pooled = np.empty((0, problem.width + count))
        while len(pooled) < self.rows:
            generations = [pooled]
            minimize(
                searched,
                NSGA2(pop_size=self.population, survival=Amateur(problem.amateur)),
                ("n_gen", problem.generations),
                seed=int(draws.integers(2**31)),
                callback=lambda it, seen=generations: seen.append(np.hstack(it.pop.get("X", "F"))),
            )
            found = np.concatenate(generations)
            found = np.unique(found[np.isfinite(found).all(axis=1)], axis=0)
            if len(found) == len(pooled):
                raise UserError(
                    f"problem.name={problem.name}: no more than {len(found)} designs with finite "
                    "objectives are found: lower study.data.rows"
                )
            pooled = found
        return pooled[:, : problem.width], pooled[:, problem.width :]
