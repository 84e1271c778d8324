"""A model in; nothing, or a refusal in one line, where its log-probabilities would be wrong."""

import logging
from typing import Any

import torch
from torch import Tensor

from spo_lightning.data.batch import Pair, collate
from spo_lightning.errors import UserError
from spo_lightning.models.reading import own_logits, precise, text_config, vocabulary_of
from spo_lightning.models.scorer import Scorer

log = logging.getLogger(__name__)

LENGTHS = ((5, 9, 7), (3, 4, 11))  # of prompt and responses: a batch with padding on either side


@torch.no_grad()
def check(model: Any) -> None:
    """Refuse a model that sees the future, or that is not read as its own forward reads.

    Where only its attention is at fault, it gets one of transformers' own instead, and says so.
    """
    pairs, plain = _pairs(model), []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + response], device=model.device)
            plain.append(_response(own_logits(model, ids), ids, len(response)))
    _check_causal(model, pairs[0])
    worst = 0.0
    attentions = _attentions(model)
    first = attentions[0]
    for attention in attentions:
        if attention != first:
            model.set_attn_implementation(attention)
        worst = _worst(Scorer(model, shared=False), pairs, torch.cat(plain))
        if worst <= (1e-3 if precise(model) else 1e-1):
            if attention != first:
                log.info("Attention is %s: %s is not right here.", attention, first)
            return
    raise UserError(
        f"{type(model).__name__} is not read right: log-probabilities differ by {worst:.2g} nats "
        f"from those of its own forward{' in evaluation' if model.training else ''}; not supported"
    )


def _attentions(model: Any) -> list[str]:
    """The one that the model has, then transformers' own."""
    found = [text_config(model)._attn_implementation]
    if model._can_set_attn_implementation():
        found += ["sdpa"] * model._supports_sdpa + ["eager"]
    return list(dict.fromkeys(found))


def _worst(scorer: Scorer, pairs: list[Pair], plain: Tensor) -> float:
    """The largest difference in a token; in half precision, where single ones round, the mean."""
    found = scorer.apart(collate(pairs, 0).to(plain.device)).logps
    off = (found.double() - plain).abs()
    return off.max().item() if precise(scorer.model) else off.mean().item()


def _pairs(model: Any) -> list[Pair]:
    size, pairs = vocabulary_of(model), []
    low = min(size // 8, 1000)
    seeded = torch.Generator().manual_seed(2)
    for lengths in LENGTHS:
        prompt, chosen, rejected = (
            tuple(torch.randint(low, size, (length,), generator=seeded).tolist())
            for length in lengths
        )
        pairs.append(Pair(prompt, chosen, rejected))
    return pairs


def _response(logits: Tensor, ids: Tensor, length: int) -> Tensor:
    """[length] log-probabilities of the last tokens of a row."""
    targets = ids[0, -length:, None]
    return logits[0, -length - 1 : -1].log_softmax(-1).gather(1, targets).squeeze(1)


def _check_causal(model: Any, pair: Pair) -> None:
    """Refuse a model in which a later token moves an earlier log-probability."""
    ids = torch.tensor([pair.prompt + pair.chosen], device=model.device)
    kept = len(pair.prompt)
    other = torch.cat([ids[:, :kept], ids[:, kept:].flip(1)], dim=1)
    one, two = (own_logits(model, row)[0, :kept].log_softmax(-1) for row in (ids, other))
    moved = (one - two).abs()
    worst = moved.max().item() if precise(model) else moved.mean().item()
    if not worst <= (1e-4 if precise(model) else 1e-2):
        raise UserError(
            f"{type(model).__name__} sees the future: a later token moves an earlier "
            f"log-probability by {worst:.2g} nats. It is no causal language model as it stands"
        )
