"""A run's held-out numbers in, the one number out that a search maximises."""

from collections.abc import Mapping
from typing import Any

from spo_lightning.errors import UserError


def score(numbers: Mapping[str, Any], *, maximise: str, keep: str | None, within: float) -> float:
    """The final ``maximise``, or how far ``keep`` fell below its start less ``within``, negative.

    So a run that loses too much of ``keep`` stands below every run that does not, and the less it
    loses the higher. ``maximise`` is of numbers that are never negative, such as win_rate.
    """
    init, final = numbers["init"], numbers["final"]
    for name in (maximise, keep):
        if name is not None and name not in final:
            raise UserError(f"sweep.objective names {name}, which this run's metrics.json has not")
    if keep is not None and final[keep] < init[keep] - within:
        return final[keep] - (init[keep] - within)
    return final[maximise]
