"""How the gradients of a step's batch lie to each other: chosen, rejected, upper, lower."""

from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from spo_lightning import losses
from spo_lightning.data.batch import Microbatches
from spo_lightning.models.scorer import reference_logps
from spo_lightning.training.callbacks.setting import Setting, due
from spo_lightning.training.module import Preference

NAMES = (
    *("norm/chosen", "norm/rejected", "norm/upper", "norm/lower"),
    *("cosine/chosen_rejected", "cosine/upper_lower", "overlap", "violation"),
)


class Geometry(Callback):
    """Norms, cosines and two ratios of gradients at theta before the step, over its whole batch.

    g_w, g_l: gradients of the mean log pi(y_w) and log pi(y_l); u, v: of F (the mean preference
    loss) and of G (the mean NLL per token of the chosen answers, or of ``data.sft``'s texts).

    - overlap = <g_w, g_l> / |g_w|^2: above 1, a step along g_w - g_l lowers log pi(y_w);
    - violation = max(0, -<v, u> / |u|): what G gains per unit of distance, at first order, when
      theta moves against u. It is the length of the part of v that lies along -u: 0 where
      following F lowers G too, and |v| where following F is all to the lower level's cost.

    A cosine or ratio with a gradient that vanishes is 0.
    """

    def __init__(self, setting: Setting, *, every_n_steps: int):
        self.every, self.precision = every_n_steps, setting.precision
        self.names = [f"train/geometry/{name}" for name in NAMES]
        self.found: dict[str, float] = {}

    def on_train_batch_start(
        self, trainer: Trainer, module: Preference, batch: Microbatches, batch_idx: int
    ) -> None:
        if due(module.outer_step + 1, self.every):
            with torch.enable_grad():
                self.found = numbers(*self._gradients(trainer, module, batch))

    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: Preference,
        outputs: Any,
        batch: Microbatches,
        batch_idx: int,
    ) -> None:
        module.numbers |= {f"train/geometry/{name}": v for name, v in self.found.items()}
        self.found = {}

    def _gradients(
        self, trainer: Trainer, module: Preference, batch: Microbatches
    ) -> list[tuple[Tensor, ...]]:
        """Of the four means over all pairs of the outer step, summed over microbatches, ranks."""
        theta = tuple(module.trainable().values())
        sums = [[torch.zeros_like(p) for p in theta] for _ in range(4)]
        for part in batch:
            with self.precision():
                policy, reference = module.scorer(part), reference_logps(part)
                below = policy if part.lower is None else module.scorer(part.lower)
                beside = reference, module.moments, module.outer_step
                upper = losses.evaluate(module.loss, policy, *beside)
            four = (policy.chosen, policy.rejected, upper, -below.mean_chosen)
            for total, value in zip(sums, four):
                mean = value.sum() / module.batch_size
                # a loss of one side alone has no gradient through the other
                found = torch.autograd.grad(
                    mean, theta, retain_graph=True, allow_unused=True, materialize_grads=True
                )
                for place, gradient in enumerate(found):
                    total[place] += gradient
        if trainer.world_size > 1:
            sums = [[trainer.strategy.reduce(g, reduce_op="sum") for g in one] for one in sums]
        return [tuple(one) for one in sums]


def numbers(
    chosen: tuple[Tensor, ...],
    rejected: tuple[Tensor, ...],
    upper: tuple[Tensor, ...],
    lower: tuple[Tensor, ...],
) -> dict[str, float]:
    """What ``Geometry`` reports of four gradients."""
    four = {"chosen": chosen, "rejected": rejected, "upper": upper, "lower": lower}
    norm = {name: _inner(gradient, gradient) ** 0.5 for name, gradient in four.items()}
    sides, levels = _inner(chosen, rejected), _inner(upper, lower)
    return {
        **{f"norm/{name}": value for name, value in norm.items()},
        "cosine/chosen_rejected": _over(sides, norm["chosen"] * norm["rejected"]),
        "cosine/upper_lower": _over(levels, norm["upper"] * norm["lower"]),
        "overlap": _over(sides, norm["chosen"] ** 2),
        "violation": max(0.0, _over(-levels, norm["upper"])),
    }


def _inner(one: tuple[Tensor, ...], two: tuple[Tensor, ...]) -> float:
    parts = [torch.sum(a.double() * b.double()) for a, b in zip(one, two, strict=True)]
    return float(torch.stack(parts).sum())


def _over(value: float, by: float) -> float:
    return value / by if by else 0.0
