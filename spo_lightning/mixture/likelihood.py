r"""A denoiser and points in, the exact log-density of the model it makes out.

A diffusion model that is drawn from along its probability flow (Song et al. 2021, 2011.13456) has
a density. With $u = \log(s / a)$, the log of noise over image, the flow is

$$ \frac{dx}{du} = s(\epsilon_\theta(x, u) - s x), \qquad s^2 = \sigma(2u) $$

for every schedule, so that only its ends matter, and along it

$$ \log p(x_{low}) = \log N(x_{high}; 0, I) + \int \mathrm{div} \frac{dx}{du}\, du $$

The divergence is taken whole, a backward pass per dimension: the plane has two.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

# x_t [N, D] and u in, the noise that is seen in it out
Predict = Callable[[Tensor, float], Tensor]
MIDDLE, BREADTH = -0.8, 0.8  # of u, where steps are short


def shares(u: float) -> tuple[float, float]:
    """a and s, of image and noise: their squares add to one."""
    noise = 1 / (1 + math.exp(-2 * u))
    return math.sqrt(1 - noise), math.sqrt(noise)


@dataclass(frozen=True)
class Flow:
    """From little noise, as good as none, to nothing but noise."""

    low: float  # u
    high: float
    steps: int  # of Runge-Kutta's fourth order

    @property
    def places(self) -> list[float]:
        """[steps + 1] values of u, closest where noise and image are of one size: there the flow
        turns, and far from it hardly anything moves."""
        low, high = (math.asinh((end - MIDDLE) / BREADTH) for end in (self.low, self.high))
        return [
            MIDDLE + BREADTH * math.sinh(low + (high - low) * step / self.steps)
            for step in range(self.steps + 1)
        ]

    def log_density(self, predict: Predict, points: Tensor) -> Tensor:
        """[N] of points with as little noise as there is, x / a."""
        image, _ = shares(self.low)
        size, x, total = points.shape[1], image * points, points.new_zeros(len(points))
        for u, then in pairwise(self.places):
            half = 0.5 * (then - u)
            k1, d1 = self._slope(predict, x, u)
            k2, d2 = self._slope(predict, x + half * k1, u + half)
            k3, d3 = self._slope(predict, x + half * k2, u + half)
            k4, d4 = self._slope(predict, x + 2 * half * k3, u + 2 * half)
            x = x + half / 3 * (k1 + 2 * k2 + 2 * k3 + k4)
            total = total + half / 3 * (d1 + 2 * d2 + 2 * d3 + d4)
        prior = -0.5 * x.square().sum(1) - 0.5 * size * math.log(2 * math.pi)
        return prior + total + size * math.log(image)

    def _slope(self, predict: Predict, x: Tensor, u: float) -> tuple[Tensor, Tensor]:
        """[N, D] dx/du and [N] its divergence."""
        _, s = shares(u)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            noise = predict(x, u)
            size = x.shape[1]
            trace = torch.zeros_like(noise[:, 0])
            for side in range(size):
                last = side == size - 1
                (row,) = torch.autograd.grad(noise[:, side].sum(), x, retain_graph=not last)
                trace = trace + row[:, side]
        return (s * (noise - s * x)).detach(), s * trace - s**2 * size
