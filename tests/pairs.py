"""PairLogps from sums and lengths, and random ones: what the tests of losses and solvers draw."""

from pathlib import Path

import torch
from torch import Tensor

from spo_lightning.models.scorer import PairLogps

CONF = Path(__file__).resolve().parents[1] / "conf"


def pairs(chosen, rejected, chosen_length, rejected_length, dtype=torch.float64) -> PairLogps:
    """Every sum is spread evenly over its tokens. Differentiable in the sums."""
    sums = [torch.as_tensor(s, dtype=dtype).reshape(-1) for s in (chosen, rejected)]
    counts = [torch.as_tensor(n).reshape(-1) for n in (chosen_length, rejected_length)]
    tokens = torch.stack(counts, 1).flatten()  # [2B], pair by pair, chosen before rejected
    slot = torch.repeat_interleave(torch.arange(len(tokens)), tokens)
    means = (torch.stack(sums, 1).flatten() / tokens)[slot]
    rows = torch.arange(len(sums[0]))
    return PairLogps(means, slot // 2, slot % 2 == 1, len(sums[0]), rows=rows)


def random_lengths(count: int, seed: int) -> Tensor:
    """[count, 2] 1 to 40 tokens."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randint(1, 41, (count, 2), generator=seeded)


def random_sums(lengths: Tensor, seed: int) -> Tensor:
    """[count, 2] log-probabilities between -4 and -0.01 nats per token."""
    seeded = torch.Generator().manual_seed(seed)
    means = torch.rand(lengths.shape, generator=seeded, dtype=torch.float64)
    return -(0.01 + 3.99 * means) * lengths
