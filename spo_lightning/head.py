"""Hidden states in, log-probabilities of the scored tokens out, without a copy of the logits."""

from typing import Any

import torch
from torch import Tensor

# logits that are read at once: so that they stay in a processor's cache; a GPU's kernels want many
BLOCK = {"cpu": 2**18, "cuda": 2**25}


class TokenLogps(torch.autograd.Function):
    """[S] log-softmax of ``logits`` [S, vocabulary] at ``targets`` [S].

    Keeps the logits and their log-sum-exp, and the gradient is written in one pass; autograd's own
    way through ``log_softmax`` keeps a second tensor of their size. First order only.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        total = torch.cat([rows.logsumexp(1) for rows in logits.split(_rows(logits))])
        ctx.save_for_backward(logits, targets, total)
        return logits.gather(1, targets[:, None]).squeeze(1) - total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, targets, total = ctx.saved_tensors
        found, few = torch.empty_like(logits), _rows(logits)
        parts = (tensor.split(few) for tensor in (logits, total, gradient, found))
        for rows, summed, slope, out in zip(*parts):
            torch.sub(rows, summed[:, None], out=out).exp_().mul_(-slope[:, None])
        found.scatter_add_(1, targets[:, None], gradient[:, None])
        return found, None


def _rows(logits: Tensor) -> int:
    return max(1, BLOCK.get(logits.device.type, BLOCK["cpu"]) // logits.shape[1])


def token_logps(logits: Tensor, targets: Tensor, *, fused: bool) -> Tensor:
    """[S] log-probability of each target; not ``fused``: differentiable any number of times."""
    if fused:
        return TokenLogps.apply(logits, targets)  # type: ignore[return-value]
    return logits.gather(1, targets[:, None]).squeeze(1) - logits.logsumexp(1)
