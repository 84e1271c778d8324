r"""Designs in, noise on them, and a net that tells the noise again: a DDPM (Ho et al. 2020).

A design $x$ at time $t$ is $x_t = \sqrt{\bar\alpha_t} x + \sqrt{1 - \bar\alpha_t} \epsilon$, and
one step back from it is normal, with variance $\beta_t$, around

$$ \mu_t = \frac{x_t - \beta_t \epsilon_\theta(x_t, t) / \sqrt{1 - \bar\alpha_t}}
   {\sqrt{1 - \beta_t}} $$

Letters for shapes: N designs, D numbers of each, T times.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Schedule:
    """How much noise comes in at each of T times."""

    times: int
    first: float  # beta at the first time
    last: float

    @cached_property
    def beta(self) -> Tensor:  # [T]
        return torch.linspace(self.first, self.last, self.times, dtype=torch.float64)

    @cached_property
    def kept(self) -> Tensor:
        """[T] alpha bar: the share of the design's variance that is left."""
        return (1 - self.beta).cumprod(0)

    def noised(self, designs: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        """[N, D] at [N] times."""
        kept = self.kept[times].to(designs).unsqueeze(1)
        return kept.sqrt() * designs + (1 - kept).sqrt() * noise

    def mean(self, noised: Tensor, time: int, noise: Tensor) -> Tensor:
        """[N, D] the middle of the step back from one time, of the noise that the net sees."""
        beta, kept = self.beta[time].item(), self.kept[time].item()
        return (noised - beta / math.sqrt(1 - kept) * noise) / math.sqrt(1 - beta)

    def drawn(self, designs: Tensor, draws: torch.Generator) -> tuple[Tensor, Tensor]:
        """A time and a noise for each design."""
        times = torch.randint(self.times, (len(designs),), generator=draws)
        return times, torch.randn(designs.shape, generator=draws, dtype=designs.dtype)


class Timed(nn.Module):
    """A net of a design and a time: [N, D] and [N] to [N, outputs]."""

    def __init__(self, inputs: int, outputs: int, width: int, depth: int):
        super().__init__()
        self.width = width
        self.enter, self.leave = nn.Linear(inputs, width), nn.Linear(width, outputs)
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))

    def forward(self, designs: Tensor, times: Tensor) -> Tensor:
        hidden = self.enter(designs) + self.time(self.waves(times.to(designs)))
        for layer, norm in zip(self.layers, self.norms):
            hidden = hidden + F.silu(layer(norm(hidden)))
        return self.leave(hidden)

    def waves(self, times: Tensor) -> Tensor:
        """[N, width] sines and cosines of the time, from fast ones to slow ones."""
        half = self.width // 2
        slower = torch.exp(-math.log(10_000) / half * torch.arange(half, dtype=times.dtype))
        angles = times.unsqueeze(1) * slower
        return F.pad(torch.cat([angles.sin(), angles.cos()], 1), (0, self.width % 2))


def loss(net: Timed, schedule: Schedule, designs: Tensor, draws: torch.Generator) -> Tensor:
    """The mean squared error of the noise that the net sees."""
    times, noise = schedule.drawn(designs, draws)
    return F.mse_loss(net(schedule.noised(designs, times, noise), times), noise)
