"""Token pairs in, the same with the sentences of their chosen answers out, for who weighs them.

pysbd says where a sentence ends in the text, and decoding which token that is. How near a sentence
is to its prompt says a function of the user's, or a model that embeds texts.
"""

import importlib
import logging
import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.nearest import Similarity, embedded

log = logging.getLogger(__name__)


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
            return cls(segmenter, embedded(loss.similarity, device, "loss.similarity"))
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
