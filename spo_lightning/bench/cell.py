"""A shape and a vocabulary in; random pairs, their text, a tokenizer and a model's directory out.

A token is a word, ``t17`` is token 17, so that text and tokens say exactly the same.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.data.batch import Pair
from spo_lightning.errors import UserError
from spo_lightning.models.built import cause
from spo_lightning.models.policy import DTYPES

EOS, PAD = "</s>", "<pad>"


@dataclass(frozen=True)
class Cell:
    """A shape, lengths from its ranges, at one vocabulary."""

    shape: str
    vocabulary: int
    prompt: tuple[int, int]  # tokens, the extremes included
    completion: tuple[int, int]  # tokens of either response, its end mark included

    @property
    def name(self) -> str:
        return f"{self.shape} {self.vocabulary}"

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + one response."""
        return self.prompt[1] + self.completion[1]


def drawn(cell: Cell, count: int, seed: int) -> list[Pair]:
    """Pairs of random tokens, both responses ended by the end mark."""
    chance, words = random.Random(seed), cell.vocabulary - 2

    def text(least: int, most: int, end: tuple[int, ...]) -> tuple[int, ...]:
        length = chance.randint(least, most) - len(end)
        return (*(chance.randrange(words) for _ in range(length)), *end)

    return [
        Pair(
            text(*cell.prompt, ()),
            text(*cell.completion, (words,)),
            text(*cell.completion, (words,)),
            row=row,
        )
        for row in range(count)
    ]


def as_text(pairs: Sequence[Pair]) -> list[dict[str, str]]:
    """The pairs as rows; the end mark is left to whoever tokenises them."""

    def words(ids: Sequence[int]) -> str:
        return " ".join(f"t{i}" for i in ids)

    return [
        {
            "prompt": words(pair.prompt),
            "chosen": " " + words(pair.chosen[:-1]),
            "rejected": " " + words(pair.rejected[:-1]),
        }
        for pair in pairs
    ]


def word_tokenizer(vocabulary: int) -> Any:
    """``t0``, ``t1``, ... and last the end mark and the padding."""
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {f"t{i}": i for i in range(vocabulary - 2)}
    # no text of ours is unknown; the tokenizer asks for a mark all the same
    ids = {**words, EOS: vocabulary - 2, PAD: vocabulary - 1}
    made = Tokenizer(WordLevel(ids, unk_token=PAD))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=made, eos_token=EOS, pad_token=PAD, padding_side="right"
    )


def save_model(
    directory: Path,
    model: DictConfig,
    vocabulary: int,
    seed: int,
    device: torch.device | str = "cpu",
) -> int:
    """Random weights of ``model.config`` and the tokenizer; returns the number of parameters.

    ``device``: where the weights are drawn.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM

    tokenizer = word_tokenizer(vocabulary)
    torch.manual_seed(seed)
    settings: Any = OmegaConf.to_container(model.config, resolve=True)
    try:
        config = AutoConfig.for_model(
            **settings,
            vocab_size=vocabulary,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
        with torch.device(device):
            lm = AutoModelForCausalLM.from_config(config, dtype=DTYPES[model.dtype])
    except (ValueError, TypeError, KeyError, StrictDataclassError) as error:
        raise UserError(f"model.config does not build: {cause(error)}") from error
    lm.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return sum(p.numel() for p in lm.parameters())
