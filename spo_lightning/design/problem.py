"""The name of a problem in, its designs' objectives out. Problems are pymoo's."""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from pymoo.core.problem import Problem as Searched
from pymoo.problems import get_problem

from spo_lightning.errors import UserError

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """What is optimised, and how the designs that are known of it were come by."""

    name: str  # as pymoo knows it
    variables: int | None  # None: as many as pymoo gives it
    objectives: int | None
    generations: int  # of the search whose designs are known
    amateur: float  # how often that search kept its worst
    pymoo: Any = field(init=False, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "pymoo", self._made())

    def _made(self) -> Any:
        sizes = {"n_var": self.variables, "n_obj": self.objectives}
        given = {key: size for key, size in sizes.items() if size is not None}
        try:
            found: Any = get_problem(self.name, **given)
        except Exception as error:  # pymoo raises Exception itself, or what a constructor does
            told = f" with {given}" if given else ""
            raise UserError(
                f"problem.name={self.name}: pymoo has no such problem{told} "
                f"({str(error).splitlines()[0]}): take an option of conf/problem"
            ) from None
        if found.n_obj < 2 or found.n_eq_constr or found.vtype is not float:
            raise UserError(
                f"problem.name={self.name}: it needs two objectives or more, real variables and "
                "no equality constraint: take another problem"
            )
        bounds = (found.xl, found.xu)
        if any(bound is None or not np.isfinite(bound).all() for bound in bounds):
            raise UserError(f"problem.name={self.name}: its variables have no bounds")
        return found

    @property
    def width(self) -> int:
        """Numbers of a design."""
        return self.pymoo.n_var

    def measured(self, designs: Array) -> Array:
        """[N, D] designs to their [N, M] objectives. Constraints are one objective more, the sum
        of what is violated, as in the RE suite (Tanabe and Ishibuchi 2020)."""
        low, high = self.pymoo.xl, self.pymoo.xu
        within = low + (np.clip(designs, -1, 1) + 1) / 2 * (high - low)
        values: Any = self.pymoo.evaluate(within, return_as_dictionary=True)
        if not self.pymoo.n_ieq_constr:
            return values["F"]
        over = np.maximum(values["G"], 0).sum(axis=1, keepdims=True)
        return np.hstack([values["F"], over])


class Scaled(Searched):
    """For pymoo's algorithms: a problem whose designs lie in [-1, 1], of any function."""

    def __init__(self, width: int, objectives: int, function: Any):
        super().__init__(n_var=width, n_obj=objectives, xl=-1.0, xu=1.0)
        self.function = function

    def _evaluate(self, x: Array, out: dict, *args: Any, **kwargs: Any) -> None:
        out["F"] = self.function(x)
