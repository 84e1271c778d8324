"""A sample of pairs in, how their gradients lie out, and the step that their mean would take.

One forward and two backwards per pair, a third where a loss weighs the tokens of an answer apart;
beside the gradients of one pair only the mean and the spread of the preference gradient are kept.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spo_lightning import losses
from spo_lightning.data.sets import Pairs
from spo_lightning.models.scorer import PairLogps, Scorer, reference_logps
from spo_lightning.solvers import Tensors
from spo_lightning.training.callbacks.evolution import Named, directional
from spo_lightning.training.microbatch import trainable

BLOCK = 2**17  # weights whose gradients are read once for all that is asked of them, on a CPU
AT_ONCE = 8  # pairs of one forward: a derivative along a step holds two of them

Advance = Callable[[int], None]  # hears how many are done


class Geometry(NamedTuple):
    """Of every pair of the sample, and the direction of their preference loss."""

    pairs: list[dict[str, float]]  # norms, cosine, overlap = <g_w, g_l> / |g_w|^2
    along: Named  # D / sqrt(var(g) / batch + D^2), as AdamW's first steps have it


def geometry(
    scorer: Scorer,
    sample: Pairs,
    loss: losses.Loss,
    batch_size: int,
    advance: Advance = lambda count: None,
) -> Geometry:
    """At the policy as it is."""
    scorer.squares = losses.asks(loss, "squares")
    named = trainable(scorer)
    theta: Tensors = tuple(named.values())
    # in bfloat16 a mean of a hundred would no longer hear of the next one
    wide = [torch.promote_types(p.dtype, torch.float32) for p in theta]
    mean = [torch.zeros(p.shape, dtype=w, device=p.device) for p, w in zip(theta, wide)]
    squares = [torch.zeros_like(m) for m in mean]  # of the distances from the mean, summed
    found = []
    for number in range(len(sample)):
        batch = sample.batch([number]).to(scorer.model.device)
        policy = scorer(batch)
        upper = losses.evaluate(loss, policy, reference_logps(batch), losses.moments_of({}))
        chosen, rejected = (_gradient(policy.sums[0, side], theta) for side in (0, 1))
        weighed = _sides(upper, policy)
        columns = [mean, squares, chosen, rejected]
        if weighed is None:
            columns.append(_gradient(upper.sum(), theta))
        products = []
        for m, s, own, other, *whole in _blocks(columns):
            own, other = own.to(m.dtype), other.to(m.dtype)
            products.append(torch.stack([own.dot(other), own.dot(own), other.dot(other)]))
            if weighed is None:
                apart = whole[0] - m
            else:
                apart = (weighed[0] * own).add_(other, alpha=weighed[1]).sub_(m)
            m.add_(apart, alpha=1 / (number + 1))
            s.addcmul_(apart, apart, value=number / (number + 1))
        inner, *both = torch.stack(products).sum(0, dtype=torch.float64).tolist()
        norms = [value**0.5 for value in both]
        found.append(
            {
                "norm_chosen": norms[0],
                "norm_rejected": norms[1],
                "cosine": inner / max(norms[0] * norms[1], 1e-30),
                "overlap": inner / max(both[0], 1e-30),
            }
        )
        del columns, chosen, rejected
        advance(1)
    count = max(1, len(sample) - 1)
    along = {}
    for (name, p), m, s in zip(named.items(), mean, squares):
        spread = (s / (count * batch_size) + m.square()).sqrt()
        along[name] = torch.where(spread > 0, m / spread, 0.0).to(p.dtype)
    return Geometry(found, along)


def _blocks(columns: Sequence[Sequence[Tensor]]) -> Iterator[tuple[Tensor, ...]]:
    """As many values of each at a time as a CPU's cache holds: read from memory once."""
    for some in zip(*columns, strict=True):
        size = BLOCK if some[0].device.type == "cpu" else max(1, some[0].numel())
        yield from zip(*(one.flatten().split(size) for one in some))


def _sides(upper: Tensor, policy: PairLogps) -> tuple[float, float] | None:
    """d F / d log pi(y_w) and d F / d log pi(y_l) of one pair; None where there is more to F."""
    if policy.divergences is not None:
        return None
    (slope,) = _gradient(upper.sum(), (policy.logps,))
    chosen, rejected = slope[~policy.side], slope[policy.side]
    if any(len(some) and bool((some != some[0]).any()) for some in (chosen, rejected)):
        return None
    one, two = (float(some[0]) if len(some) else 0.0 for some in (chosen, rejected))
    return one, two


def _gradient(value: Tensor, theta: Tensors) -> Tensors:
    return torch.autograd.grad(
        value, theta, retain_graph=True, allow_unused=True, materialize_grads=True
    )


def slopes(
    scorer: Scorer, pairs: Pairs, at: Named, along: Named, advance: Advance = lambda count: None
) -> list[float]:
    """[N] <gradient of log pi(y_w) at the parameters ``at``, along>: first order, in nats."""
    found = torch.empty(len(pairs), dtype=torch.float64)
    for indices in pairs.batches(AT_ONCE):
        batch = pairs.batch(indices).to(scorer.model.device).chosen_only
        _, change = directional(scorer, batch, at, along)
        summed = PairLogps(change.double(), batch.pair, batch.rejected, len(batch)).chosen
        found[indices] = summed.cpu()
        advance(len(indices))
    return found.tolist()


@torch.no_grad()
def sums(scorer: Scorer, pairs: Pairs) -> Tensor:
    """[N, 2] log pi(y_w) and log pi(y_l) under the policy as it is, in the weights' own dtype:
    bfloat16 would round a few steps' change away."""
    found = torch.empty(len(pairs), 2, dtype=torch.float64)
    for indices in pairs.batches(AT_ONCE):
        batch = pairs.batch(indices).to(scorer.model.device)
        found[indices] = scorer(batch).sums.double().cpu()
    return found
