"""PairLogps in, sums and counts out: every number is computed here, once, outside the losses.

Sums and counts are added over microbatches, batches and ranks, then divided: no mean of means.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from spo_lightning.models.scorer import PairLogps
from spo_lightning.world import World

NAMES = (  # of pair_numbers
    *("logps/chosen", "logps/rejected", "nll/chosen"),
    *("preference/accuracy", "preference/accuracy_norm"),
    *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    *("displacement/rate", "displacement/chosen"),
)

Sums = dict[str, tuple[Tensor, Tensor]]  # name -> (sum, count), 0-d float64


class Totals:
    """Adds up sums and counts; ``means`` divides once."""

    def __init__(self) -> None:
        self.sums: Sums = {}

    def add(
        self, values: Mapping[str, Tensor | tuple[Tensor, Tensor]], counts: bool = True
    ) -> None:
        """``values``: one value per row, or a sum and a count, of each row or of all. Not
        ``counts``: their names only, so that every process has the same."""
        for name, value in values.items():
            total, count = value if isinstance(value, tuple) else (value, value.numel())
            total = torch.as_tensor(total).detach().sum().double()
            count = torch.as_tensor(count, device=total.device).detach().sum().double()
            if not counts:
                total, count = torch.zeros_like(total), torch.zeros_like(count)
            before = self.sums.get(name)
            self.sums[name] = (
                (total, count)
                if before is None
                else (
                    before[0] + total,
                    before[1] + count,
                )
            )

    def over(self, world: World) -> "Totals":
        """The same sums and counts over all processes."""
        if self.sums and world.size > 1:
            stacked = world.sum(torch.stack([torch.stack(pair) for pair in self.sums.values()]))
            self.sums = {name: (row[0], row[1]) for name, row in zip(self.sums, stacked)}
        return self

    def means(self) -> dict[str, Tensor]:
        return {name: total / count for name, (total, count) in self.sums.items()}

    def numbers(self) -> dict[str, float]:
        """The means, without those that nothing counted for."""
        means = self.means()
        return {name: means[name].item() for name, (_, count) in self.sums.items() if count}


def pair_numbers(
    policy: PairLogps, reference: PairLogps | None, start: PairLogps | None = None, *, beta: float
) -> dict[str, tuple[Tensor, Tensor]]:
    """Values and counts of rows under the names of the design's section 7. ``start``: what
    displacement is measured from, where the reference has moved.

    A row counts where it has the answers that the number is about: texts have a chosen one alone,
    labelled rows one of the two.
    """
    if policy.rewards:
        return _rewards(policy, beta)
    chosen, rejected = policy.chosen.detach(), policy.rejected.detach()
    good, bad = (policy.counts > 0).unbind(1)
    both = good & bad
    better = policy.mean_chosen > policy.mean_rejected
    # an absent answer's log-probability is 0, so that only what compares two has to be masked
    numbers = {
        "logps/chosen": (chosen, good),
        "logps/rejected": (rejected, bad),
        "nll/chosen": (-chosen.double(), policy.counts[:, 0].double()),
        "preference/accuracy": (((chosen > rejected) & both).double(), both),
        "preference/accuracy_norm": ((better & both).double(), both),
    }
    if reference is None:
        return numbers
    moved_chosen = chosen - reference.chosen
    moved_rejected = rejected - reference.rejected
    displaced = chosen - (start or reference).chosen
    return numbers | {
        "rewards/chosen": (beta * moved_chosen, good),
        "rewards/rejected": (beta * moved_rejected, bad),
        "rewards/accuracies": (((moved_chosen > moved_rejected) & both).double(), both),
        "rewards/margins": (beta * (moved_chosen - moved_rejected) * both, both),
        "displacement/rate": ((displaced < 0).double(), good),
        "displacement/chosen": (displaced, good),
    }


def _rewards(policy: PairLogps, beta: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The same names of a reward model, which has no log-probabilities."""
    chosen, rejected = beta * policy.chosen.detach(), beta * policy.rejected.detach()
    good, bad = (policy.counts > 0).unbind(1)
    both, ties = good & bad, (chosen == rejected).double()
    return {
        "rewards/chosen": (chosen, good),
        "rewards/rejected": (rejected, bad),
        "rewards/accuracies": (((chosen > rejected).double() + ties / 2) * both, both),
        "rewards/margins": ((chosen - rejected) * both, both),
    }


def wilson(share: float, count: int) -> tuple[float, float]:
    """The 95% interval of a share of ``count`` (Wilson 1927): inside [0, 1], right also at both
    ends."""
    z = 1.959964
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    spread = share * (1 - share) / count + z * z / (4 * count * count)
    half = z * math.sqrt(max(spread, 0.0)) / (1 + z * z / count)
    return max(middle - half, 0.0), min(middle + half, 1.0)
