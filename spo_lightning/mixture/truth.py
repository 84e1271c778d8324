"""Numbers of a yaml in, what is known exactly out: a mixture of Gaussians and a preference."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """Round Gaussians of equal weight; with noise on it, it is a mixture still."""

    centres: Sequence[Sequence[float]]  # [K, D]
    spread: float  # standard deviation of each

    def __post_init__(self):
        sides = {len(centre) for centre in self.centres}
        if len(sides) != 1 or sides == {0}:
            raise ValueError("study.mixture.centres must be points of one plane: [[x, y], ...]")
        if not self.spread > 0:
            raise ValueError(f"study.mixture.spread must be above 0, not {self.spread}")

    def _parts(self, points: Tensor, image: float, noise: float) -> tuple[Tensor, Tensor, float]:
        """[N, K, D] from the centres and [N, K] log-densities, of x_t = image x + noise eps."""
        centres = image * torch.tensor(self.centres).to(points)
        variance = (image * self.spread) ** 2 + noise**2
        off = points.unsqueeze(1) - centres
        flat = 0.5 * off.shape[-1] * math.log(2 * math.pi * variance) + math.log(len(centres))
        return off, -0.5 * off.square().sum(-1) / variance - flat, variance

    def log_density(self, points: Tensor, image: float = 1.0, noise: float = 0.0) -> Tensor:
        """[N]"""
        return self._parts(points, image, noise)[1].logsumexp(1)

    def noise(self, points: Tensor, image: float, noise: float) -> Tensor:
        """[N, D] the noise that is expected in x_t: -s times the score of its density."""
        off, each, variance = self._parts(points, image, noise)
        return noise * (each.softmax(1).unsqueeze(-1) * off).sum(1) / variance

    def drawn(self, count: int, draws: torch.Generator) -> Tensor:
        """[count, D]"""
        centres = torch.tensor(self.centres)
        which = torch.randint(len(centres), (count,), generator=draws)
        return centres[which] + self.spread * torch.randn(count, centres.shape[1], generator=draws)


@dataclass(frozen=True)
class Preference:
    """A reward over the plane, hills of one width; of two points one is chosen by it."""

    centres: Sequence[Sequence[float]]
    heights: Sequence[float]  # nats of the odds to be chosen
    width: float

    def __post_init__(self):
        if len(self.centres) != len(self.heights):
            raise ValueError(
                f"study.preference has {len(self.centres)} centres and {len(self.heights)} "
                "heights: give as many of each"
            )
        if not self.width > 0:
            raise ValueError(f"study.preference.width must be above 0, not {self.width}")

    def reward(self, points: Tensor) -> Tensor:
        """[N]"""
        centres, heights = (torch.tensor(it).to(points) for it in (self.centres, self.heights))
        off = (points.unsqueeze(1) - centres).square().sum(-1)
        return (heights * torch.exp(-0.5 * off / self.width**2)).sum(1)

    def pairs(self, points: Tensor, draws: torch.Generator) -> Tensor:
        """[B, 2, D] of [2B, D] points: the chosen one first, which sigmoid(r_w - r_l) says
        (Bradley-Terry)."""
        two = points.view(-1, 2, points.shape[-1])
        first, second = self.reward(points).view(-1, 2).unbind(1)
        keeps = torch.rand(len(two), generator=draws) < torch.sigmoid(first - second)
        return torch.where(keeps.view(-1, 1, 1), two, two.flip(1))
