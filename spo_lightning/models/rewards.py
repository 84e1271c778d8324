"""A causal language model in, a reward model out; token pairs in, their answers' rewards out.

A reward model has the field's form, transformers' class for sequence classification with one
label: the body of a language model and a head, ``score``, that gives one number at the last token
that is not padding. The body runs as it does for log-probabilities, packed or in rows.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.data.batch import Pair, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.reading import (
    Reading,
    as_transformers,
    precise,
    text_config,
    vocabulary_of,
)
from spo_lightning.models.scorer import Scorer

LENGTHS = ((5, 9, 7), (3, 4, 11))  # of prompt and answers: a batch with padding on either side


def gives_rewards(lm: Any) -> bool:
    """Whether a transformers model is of the class that reward models have."""
    return type(lm).__name__.endswith("ForSequenceClassification")


def with_head(lm: Any, pad_id: int, seed: int) -> Any:
    """The language model's body, which is not copied, under a new head."""
    from transformers import AutoModelForSequenceClassification

    config = lm.config
    config.num_labels = 1
    text_config(lm).pad_token_id = pad_id  # its class looks there for the end of a text
    try:
        with torch.device("meta"):
            made = AutoModelForSequenceClassification.from_config(config)
        body, head = made.base_model_prefix, made.score
        fits = type(getattr(made, body)) is type(getattr(lm, body)) and type(head) is nn.Linear
    except (ValueError, AttributeError):
        fits = False
    if not fits:
        raise UserError(
            f"{type(lm).__name__} cannot be a reward model: transformers has no class that puts "
            "one score on its body"
        )
    setattr(made, body, getattr(lm, body))
    torch.manual_seed(seed)
    place = "cpu" if lm.device.type == "meta" else lm.device  # the body is not read yet
    made.score = nn.Linear(head.in_features, 1, head.bias is not None, place, lm.dtype)
    # as transformers begins it: rewards near 0, whatever the width
    nn.init.normal_(made.score.weight, std=getattr(text_config(lm), "initializer_range", 0.02))
    made.config = config
    return made.train(lm.training)


def at_the_end(pair: Pair, pad_id: int | None) -> Pair:
    """The pair with one token to be scored an answer, just past the answer's last.

    It is never read: what would predict it gives the reward. Padding ends no answer, so where a
    model's end mark is its padding too, the token before it does, as in transformers' own forward.
    """

    def ended(answer: tuple[int, ...]) -> tuple[int, ...]:
        kept = len(answer)
        while kept and answer[kept - 1] == pad_id:
            kept -= 1
        return (*answer[:kept], 0)

    chosen, rejected = (ended(answer) if answer else () for answer in (pair.chosen, pair.rejected))
    its, other = ((0, len(answer) - 1) if len(answer) > 1 else () for answer in (chosen, rejected))
    return replace(
        pair, chosen=chosen, rejected=rejected, chosen_context=its, rejected_context=other
    )


def to_reward(pairs: Pairs, lm: Any) -> Pairs:
    """The pairs as a reward model reads them. Their reference is 0: rewards are compared as they
    are."""
    ends = [at_the_end(pair, text_config(lm).pad_token_id) for pair in pairs.pairs]
    zeros = [torch.zeros(bool(pair.chosen) + bool(pair.rejected)) for pair in ends]
    return replace(pairs, pairs=ends, references=zeros)


def reading_of_rewards(lm: Any) -> Reading:
    """How a reward model is read; one of another form is refused."""
    head = getattr(lm, "score", None)
    head = getattr(head, "original_module", head)  # peft trains a copy beside it
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        labels = getattr(lm.config, "num_labels", None)
        raise UserError(
            f"{type(lm).__name__} with {labels} labels is no reward model of this package: it "
            "needs one label, by a linear layer `score`"
        )
    return Reading(lm.base_model_prefix, reward=True)


@torch.no_grad()
def rewards(lm: Any, pairs: Sequence[Pair]) -> Tensor:
    """[B, 2] of the chosen and of the rejected answers, 0 for one that is absent; one forward."""
    scorer = Scorer(lm, shared=False, reading=reading_of_rewards(lm))
    ends = [at_the_end(pair, text_config(lm).pad_token_id) for pair in pairs]
    return scorer(collate(ends, 0).to(lm.device)).sums


@torch.no_grad()
def check_rewards(lm: Any) -> None:
    """Refuse a reward model whose rewards would not be those of its own forward."""
    seeded, pairs, own = torch.Generator().manual_seed(2), [], []
    low, high = min(vocabulary_of(lm) // 8, 1000), vocabulary_of(lm)
    for lengths in LENGTHS:
        prompt, chosen, rejected = (
            tuple(torch.randint(low, high, (length,), generator=seeded).tolist())
            for length in lengths
        )
        pairs.append(Pair(prompt, chosen, rejected))
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + answer], device=lm.device)
            with as_transformers(lm):
                own.append(lm(input_ids=ids, use_cache=False).logits.double()[0, 0])
    off = (rewards(lm, pairs).double().flatten() - torch.stack(own)).abs().max().item()
    if not off <= (1e-3 if precise(lm) else 1e-1) * (1 + torch.stack(own).abs().max().item()):
        raise UserError(
            f"{type(lm).__name__} is not read right: rewards differ by {off:.2g} from those of "
            "its own forward; not supported"
        )
