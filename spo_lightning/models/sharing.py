"""A model in, how its batches are read out: packed, shared-prompt rows, or separate forwards."""

import logging
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.data.batch import Pair, collate
from spo_lightning.models import attention
from spo_lightning.models.checks import check
from spo_lightning.models.policy import Policy
from spo_lightning.models.reading import (
    Reading,
    line_of,
    precise,
    reading_of,
    text_config,
    vocabulary_of,
)
from spo_lightning.models.rewards import check_rewards, gives_rewards, reading_of_rewards
from spo_lightning.models.scorer import FLOATS, LOGITS, Scorer

log = logging.getLogger(__name__)


KNOWN = {"full_attention", "sliding_attention", "chunked_attention"}


def sharing_refusal(config: Any, longest: int) -> str | None:
    """Why the architecture cannot take a shared-prompt row of ``longest`` tokens, or None.

    Decided from the config: a sliding window passes on short rows and is wrong on long ones.
    """
    own = config._attn_implementation in attention.PACKED
    if config._attn_implementation not in ("sdpa", "eager") and not own:
        return f"attention implementation {config._attn_implementation} takes no 4-D mask"
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    if layers - KNOWN:
        return f"layers of type {', '.join(sorted(layers - KNOWN))}"
    chunk = getattr(config, "attention_chunk_size", None)
    if chunk and "chunked_attention" in layers and chunk < longest:
        return f"chunks of {chunk} tokens are shorter than the longest row ({longest})"
    window = getattr(config, "sliding_window", None)
    windowed = getattr(config, "use_sliding_window", True) and (
        "sliding_attention" in layers or not getattr(config, "layer_types", None)
    )
    if window and windowed and window < longest and not own:
        return f"a sliding window of {window} tokens is shorter than the longest row ({longest})"
    if getattr(config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    return None


def scorer_of_run(
    policy: Policy, cfg: DictConfig, pairs: Iterable[Pair], *, streamed: bool
) -> Scorer:
    """How the pairs of a run are read, as the config says; more come where they are streamed."""
    longest = longest_of(pairs)
    if streamed:  # prompt + one response has max_length at most, so a row has:
        longest = 2 * cfg.max_length
    logits = cfg.hardware.logits_mib * FLOATS
    scorer = scorer_of(policy, longest, share=cfg.model.share_prompt, logits=logits)
    if cfg.hardware.activation_checkpointing:
        policy.lm.gradient_checkpointing_enable(attention.RECOMPUTED)
    return scorer


def scorer_of(policy: Policy, longest: int, *, share: bool, logits: int) -> Scorer:
    """Decide how a policy's batches with rows of up to ``longest`` tokens are read.

    ``logits``: how many are alive at once.
    """
    policy.lm.train()  # dropout is off; activation checkpointing asks for it
    (check_rewards if policy.rewards else check)(policy.lm)
    return scorer_for(policy.lm, longest, share=share, logits=logits)


def longest_of(pairs: Iterable[Pair]) -> int:
    """Tokens of the longest row."""
    return max((len(pair) for pair in pairs), default=0)


def scorer_for(model: Any, longest: int, *, share: bool, logits: int = LOGITS) -> Scorer:
    """Decide once, before training, how batches with rows of up to ``longest`` tokens are read.

    Packed where the model has the package's attention; says so where that, or sharing prompts,
    does not work.
    """
    reading = reading_of_rewards(model) if gives_rewards(model) else reading_of(model)
    if reading.said:
        log.info("%s: %s.", type(model).__name__, reading.said)
    if Scorer(model, share, logits, reading).packs:
        refusal = refused(model, longest, reading)
        if refusal is None:
            return Scorer(model, share, logits, reading)
        log.info("Batches are padded, not packed: %s.", refusal)
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    shared = share and supports_sharing(model, longest, reading)
    return Scorer(model, shared, logits, reading)


def as_read_by(scorer: Scorer, model: Any) -> Scorer:
    """``model``, a reference, read as ``scorer`` reads: what was decided for one holds for it."""
    model.set_attn_implementation(text_config(scorer.model)._attn_implementation)
    return Scorer(model, scorer.shared, scorer.logits, scorer.reading)


def supports_sharing(model: Any, longest: int, reading: Reading | None = None) -> bool:
    """Whether rows may share their prompt; says so when not."""
    refusal = refused(model, longest, reading)
    if refusal:
        log.info("The prompt is not shared between responses: %s. Separate forwards.", refusal)
    return refusal is None


@torch.no_grad()
def refused(model: Any, longest: int, reading: Reading | None = None) -> str | None:
    """Why rows of up to ``longest`` tokens cannot share their prompt, or None.

    Config first, then a synthetic probe as long as the longest row: shared and separate forwards
    must agree to 1e-3 nats in every token; in half precision, where rounding alone may move a
    token by 0.1, to 0.1 (1 + 3 / sqrt(n)) in the mean over a response's n tokens: few tokens
    scatter (0.23 over two of SmolLM2's in bfloat16, as far from float32 packed as apart).
    """
    reading = reading or reading_of(model)
    told = None if reading.positions else "it cannot be told where a token stands"
    return told or sharing_refusal(text_config(model), longest) or _probe(model, longest, reading)


def _probe(model: Any, longest: int, reading: Reading) -> str | None:
    limit = getattr(text_config(model), "max_position_embeddings", None) or longest
    third = max(2, min(longest, limit) // 3)
    seeded = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary_of(model), (3 * third,), generator=seeded).tolist()
    pair = Pair(tuple(ids[:third]), tuple(ids[third : 2 * third]), tuple(ids[2 * third :]))
    # two pairs, the second shorter: rows of one batch must not see one another either
    other = Pair(pair.rejected[: third // 2], pair.prompt[:2], pair.chosen)
    batch = collate([pair, other], 0).to(model.device)
    together = Scorer(model, shared=True, reading=reading)
    try:
        shared = together(batch)
    except Exception as error:  # of a foreign forward, told in one line
        return f"its forward refuses the row ({line_of(error)})"
    off = replace(shared, logps=(shared.logps - together.apart(batch).logps).abs())
    if precise(model):
        worst, tolerance, of = off.logps.max().item(), 1e-3, "in a token"
    else:
        scatter = 1 + 3 / off.lengths.sqrt()
        worst, tolerance, of = (off.sums / off.lengths / scatter).max().item(), 0.1, "per token"
    if not worst <= tolerance:
        return f"a probe differs by {worst:.1g} nats {of} from separate forwards"
    return None
