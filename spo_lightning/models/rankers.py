"""A ranker and pairs of answers in, which one it prefers and by how much out.

A ranker is a causal language model whose tokenizer keeps how it is asked (``Policy.template``): a
prompt with both answers, whose next token names the better one.
"""

from collections.abc import Sequence
from typing import Any

import torch

from spo_lightning.data.encode import encode_some
from spo_lightning.data.ranking import questions, to_letters
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import LOGITS
from spo_lightning.models.sharing import longest_of, scorer_of


@torch.no_grad()
def preferences(
    ranker: Policy,
    asked: Sequence[tuple[Any, Any, Any]],
    *,
    max_length: int,
    batch_size: int,
) -> list[float | None]:
    """Of each (prompt, one answer, another) the log-odds that the one is better, the mean of both
    orders; None where they are alike, one is empty or they do not fit.

    Texts or messages, as rows of data have them. ``batch_size``: questions per forward.
    """
    if ranker.template is None:
        name = ranker.base or "the model"
        raise UserError(f"{name} is no ranker: train one with loss=ranker")
    rows = [{"prompt": it, "chosen": one, "rejected": other} for it, one, other in asked]
    rows = questions(rows, ranker.template, ranker.tokenizer)
    how = {"on_mismatch": "split", "strict": False, "scored": "assistant", "where": "asked"}
    found = encode_some(rows, ranker.tokenizer, range(len(rows)), max_length=max_length, **how)
    pairs = to_letters(Pairs(found.pairs, None, ranker.tokenizer.pad_token_id))
    odds: list[list[float]] = [[] for _ in asked]
    scorer = scorer_of(ranker, longest_of(pairs.pairs), share=True, logits=LOGITS)
    for places in pairs.batches(batch_size):
        gaps = scorer(pairs.batch(places).to(ranker.lm.device)).gap.tolist()
        for place, gap in zip(places, gaps):
            odds[pairs.pairs[place].row // 2].append(gap)
    return [sum(both) / 2 if len(both) == 2 else None for both in odds]
