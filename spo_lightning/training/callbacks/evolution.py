"""One step's change of log pi(y_w) and log pi(y_l): predicted at first order, and measured."""

import math
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from spo_lightning.data.batch import Microbatches, PairBatch
from spo_lightning.evaluation.totals import Totals
from spo_lightning.models.scorer import PairLogps, Scorer
from spo_lightning.records.directory import MetricsCsv, cut_after
from spo_lightning.training.callbacks.setting import Setting, due
from spo_lightning.training.module import Preference

Named = dict[str, Tensor]
FORMS = ("predicted", "sgd", "measured")
SIDES = ("chosen", "rejected")
SECOND = ("pp", "pm", "mm")  # means of squares and products of predicted and measured
COLUMNS = tuple(f"{form}_{side}" for form in FORMS for side in SIDES)


class Evolution(Callback):
    """Probability evolution of the pairs that a step was taken on.

    With theta and theta+ the parameters before and after the step, per pair and side, in nats:

    - predicted: <gradient of log pi(y) at theta, theta+ - theta>, one forward-mode pass, so that
      the optimizer's scaling, clipping and a solver's displacement are in it;
    - sgd: the same along ``displacement - lr * direction``, the plain SGD step: for one pair and
      ``solver=none`` it is eta (c_w |g_w|^2 - c_l <g_w, g_l>) and eta (c_w <g_w, g_l> -
      c_l |g_l|^2) with c the loss's own slopes, the form in which displacement is explained;
    - measured: log pi(y) at theta+ less log pi(y) at theta, summed token by token.

    Scored in the weights' dtype outside autocast: bfloat16 would round the change away. With
    several processes the numbers are of all pairs, evolution.csv has those of the first.
    """

    def __init__(self, setting: Setting, *, every_n_steps: int):
        self.every, self.path = every_n_steps, setting.directory / "evolution.csv"
        means = [f"{form}/{side}" for form in FORMS for side in SIDES]
        fits = [f"{what}/{side}" for what in ("correlation", "slope") for side in SIDES]
        names = [*means, *fits, "both_fall", "mass_elsewhere"]
        self.names = [f"train/evolution/{name}" for name in names]
        self.before: Named | None = None
        self.plain: Named | None = None

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if trainer.is_global_zero:
            cut_after(self.path, module.outer_step)

    def on_train_batch_start(
        self, trainer: Trainer, module: Preference, batch: Microbatches, batch_idx: int
    ) -> None:
        if due(module.outer_step + 1, self.every):
            self.before = {n: p.detach().clone() for n, p in module.trainable().items()}

    def on_before_optimizer_step(
        self, trainer: Trainer, module: Preference, optimizer: torch.optim.Optimizer
    ) -> None:
        if self.before is None:
            return
        lr = optimizer.param_groups[0]["lr"]
        now = {n: (p.detach(), p.grad) for n, p in module.trainable().items()}
        self.plain = {
            name: value - self.before[name] - (0 if along is None else lr * along)
            for name, (value, along) in now.items()
        }

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: Trainer,
        module: Preference,
        outputs: Any,
        batch: Microbatches,
        batch_idx: int,
    ) -> None:
        if self.before is None or self.plain is None:
            return
        before, plain = self.before, self.plain
        self.before = self.plain = None
        moved = {n: p.detach() - before[n] for n, p in module.trainable().items()}
        totals = Totals()
        for part in batch:
            seen = _changes(module.scorer, part, before, moved, plain)
            totals.add(_sums(seen))
            if trainer.is_global_zero:
                self._write(module.outer_step, part, seen)
        means = {name: v.item() for name, v in module._reduce(totals).means().items()}
        numbers = _numbers(means)
        module.numbers |= {f"train/evolution/{name}": v for name, v in numbers.items()}

    def _write(self, step: int, part: PairBatch, seen: Named) -> None:
        file = MetricsCsv(self.path, ["step", "row", *COLUMNS])
        table = torch.cat([seen[form] for form in FORMS], dim=1)
        for row, values in zip(part.rows.tolist(), table.tolist()):
            file.write({"step": step, "row": row, **dict(zip(COLUMNS, values))})


@torch.no_grad()
def directional(scorer: Scorer, part: PairBatch, at: Named, along: Named) -> tuple[Tensor, Tensor]:
    """[S] log-probabilities at the parameters ``at``, and their derivative along ``along``.

    Only the math kernel of attention has a forward-mode derivative.
    """
    with sdpa_kernel(SDPBackend.MATH), forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(value, along[name]) for name, value in at.items()}
        found = forward_ad.unpack_dual(functional_call(scorer, dual, (part,)).logps)
        value, change = found.primal, found.tangent
    return value, torch.zeros_like(value) if change is None else change


def _changes(scorer: Scorer, part: PairBatch, before: Named, moved: Named, plain: Named) -> Named:
    """[B, 2] per form, and under ``start`` the log-probabilities before the step; float64."""
    start, predicted = directional(scorer, part, before, moved)
    _, idealised = directional(scorer, part, before, plain)
    with sdpa_kernel(SDPBackend.MATH):  # two kernels differ by as much as a small step
        after = scorer(part).logps

    def summed(values: Tensor) -> Tensor:
        return PairLogps(values.double(), part.pair, part.rejected, len(part)).sums

    return {
        "predicted": summed(predicted),
        "sgd": summed(idealised),
        "measured": summed(after.double() - start.double()),
        "start": summed(start),
    }


def _sums(seen: Named) -> Named:
    """Per-pair values whose means give every number."""
    measured, predicted = seen["measured"], seen["predicted"]
    pi = seen["start"].exp()
    sums = {
        "both_fall": (measured < 0).all(dim=1).double(),
        "mass_elsewhere": -(pi * measured.expm1()).sum(dim=1),
    }
    for place, side in enumerate(SIDES):
        p, m = predicted[:, place], measured[:, place]
        sums |= {f"{form}/{side}": seen[form][:, place] for form in FORMS}
        sums |= {f"pp/{side}": p * p, f"pm/{side}": p * m, f"mm/{side}": m * m}
    return sums


def _numbers(means: dict[str, float]) -> dict[str, float]:
    """The means, and over the pairs the correlation of predicted and measured and the slope of
    measured on predicted through the origin; without the two where they are undefined."""
    numbers = {name: v for name, v in means.items() if name.split("/")[0] not in SECOND}
    for side in SIDES:
        p, m = means[f"predicted/{side}"], means[f"measured/{side}"]
        pp, pm, mm = (means[f"{name}/{side}"] for name in SECOND)
        spreads = pp - p * p, mm - m * m
        if min(spreads) > 0:
            numbers[f"correlation/{side}"] = (pm - p * m) / math.prod(spreads) ** 0.5
        if pp > 0:
            numbers[f"slope/{side}"] = pm / pp
    return numbers
