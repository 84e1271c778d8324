"""Numbers of pairs and of places in the plane in, what they come to out."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


def pearson(one: Tensor, other: Tensor) -> float:
    x, y = (it.double() - it.double().mean() for it in (one, other))
    return ((x * y).sum() / (x.square().sum() * y.square().sum()).sqrt()).item()


def spearman(one: Tensor, other: Tensor) -> float:
    """Of the ranks; numbers that are drawn have no ties."""
    return pearson(*(it.argsort().argsort() for it in (one, other)))


def slope(one: Tensor, other: Tensor) -> float:
    """How much of ``one`` a unit of ``other`` brings: least squares."""
    x, y = (it.double() - it.double().mean() for it in (other, one))
    return ((x * y).sum() / x.square().sum()).item()


@dataclass(frozen=True)
class Grid:
    """Square cells over [-reach, reach] in both directions of a plane."""

    reach: float
    side: int  # cells

    def __post_init__(self):
        if not (self.reach > 0 and self.side >= 2):
            raise ValueError(
                f"study.grid.reach={self.reach} must be above 0 and study.grid.side={self.side} "
                "at least 2"
            )

    @cached_property
    def points(self) -> Tensor:
        """[side^2, 2] the cells' middles."""
        width = 2 * self.reach / self.side
        line = (torch.arange(self.side) + 0.5) * width - self.reach
        return torch.cartesian_prod(line, line)

    def mass(self, logs: Tensor) -> float:
        """What a density comes to over the plane: 1, if the cells are small and many enough."""
        return (logs.double().exp().sum() * (2 * self.reach / self.side) ** 2).item()


def whole(logs: Tensor) -> Tensor:
    """Log-densities as log-probabilities of the cells."""
    return logs.double().log_softmax(0)


def kl(one: Tensor, other: Tensor) -> float:
    """KL(one || other) of log-densities on a grid, nats."""
    p, q = whole(one), whole(other)
    return (p.exp() * (p - q)).sum().item()


def by_centre(logs: Tensor, points: Tensor, centres: Tensor) -> list[float]:
    """The probability of what is nearest to each centre."""
    nearest = torch.cdist(points, centres.to(points)).argmin(1)
    shares = torch.zeros(len(centres), dtype=torch.float64)
    return shares.index_add(0, nearest, whole(logs).exp()).tolist()
