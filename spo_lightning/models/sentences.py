"""Token pairs in, the same with the sentences of their chosen answers out, for who weighs them.

pysbd says where a sentence ends in the text, and decoding which token that is. How near a sentence
is to its prompt says a function of the user's, or a model that embeds texts.
"""

import importlib
import logging
import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError

log = logging.getLogger(__name__)

Similarity = Callable[[str, Sequence[str]], list[float]]  # of a prompt to each sentence


@dataclass(frozen=True)
class Sentences:
    """How answers are split, and how their sentences are compared with the prompt."""

    segmenter: Any
    similarity: Similarity | None

    @classmethod
    def of(cls, loss: Any, device: torch.device) -> "Sentences":
        """As the loss's keys ``language`` and ``similarity`` say."""
        try:
            from pysbd import Segmenter  # type: ignore[import-not-found]
        except ImportError as error:
            said = 'this loss splits sentences by pysbd: pip install "spo-lightning[aspo]"'
            raise UserError(said) from error
        try:
            segmenter = Segmenter(language=loss.language, clean=False, char_span=True)
        except ValueError as error:
            raise UserError(f"loss.language={loss.language}: {error}") from error
        if loss.similarity is None:
            return cls(segmenter, None)
        if Path(loss.similarity).is_dir():
            return cls(segmenter, _embedded(loss.similarity, device))
        return cls(segmenter, _called(loss.similarity))

    def __call__(self, pairs: Pairs, tokenizer: Any) -> Pairs:
        found = [self._split(pair, tokenizer) for pair in pairs.pairs]
        if found:
            count = sum(len(pair.sentences) for pair in found) / len(found)
            log.info("Sentences: %.1f in a chosen answer", count)
        return replace(pairs, pairs=found)

    def _split(self, pair: Pair, tokenizer: Any) -> Pair:
        def text(ids: Sequence[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        size, whole = len(pair.chosen), text(pair.chosen)
        # a space after a sentence is the next one's, as it is in most tokens
        marks = [span.start + len(span.sent.rstrip()) for span in self.segmenter.segment(whole)]
        ends = dict[int, int]()  # tokens: characters
        for mark in sorted(marks):
            known = range(1, size + 1)
            tokens = bisect_left(known, mark, key=lambda n: len(text(pair.chosen[:n]))) + 1
            ends[min(tokens, size)] = mark
        if ends:  # what comes after the last sentence, its end mark for one, is a part of it
            ends[size] = ends.pop(max(ends))
        marks = [0, *ends.values()]
        parts = [whole[a:b].strip() for a, b in zip(marks, marks[1:])]
        near = self.similarity(text(pair.prompt), parts) if self.similarity else ()
        return replace(pair, sentences=tuple(ends) or (size,), similarities=tuple(near))


def _called(path: str) -> Similarity:
    module, _, name = path.rpartition(".")
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"loss.similarity={path}: no such directory, nor such a function ({error})"
        ) from error

    def similarity(prompt: str, sentences: Sequence[str]) -> list[float]:
        found = [function(prompt, sentence) for sentence in sentences]
        for value in found:
            if not (isinstance(value, int | float) and math.isfinite(value)):
                raise UserError(f"loss.similarity={path} returned {value!r}, not a finite number")
        return [float(value) for value in found]

    return similarity


def _embedded(directory: str, device: torch.device) -> Similarity:
    """Cosines of the means of a model's last hidden states."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModel.from_pretrained(
            directory, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"loss.similarity={directory} holds no embedding model: {said}") from error
    model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length

    @torch.no_grad()
    def similarity(prompt: str, sentences: Sequence[str]) -> list[float]:
        how = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        words = tokenizer([prompt, *sentences], **how).to(device)
        states, read = model(**words).last_hidden_state, words["attention_mask"][..., None]
        means = (states * read).sum(1) / read.sum(1).clamp(min=1)
        return F.cosine_similarity(means[:1], means[1:]).tolist()

    return similarity
