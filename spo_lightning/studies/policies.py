"""Start probabilities in, a softmax policy over a few answers out. Add one: a function, its yaml.

Letters: N starts, each a policy of its own that trains by itself; K answers to the one prompt, of
which the first is y_w, the second y_l, and the others are O; D parameters of each policy.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Generator, Tensor


@dataclass(frozen=True)
class LogLinear:
    """N policies whose logits are linear in theta: logit(y) = base(y) + <phi(y), theta>."""

    features: Tensor  # [N, K, D] phi
    base: Tensor  # [N, K] nats
    start: Tensor  # [N, D] theta before training

    def logps(self, theta: Tensor) -> Tensor:
        """[N, K] log pi(y)."""
        return (self.base + (self.features @ theta[:, :, None]).squeeze(-1)).log_softmax(-1)

    def scores(self, theta: Tensor) -> Tensor:
        """[N, K, D] the gradient of log pi(y) with respect to theta: phi(y) - E phi."""
        mean = self.logps(theta).exp()[:, None, :] @ self.features
        return self.features - mean

    def only(self, starts: slice) -> "LogLinear":
        """Some of the starts."""
        return LogLinear(self.features[starts], self.base[starts], self.start[starts])


Make = Callable[[Tensor, Generator], LogLinear]  # from start probabilities [N, K]


def draw(count: int, answers: int, chosen: Sequence[float], seeded: Generator) -> Tensor:
    """[N, K] start probabilities: pi(y_w) log-uniform in ``chosen``, the rest split at random.

    The split is uniform over all splits (a flat Dirichlet).
    """
    low, high = chosen
    if not 0 < low <= high < 1:
        raise ValueError(f"study.chosen={list(chosen)}: 0 < lowest <= highest < 1")
    if answers < 3:
        raise ValueError(f"study.answers={answers}: y_w, y_l and at least one other make 3")
    first = _uniform((count, 1), (math.log(low), math.log(high)), seeded).exp()
    waits = -torch.rand(count, answers - 1, generator=seeded, dtype=torch.float64).log()
    return torch.cat([first, (1 - first) * waits / waits.sum(1, keepdim=True)], dim=1)


def _uniform(shape: tuple[int, ...], ends: Sequence[float], seeded: Generator) -> Tensor:
    low, high = ends
    return low + (high - low) * torch.rand(shape, generator=seeded, dtype=torch.float64)


def tabular(initial: Tensor, seeded: Generator) -> LogLinear:
    """A logit of its own for every answer: theta holds the logits. ``seeded`` is not needed."""
    count, answers = initial.shape
    own = torch.eye(answers, dtype=initial.dtype).expand(count, -1, -1)
    return LogLinear(own, torch.zeros_like(initial), initial.log())


def similar(
    initial: Tensor,
    seeded: Generator,
    *,
    dimensions: int,
    cosine: Sequence[float],
    length: Sequence[float],
) -> LogLinear:
    """y_w and y_l share features: phi(y_w) is a unit vector, phi(y_l) has this cosine to it and
    this length, each drawn uniformly between its two ends; the others are random unit vectors.

    theta = 0 is the start: the base logits are the start's log-probabilities.
    """
    if dimensions < 2:
        raise ValueError(f"dimensions={dimensions}: two directions at least, to turn y_l by")
    if not -1 <= cosine[0] <= cosine[1] <= 1:
        raise ValueError(f"cosine={list(cosine)}: -1 <= lowest <= highest <= 1")
    if not 0 < length[0] <= length[1]:
        raise ValueError(f"length={list(length)}: 0 < shortest <= longest")
    count, answers = initial.shape
    shape = count, answers, dimensions
    features = torch.randn(shape, generator=seeded, dtype=initial.dtype)
    features = features / features.norm(dim=-1, keepdim=True)
    turn, size = (_uniform((count,), ends, seeded) for ends in (cosine, length))
    features[:, :2] = 0
    features[:, 0, 0] = 1
    features[:, 1, 0] = size * turn
    features[:, 1, 1] = size * (1 - turn.square()).sqrt()
    start = torch.zeros(count, dimensions, dtype=initial.dtype)
    return LogLinear(features, initial.log(), start)
