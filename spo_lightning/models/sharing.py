"""A model in, how its batches are read out: packed, shared-prompt rows, or separate forwards."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.data.batch import Pair, collate
from spo_lightning.errors import UserError
from spo_lightning.models import attention
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import FLOATS, LOGITS, RECOMPUTED, Scorer

log = logging.getLogger(__name__)


def sharing_refusal(config: Any, longest: int) -> str | None:
    """Why the architecture cannot take a shared-prompt row of ``longest`` tokens, or None.

    Decided from the config: a sliding window passes on short rows and is wrong on long ones.
    """
    own = config._attn_implementation in attention.PACKED
    if config._attn_implementation not in ("sdpa", "eager") and not own:
        return f"attention implementation {config._attn_implementation} takes no 4-D mask"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers - {"full_attention", "sliding_attention"}:
        return f"layers of type {', '.join(sorted(layers - {'full_attention'}))}"
    window = getattr(config, "sliding_window", None)
    windowed = getattr(config, "use_sliding_window", True) and (
        "sliding_attention" in layers or not getattr(config, "layer_types", None)
    )
    if window and windowed and window < longest and not own:
        return f"a sliding window of {window} tokens is shorter than the longest row ({longest})"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return None


@torch.no_grad()
def check_head(model: Any) -> None:
    """Refuse an architecture whose logits are not its head on its last hidden states."""
    ids = tuple((torch.arange(16) % model.config.vocab_size).tolist())
    batch = collate([Pair(ids[:8], ids[8:], ids[8:])], 0).to(model.device)
    logits = model(input_ids=batch.input_ids[:, :16], use_cache=False).logits[0, 7:15]
    own = logits.double().log_softmax(-1).gather(1, batch.targets[:8, None]).squeeze(1)
    worst = (Scorer(model, shared=False).apart(batch).logps[:8] - own).abs().max().item()
    if not worst <= (1e-3 if model.dtype in (torch.float32, torch.float64) else 1e-1):
        raise UserError(
            f"{type(model).__name__} does more between its hidden states and its logits than its "
            f"output embedding (log-probabilities differ by {worst:.2g} nats): not supported"
        )


def scorer_of_run(
    cfg: DictConfig, policy: Policy, pairs: Iterable[Pair], *, streamed: bool
) -> Scorer:
    """How the pairs of a run are read, as the config says; more come where they are streamed."""
    longest = longest_of(pairs)
    if streamed:  # prompt + one response has max_length at most, so a row has:
        longest = 2 * cfg.max_length
    logits = cfg.hardware.logits_mib * FLOATS
    scorer = scorer_of(policy, longest, share=cfg.model.share_prompt, logits=logits)
    if cfg.hardware.activation_checkpointing:
        policy.lm.gradient_checkpointing_enable(RECOMPUTED)
    return scorer


def scorer_of(policy: Policy, longest: int, *, share: bool, logits: int) -> Scorer:
    """Decide how a policy's batches with rows of up to ``longest`` tokens are read.

    ``logits``: how many are alive at once.
    """
    check_head(policy.lm)
    policy.lm.train()  # dropout is off; activation checkpointing asks for it
    return scorer_for(policy.lm, longest, share=share, logits=logits)


def longest_of(pairs: Iterable[Pair]) -> int:
    """Tokens of the longest row."""
    return max((len(pair) for pair in pairs), default=0)


def scorer_for(model: Any, longest: int, *, share: bool, logits: int = LOGITS) -> Scorer:
    """Decide once, before training, how batches with rows of up to ``longest`` tokens are read.

    Packed where the model has the package's attention; says so where that, or sharing prompts,
    does not work.
    """
    if Scorer(model, share).packs:
        refusal = refused(model, longest)
        if refusal is None:
            return Scorer(model, share, logits)
        log.info("Batches are padded, not packed: %s.", refusal)
        model.set_attn_implementation("sdpa")
    return Scorer(model, share and supports_sharing(model, longest), logits)


def as_read_by(scorer: Scorer, model: Any) -> Scorer:
    """``model``, a reference, read as ``scorer`` reads: what was decided for one holds for it."""
    model.set_attn_implementation(scorer.model.config._attn_implementation)
    return Scorer(model, scorer.shared, scorer.logits)


def supports_sharing(model: Any, longest: int) -> bool:
    """Whether rows may share their prompt; says so when not."""
    refusal = refused(model, longest)
    if refusal:
        log.info("The prompt is not shared between responses: %s. Separate forwards.", refusal)
    return refusal is None


@torch.no_grad()
def refused(model: Any, longest: int) -> str | None:
    """Why rows of up to ``longest`` tokens cannot share their prompt, or None.

    Config first, then a synthetic probe as long as the longest row: shared and separate forwards
    must agree to 1e-3 nats in every token; in half precision, where rounding alone may move a
    token by 0.1, to 0.1 in the mean over a response's tokens.
    """
    return sharing_refusal(model.config, longest) or _probe(model, longest)


def _probe(model: Any, longest: int) -> str | None:
    limit = getattr(model.config, "max_position_embeddings", None) or longest
    third = max(2, min(longest, limit) // 3)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (3 * third,), generator=seeded).tolist()
    pair = Pair(tuple(ids[:third]), tuple(ids[third : 2 * third]), tuple(ids[2 * third :]))
    # two pairs, the second shorter: rows of one batch must not see one another either
    other = Pair(pair.rejected[: third // 2], pair.prompt[:2], pair.chosen)
    batch = collate([pair, other], 0).to(model.device)
    together = Scorer(model, shared=True)
    try:
        shared = together(batch)
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        return f"its forward refuses the row ({str(error).splitlines()[0]})"
    off = replace(shared, logps=(shared.logps - together.apart(batch).logps).abs())
    if model.dtype in (torch.float32, torch.float64):
        worst, tolerance, of = off.logps.max().item(), 1e-3, "in a token"
    else:
        worst, tolerance, of = (off.sums / off.lengths).max().item(), 0.1, "per token"
    if not worst <= tolerance:
        return f"a probe differs by {worst:.1g} nats {of} from separate forwards"
    return None
