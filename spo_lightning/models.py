"""PairBatch in, PairLogps out: the only code that touches logits.

The prompt of a pair is encoded once. Its two responses follow it in the same row, a 4-D attention
mask keeps them apart, and the rejected one's positions restart after the prompt. A model that
cannot take such a row runs two separate forwards instead (``Scorer.shared``), and says so.
"""

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from spo_lightning.data.batch import CHOSEN, PAD, REJECTED, Pair, PairBatch, collate
from spo_lightning.errors import UserError

log = logging.getLogger(__name__)

CHUNK = 2048  # scored tokens whose logits are alive at once in the head
KEPT = 8  # activations that a layer keeps for its backward, in units of a token's width


@dataclass(frozen=True)
class PairLogps:
    """One log-probability per completion token, with its pair and its side."""

    logps: Tensor  # [S] nats
    pair: Tensor  # [S] which of the B pairs
    side: Tensor  # [S] bool: False chosen, True rejected
    pairs: int  # B

    def _per_side(self, values: Tensor) -> Tensor:
        # float64: the sum of a long answer must not depend on the order of its tokens
        wide = torch.zeros(2 * self.pairs, dtype=torch.float64, device=values.device)
        slot = 2 * self.pair + self.side.long()
        return wide.index_add(0, slot, values.double()).to(values.dtype).view(-1, 2)

    @cached_property
    def sums(self) -> Tensor:
        """[B, 2] log pi(y_w | x) and log pi(y_l | x)."""
        return self._per_side(self.logps)

    @cached_property
    def lengths(self) -> Tensor:
        """[B, 2] completion tokens; an absent response counts as one, so means stay finite."""
        return self._per_side(torch.ones_like(self.logps.detach())).clamp(min=1)

    @property
    def chosen(self) -> Tensor:
        return self.sums[:, 0]

    @property
    def rejected(self) -> Tensor:
        return self.sums[:, 1]

    @property
    def chosen_length(self) -> Tensor:
        return self.lengths[:, 0]

    @property
    def rejected_length(self) -> Tensor:
        return self.lengths[:, 1]

    @property
    def gap(self) -> Tensor:
        """[B] log pi(y_w | x) - log pi(y_l | x)."""
        return self.chosen - self.rejected

    @property
    def mean_chosen(self) -> Tensor:
        """[B] nats per token."""
        return self.chosen / self.chosen_length

    @property
    def mean_rejected(self) -> Tensor:
        return self.rejected / self.rejected_length

    @property
    def mean_gap(self) -> Tensor:
        """[B] the gap of the two per-token means."""
        return self.mean_chosen - self.mean_rejected


def reference_logps(batch: PairBatch) -> PairLogps:
    """The reference's PairLogps that travel with the batch."""
    if batch.reference is None:
        raise ValueError("the batch carries no reference log-probabilities")
    return PairLogps(batch.reference, batch.pair, batch.rejected, len(batch))


def tree_mask(segment: Tensor) -> Tensor:
    """[B, 1, T, T] True where a column may be attended: causal, and never across the responses.

    A padding row attends to itself, so that no row of the softmax is empty.
    """
    width = segment.shape[1]
    ones = torch.ones(width, width, dtype=torch.bool, device=segment.device)
    asks, gives = segment[:, :, None], segment[:, None, :]
    apart = (asks == REJECTED) & (gives == CHOSEN)
    seen = ones.tril() & ~apart & (gives != PAD)
    return (seen | torch.eye(width, dtype=torch.bool, device=segment.device))[:, None]


def sides(batch: PairBatch) -> tuple[PairBatch, PairBatch]:
    """The batch as ``[prompt | chosen]`` rows and as ``[prompt | rejected]`` rows."""
    flipped = []
    for ids, lengths in zip(batch.input_ids.tolist(), batch.lengths.tolist()):
        p, c, r = lengths
        flipped.append(Pair(tuple(ids[:p]), tuple(ids[p + c : p + c + r]), ()))
    return batch.chosen_only(), collate(flipped, 0).to(batch.input_ids.device)


def token_logps(head: Callable[[Tensor], Tensor], hidden: Tensor, targets: Tensor) -> Tensor:
    """[S] log-probability of each target under the head, log-softmax in float32 at least."""
    logits = head(hidden)
    picked = logits.gather(1, targets[:, None]).squeeze(1)
    return picked - logits.logsumexp(1)


