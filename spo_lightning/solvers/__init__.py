"""The bilevel problem and what a solver is: F and G in, a direction for theta out.

Upper level F: a preference loss. Lower level G: supervised fine-tuning. Both have the same
unknowns theta. A solver may not know of a language model, a batch or an optimizer: it sees
closures that return one value per row. To add one: a file here with a frozen dataclass that has
``init`` and ``step``, and its yaml.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from spo_lightning.world import whole

Tensors = tuple[Tensor, ...]
BLOCK = 2**16  # values of an inner product that are in float64 at once, on a CPU


class Terms(NamedTuple):
    """What a closure gives for one microbatch.

    ``minimise``: tensors of one value per row; each is averaged over the rows of the whole outer
    step (all microbatches, all ranks) and the averages are summed. ``watch``: detached tensors of
    one value per row, averaged in the same way and handed back.
    """

    minimise: Tensors
    watch: dict[str, Tensor]


class Slope(NamedTuple):
    """A gradient with respect to theta and the averages of what was watched (0-d tensors)."""

    direction: Tensors
    means: dict[str, Tensor]


@dataclass(frozen=True)
class Problem:
    """F and G of the same theta, closed over one outer step's rows (or one microbatch of them)."""

    theta: Tensors  # the policy's trainable parameters, and only those
    upper: Callable[[Tensors], Tensor]  # F per pair [B]
    lower: Callable[[Tensors], Tensor]  # G per row [N], nats per token
    both: Callable[[Tensors], tuple[Tensor, Tensor]]  # (F, G) from one shared forward
    value: Tensor | None  # [N] the lower level's value under the reference, nats per token
    size: Tensor  # [N] tokens of each lower row
    # gradient(closure, theta): closure(microbatch as a Problem) -> Terms, differentiated at theta
    # over all microbatches of the step and reduced over ranks. At most one graph is alive at once.
    gradient: Callable[[Callable[["Problem"], Terms], Tensors], Slope]
    # the same for a closure that holds a gradient itself; None where the model cannot
    twice: Callable[[Callable[["Problem"], Terms], Tensors], Slope] | None = None
    # linearized(theta): the gradient of the mean of G there, and v -> H v once, from its graph,
    # which lives until then; None where that graph does not fit
    linearized: Callable[[Tensors], tuple[Slope, Callable[[Tensors], Tensors]] | None] = (
        lambda theta: None
    )


def upper_terms(part: Problem) -> Terms:
    """F to minimise; F and G to watch, from one shared forward."""
    upper, lower = part.both(part.theta)
    return Terms((upper,), {"upper": upper.detach(), "lower": lower.detach()})


def lower_terms(part: Problem) -> Terms:
    """G alone."""
    lower = part.lower(part.theta)
    return Terms((lower,), {"lower": lower.detach()})


def moved(theta: Tensors, along: Tensors, length: float) -> Tensors:
    """theta + length * along, detached."""
    return tuple(t.detach() + length * d for t, d in zip(theta, along))


def dot(left: Tensors, right: Tensors) -> Tensor:
    """The inner product, detached and accumulated in float64 (0-d)."""
    return torch.stack([whole(_dot(x.detach(), y.detach())) for x, y in zip(left, right)]).sum()


def _dot(left: Tensor, right: Tensor) -> Tensor:
    if left.device.type != "cpu" or hasattr(left, "full_tensor"):
        return (left.double() * right.double()).sum()
    # on a CPU whole tensors in float64 would not fit its cache: six times as slow at 28M weights
    blocks = zip(left.flatten().split(BLOCK), right.flatten().split(BLOCK))
    return torch.stack([torch.dot(x.double(), y.double()) for x, y in blocks]).sum()


class Step(NamedTuple):
    """The module adds ``displacement`` to theta, then the optimizer follows ``direction``."""

    direction: Tensors
    displacement: Tensors | None
    state: Any  # the solver's memory: a dict of tensors and numbers, saved in checkpoints
    logged: dict[str, Tensor]  # detached scalars; they appear as solver/<name>


class Solver(Protocol):
    """A frozen record of hyper-parameters."""

    def init(self, theta: Tensors) -> Any: ...

    def step(self, problem: Problem, state: Any) -> Step: ...
