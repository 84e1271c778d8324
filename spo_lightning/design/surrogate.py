"""What guided designs are compared with: chance, and a search on a learned surrogate."""

from typing import Any

import numpy as np
import torch
from pymoo.algorithms.moo.nsga2 import NSGA2
from pymoo.optimize import minimize
from torch import Tensor

from spo_lightning.design.order import Order
from spo_lightning.design.problem import Array, Scaled
from spo_lightning.studies.denoiser import Timed


def predicted(net: Timed, designs: Tensor) -> Tensor:
    """[N, M] scaled objectives; a surrogate is a net at no time."""
    return net(designs, torch.zeros(len(designs)))


def searched(
    net: Timed, start: Array, objectives: int, count: int, generations: int, seed: int
) -> Array:
    """[count, D] the designs that NSGA-II ends with on the surrogate, from the best known ones."""

    @torch.no_grad()
    def function(designs: Array) -> Array:
        return predicted(net, torch.from_numpy(designs).float()).double().numpy()

    problem = Scaled(start.shape[1], objectives, function)
    begin: Any = start[:count]
    algorithm = NSGA2(pop_size=count, sampling=begin)
    ended: Any = minimize(problem, algorithm, ("n_gen", generations), seed=seed).pop
    return ended.get("X")[Order.of(ended.get("F")).best_first]


def at_random(width: int, count: int, seed: int) -> Array:
    return np.random.default_rng(seed).uniform(-1, 1, (count, width))