class Scorer(nn.Module):
    """Scores pairs with a causal language model.

    ``model`` is a transformers causal LM (adapters, if any, injected in place). ``shared`` says
    whether its architecture takes the shared-prompt row, see ``supports_sharing``.
    """

    def __init__(self, model: Any, shared: bool):
        super().__init__()
        self.model, self.shared = model, shared

    def forward(self, batch: PairBatch) -> PairLogps:
        """Log-probabilities of every completion token. Differentiable."""
        if self.shared or not bool(batch.rejected.any()):
            return PairLogps(self._score(batch), batch.pair, batch.rejected, len(batch))
        chosen, rejected = (self._score(side) for side in sides(batch))
        logps = chosen.new_zeros(batch.pair.shape)
        logps = logps.masked_scatter(~batch.rejected, chosen)
        logps = logps.masked_scatter(batch.rejected, rejected)
        return PairLogps(logps, batch.pair, batch.rejected, len(batch))

    def twice(self) -> Callable[[], AbstractContextManager] | None:
        """A context whose forwards can be differentiated twice, None where there is none."""
        attention = self.model.config._attn_implementation
        return {"eager": nullcontext, "sdpa": MathKernel}.get(attention)

    def smaller(self, batch: PairBatch) -> list[PairBatch]:
        """The batch in parts of which a forward inside ``twice`` fits where the whole one did.

        The kernels that can be differentiated twice keep attention matrices, heads * T^2 numbers
        per row and layer beside the T * width of everything else that a forward keeps.
        """
        config = self.model.config
        width = config.hidden_size / config.num_attention_heads
        longest = int(batch.lengths[:, :2].sum(1).max())
        return batch.split(max(1, int(len(batch) * KEPT * width / longest)))

    def _score(self, batch: PairBatch) -> Tensor:
        hidden = self._hidden(batch)[batch.pair, batch.predictor]  # [S, width]
        score = partial(token_logps, self._logits)
        targets = batch.targets
        if len(targets) <= CHUNK:
            return score(hidden, targets)
        parts = zip(hidden.split(CHUNK), targets.split(CHUNK))
        return torch.cat([checkpoint(score, h, t, use_reentrant=False) for h, t in parts])

    @torch.no_grad()
    def top(self, batch: PairBatch, k: int) -> tuple[Tensor, Tensor]:
        """[S] entropy (bits) and mass of the k likeliest next tokens, not renormalised.

        H_k = -sum p log2 p and M_k = sum p over the k largest p. Shi et al. 2410.11677, section 5.
        """
        hidden = self._hidden(batch)[batch.pair, batch.predictor]
        parts = []
        for chunk in hidden.split(CHUNK):
            p = self._logits(chunk).softmax(-1)
            p = p.topk(min(k, p.shape[-1]), dim=-1).values
            parts.append(torch.stack([-torch.xlogy(p, p).sum(-1) / math.log(2), p.sum(-1)]))
        entropy, mass = torch.cat(parts, dim=1)
        return entropy, mass

    @torch.no_grad()
    def hidden_sums(self, batch: PairBatch) -> Tensor:
        """[B, 2, width] in float64: per side, the last hidden states that predict its tokens."""
        if self.shared or not bool(batch.rejected.any()):
            parts = [(batch, 2 * batch.pair + batch.rejected.long())]
        else:
            parts = [(part, 2 * part.pair + side) for side, part in enumerate(sides(batch))]
        states = torch.cat([self._hidden(p)[p.pair, p.predictor] for p, _ in parts]).double()
        sums = states.new_zeros(2 * len(batch), states.shape[1])
        slots = torch.cat([slot for _, slot in parts])
        return sums.index_add(0, slots, states).view(len(batch), 2, -1)

    def _logits(self, hidden: Tensor) -> Tensor:
        """[S, vocabulary] in float32 at least."""
        logits = self.model.get_output_embeddings()(hidden)
        logits = logits if logits.dtype == torch.float64 else logits.float()
        cap = getattr(self.model.config, "final_logit_softcapping", None)
        return cap * torch.tanh(logits / cap) if cap else logits

    def _hidden(self, batch: PairBatch) -> Tensor:
        """[B, T, width] last hidden states."""
        mask: Tensor = batch.segment != PAD
        if self.shared and bool(batch.rejected.any()):
            mask = tree_mask(batch.segment)
            if self.model.config._attn_implementation != "sdpa":
                # eager adds the mask to the scores; a boolean one would be silently wrong there
                dtype = self.model.dtype
                blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                mask = blocked.masked_fill(~mask, torch.finfo(dtype).min)
        return self.model.base_model(
            input_ids=batch.input_ids,
            attention_mask=mask,
            position_ids=batch.position_ids,
            use_cache=False,
        ).last_hidden_state


