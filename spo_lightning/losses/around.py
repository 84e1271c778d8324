r"""A loss in, the same loss with something around it out: what any loss can have, written once.

A divergence acts on the log-ratios, ``ld_alpha`` on the tokens, WPO's weights on the values. Each
takes ``losses``, of which there is one, and everything that a loss can be given, ``beside``. The
policy that the loss inside sees is another one; lengths stay.
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.losses.given import Beside, Loss
from spo_lightning.models.scorer import PairLogps

LARGEST = 40.0  # exponent: e^40 and its square are numbers in float32
# log-ratios in, the scores that a loss sees in their place out; 0 stays 0
Divergence = Callable[[Tensor], Tensor]


def reverse_kl(ratio: Tensor) -> Tensor:
    r"""DPO's own. $f'(t) = \log t$"""
    return ratio


def forward_kl(ratio: Tensor) -> Tensor:
    r"""$f'(t) = 1 - 1/t$. Wang et al. 2023 (2309.16240)."""
    return 1 - torch.exp((-ratio).clamp(max=LARGEST))


def js(ratio: Tensor) -> Tensor:
    r"""Jensen-Shannon. $f'(t) = \log\frac{2t}{1+t}$. Wang et al. 2023 (2309.16240)."""
    return math.log(2) + F.logsigmoid(ratio)


def alpha_divergence(ratio: Tensor, *, coefficient: float) -> Tensor:
    r"""$f'(t) = \frac{t^{a-1} - 1}{a-1}$; a = 1 is reverse KL. Wang et al. 2023 (2309.16240)."""
    power = coefficient - 1
    if abs(power) < 1e-6:
        return ratio
    return torch.expm1((power * ratio).clamp(max=LARGEST)) / power


def divergent(
    policy: PairLogps, beside: Beside, *, losses: Sequence[Loss], divergence: Divergence
) -> Tensor:
    """The loss of a policy whose log-ratios are the divergence's scores."""
    assert beside.reference is not None  # of a loss that has log-ratios
    ratios = policy.sums - beside.reference.sums
    moved = (divergence(ratios) - ratios) / policy.lengths
    seen = replace(policy, logps=policy.logps + moved[policy.pair, policy.side.long()])
    return beside.of(losses[0], seen)


def desensitised(
    policy: PairLogps, beside: Beside, *, losses: Sequence[Loss], alpha: float
) -> Tensor:
    """LD-DPO: tokens past the shorter answer's length count ``alpha``, on both sides and under
    both models. Liu et al. 2024 (2409.06411)."""
    reference = beside.reference and _shortened(beside.reference, alpha)
    return replace(beside, reference=reference).of(losses[0], _shortened(policy, alpha))


def _shortened(logps: PairLogps, alpha: float) -> PairLogps:
    """All that a token has, times ``alpha`` from the shorter answer's length on."""
    past = logps.places >= logps.lengths.min(1).values[logps.pair]
    read = {"logps": logps.logps, "divergences": logps.divergences}
    some = {n: torch.where(past, alpha * it, it) for n, it in read.items() if it is not None}
    return replace(logps, **some)


def weighted(
    policy: PairLogps, beside: Beside, squares: Tensor, *, losses: Sequence[Loss]
) -> Tensor:
    """WPO: a pair counts as much as its answers are the policy's own. Zhou et al. 2024
    (2406.11827), eq. 2: their tokens' probabilities over the expected one, ``squares`` in logs."""
    likely = replace(policy, logps=policy.logps.detach() - squares)
    return beside.of(losses[0], policy) * torch.exp(likely.mean_chosen + likely.mean_rejected)


def mixture(
    policy: PairLogps,
    beside: Beside,
    *,
    beta: float,
    losses: Sequence[Loss],
    weights: Sequence[float],
) -> Tensor:
    r"""A weighted sum of losses, each with keys of its own.

    ``beta`` is the scale of the reported rewards; every part has another.

    $\sum_k w_k L_k$
    """
    parts = [weight * beside.of(loss, policy) for loss, weight in zip(losses, weights)]
    return torch.stack(parts).sum(0)


def assembled(loss: partial) -> Loss:
    """The loss of a yaml, which has all of the yaml's keys, with the options among them around it.

    What is said of the loss in words, or as true or false, and its function does not take is a
    fact, for others to read. A number that nobody takes and a key that the function lacks are
    refused with a TypeError.
    """
    own = inspect.signature(loss.func).parameters
    keys = dict(loss.keywords)
    alpha, wpo = keys.pop("ld_alpha", 1.0), keys.pop("wpo", False)
    divergence = keys.pop("divergence", partial(reverse_kl))
    if "parts" in keys:
        keys |= _mixed(keys.pop("parts"))
    smoothed = keys.get("smooths")
    if smoothed and not 0 < keys[smoothed] < 0.5:
        raise ValueError(
            f"{smoothed}={keys[smoothed]}: give above 0, which has no logarithm, below 0.5"
        )
    keys = {n: it for n, it in keys.items() if n in own or not _is_fact(it)}
    inspect.signature(loss.func).bind_partial(**keys)
    for name, it in own.items():
        if it.kind is it.KEYWORD_ONLY and it.default is it.empty and name not in keys:
            raise TypeError(f"{loss.func.__name__} needs the key {name}")
    made = partial(loss.func, **keys)
    if divergence.func is not reverse_kl:
        made = partial(divergent, losses=(made,), divergence=divergence)
    if alpha != 1:
        if loss.keywords.get("unit") == "token":
            raise ValueError(f"loss.ld_alpha={alpha} is of losses on sums, and this is on means")
        made = partial(desensitised, losses=(made,), alpha=alpha)
    return partial(weighted, losses=(made,)) if wpo else made


def _is_fact(value: Any) -> bool:
    return value is None or isinstance(value, bool | str)


def _mixed(parts: Mapping[str, partial]) -> dict[str, Any]:
    """The parts of a mixture that count, as its ``losses`` and ``weights``."""
    found: dict[str, Any] = {"losses": [], "weights": []}
    for name, part in parts.items():
        keys = dict(part.keywords)
        weight = keys.pop("weight")
        if weight < 0:
            raise ValueError(f"loss.parts.{name}.weight={weight}: it must be at least 0")
        if weight > 0:
            found["losses"].append(assembled(partial(part.func, **keys)))
            found["weights"].append(weight)
    if not found["losses"]:
        raise ValueError("a mixture of nothing: give some part a weight, loss.parts.dpo.weight=1")
    return found
