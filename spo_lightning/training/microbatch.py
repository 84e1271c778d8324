"""One microbatch in, F and G of its rows as a Problem out; and what an outer step asks beside it.

The outer step's own Problem, which loops over these, stands in ``module.py``.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spo_lightning import losses
from spo_lightning.data.batch import PairBatch
from spo_lightning.models.logps import PairLogps
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.models.sharded import at
from spo_lightning.solvers import Problem, Slope, Tensors
from spo_lightning.training.observation import Observation

Moved = Callable[[Tensors], Tensor | None]  # theta in, the outer step's ``kl`` out


def trainable(scorer: Scorer) -> dict[str, nn.Parameter]:
    named = scorer.spread or dict(scorer.named_parameters())
    return {name: p for name, p in named.items() if p.requires_grad}


def problem_of(
    part: PairBatch,
    scorer: Scorer,
    loss: losses.Loss,
    moments: losses.Moments,
    step: int,
    kl: Moved,
    seen: Observation | None,
    value_moves: bool,
) -> Problem:
    """``seen`` looks at each pass over both responses. A row without a chosen one has no G.
    ``value_moves``: with a reference that moves, what G is measured against moves too."""
    start, reference = reference_logps(part), reference_logps(part, now=True)
    # where no row has one, G is an empty tensor that still hangs on theta
    alone = part.with_chosen is not None and not len(part.with_chosen)
    texts = part.lower or (part if alone else part.chosen_only)
    value = reference_logps(texts, now=value_moves)

    def learned(values: Tensor, batch: PairBatch) -> Tensor:
        return values if batch.with_chosen is None else values[batch.with_chosen]

    def both(theta: Tensors) -> tuple[Tensor, Tensor]:
        policy, moved = scored(scorer, theta, part), kl(theta)
        upper = losses.evaluate(loss, policy, reference, moments, step, moved)
        apart = policy if part.lower is None else scored(scorer, theta, texts)
        lower = learned(-apart.mean_chosen, texts)
        if seen:
            seen.look(policy, reference, start, apart, upper, lower, moved)
        return upper, lower

    def below(theta: Tensors) -> Tensor:
        return learned(-scored(scorer, theta, texts).mean_chosen, texts)

    return Problem(
        theta=tuple(trainable(scorer).values()),
        upper=lambda theta: both(theta)[0],
        lower=below,
        both=both,
        value=learned(-value.mean_chosen, texts),
        size=learned(value.chosen_length, texts),
        gradient=_no_nesting,
    )


def scored(scorer: Scorer, theta: Tensors, batch: PairBatch) -> PairLogps:
    """The batch under a policy with these parameters."""
    mine = trainable(scorer)
    if all(own is given for own, given in zip(mine.values(), theta)):
        return scorer(batch)
    if scorer.spread is not None:
        assert not torch.is_grad_enabled()  # what is spread has no graph at other values
        with at(scorer, dict(zip(mine, theta))):
            return scorer(batch)
    return functional_call(scorer, dict(zip(mine, theta)), (batch,))


def linearized_at(
    theta: Tensors, parameters: Tensors, lower: Callable[[Tensors], Tensor], count: int
) -> tuple[Slope, Callable[[Tensors], Tensors]]:
    """The slope of the sum of ``lower`` over ``count``, and products with its derivative, which
    keep the graph."""
    mine = set(parameters)
    # leaves of its own: the parameters are about to move, which would break the graph
    copies = (t.detach().clone() if t in mine else t.detach() for t in theta)
    leaves = tuple(copy.requires_grad_() for copy in copies)
    found = lower(leaves)
    mean = found.sum() / count
    slope = torch.autograd.grad(mean, leaves, create_graph=True, materialize_grads=True)

    def product(vector: Tensors) -> Tensors:
        return torch.autograd.grad(slope, leaves, vector, materialize_grads=True)

    return Slope(tuple(s.detach() for s in slope), {"lower": found.detach().mean()}), product


@torch.no_grad()
def moved_from_reference(
    scorer: Scorer, mismatched: Sequence[PairBatch], theta: Tensors
) -> tuple[Tensor, int]:
    """The sum of the log-ratios of all rows, and how many there are."""
    found = [
        (scored(scorer, theta, part).chosen - reference_logps(part, now=True).chosen)
        .double()
        .sum()
        for part in mismatched
    ]
    return torch.stack(found).sum(), sum(map(len, mismatched))


def _no_nesting(closure: Callable, theta: Tensors) -> Slope:
    raise RuntimeError("gradient belongs to the whole outer step, not to one microbatch")