class MathKernel(AbstractContextManager):
    """sdpa's math kernel, which can be differentiated twice; unlike sdpa_kernel, entered again."""

    def __enter__(self) -> None:
        self.inside = sdpa_kernel(SDPBackend.MATH)
        self.inside.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.inside.__exit__(*error)


def _kernels() -> tuple[AbstractContextManager, AbstractContextManager]:
    """Around a layer's forward, and around its recomputation: with the kernel the forward had."""
    cuda = torch.backends.cuda  # these flags hold on every device
    fast = cuda.flash_sdp_enabled() or cuda.mem_efficient_sdp_enabled()
    return nullcontext(), nullcontext() if fast else MathKernel()


# how activations are checkpointed
RECOMPUTED: dict[str, Any] = {"use_reentrant": False, "context_fn": _kernels}


def sharing_refusal(config: Any, longest: int) -> str | None:
    """Why the architecture cannot take a shared-prompt row of ``longest`` tokens, or None.

    Decided from the config: a sliding window passes on short rows and is wrong on long ones.
    """
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention implementation {config._attn_implementation} takes no 4-D mask"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(layers - {'full_attention'}))}"
    window = getattr(config, "sliding_window", None)
    windowed = getattr(config, "use_sliding_window", True) and (
        "sliding_attention" in layers or not getattr(config, "layer_types", None)
    )
    if window and windowed and window < longest:
        return f"a sliding window of {window} tokens is shorter than the longest row ({longest})"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return None


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse an architecture whose logits are not its head on its last hidden states."""
    ids = torch.arange(16) % model.config.vocab_size
    batch = collate([Pair(tuple(ids[:8].tolist()), tuple(ids[8:].tolist()), ())], 0)
    batch = batch.to(model.device)
    logits = model(input_ids=batch.input_ids, use_cache=False).logits[0, 7:15]
    own = logits.double().log_softmax(-1).gather(1, batch.targets[:, None]).squeeze(1)
    worst = (Scorer(model, shared=False)(batch).logps - own).abs().max().item()
    if not worst <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 1e-1):
        raise UserError(
            f"{type(model).__name__} does more between its hidden states and its logits than its "
            f"output embedding (log-probabilities differ by {worst:.2g} nats): not supported"
        )


@torch.no_grad()
def supports_sharing(model: Any, longest: int) -> bool:
    """Decide once, before training, whether rows may share their prompt; say so when not.

    Config first, then a synthetic probe as long as the longest row: shared and separate forwards
    must agree per token to 1e-3 in float32 (5e-2 in half precision).
    """
    refusal = sharing_refusal(model.config, longest) or _probe(model, longest)
    if refusal:
        log.info("The prompt is not shared between responses: %s. Separate forwards.", refusal)
    return refusal is None


def _probe(model: Any, longest: int) -> str | None:
    limit = getattr(model.config, "max_position_embeddings", None) or longest
    third = max(2, min(longest, limit) // 3)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3 * third,), generator=seeded).tolist()
    pair = Pair(tuple(ids[:third]), tuple(ids[third : 2 * third]), tuple(ids[2 * third :]))
    batch = collate([pair], 0).to(model.device)
    try:
        shared = Scorer(model, shared=True)(batch).logps
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its forward refuses the row ({str(error).splitlines()[0]})"
    separate = Scorer(model, shared=False)(batch).logps
    worst = (shared - separate).abs().max().item()
    tolerance = 1e-3 if model.dtype in (torch.float32, torch.float64) else 5e-2
    if not worst <= tolerance:
        return f"a probe differs by {worst:.1g} nats per token from separate forwards"
    return None
