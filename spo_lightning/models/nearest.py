"""A text and others in, how near each of them is to it out: by a model that embeds, or by words.

A new measure is a function that gives a ``Similarity``, and a yaml in ``conf/retrieval``.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from spo_lightning.errors import UserError

Similarity = Callable[[str, Sequence[str]], list[float]]  # of a text to each of the others


def embedded(directory: str, device: torch.device | str, key: str) -> Similarity:
    """Cosines of the means of a model's last hidden states; ``key`` names it in a refusal."""
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        model: Any = AutoModel.from_pretrained(
            directory, local_files_only=True, use_safetensors=True
        )
    except (OSError, ValueError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"{key}={directory} holds no embedding model: {said}") from error
    model.to(device).eval()
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    limit = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length

    @torch.no_grad()
    def similarity(text: str, others: Sequence[str]) -> list[float]:
        how = {"padding": True, "truncation": True, "max_length": limit, "return_tensors": "pt"}
        words = tokenizer([text, *others], **how).to(device)
        states, read = model(**words).last_hidden_state, words["attention_mask"][..., None]
        means = (states * read).sum(1) / read.sum(1).clamp(min=1)
        return F.cosine_similarity(means[:1], means[1:]).tolist()

    return similarity


def embeddings(*, model: str) -> Similarity:
    """The same, for ``retrieval=embeddings``."""
    return embedded(model, "cpu", "retrieval.model")


def bm25(*, k1: float, b: float) -> Similarity:
    """Words in common, rare ones before frequent ones."""
    try:
        import bm25s  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(
            "retrieval=bm25 needs bm25s: pip install 'spo-lightning[retrieval]', or take "
            "retrieval=embeddings"
        ) from error

    def words(texts: Sequence[str]) -> Any:
        return bm25s.tokenize([*texts], stopwords=[], return_ids=False, show_progress=False)

    def similarity(text: str, others: Sequence[str]) -> list[float]:
        known = words(others)
        asked = [word for word in words([text])[0] if any(word in some for some in known)]
        if not asked:
            return [0.0] * len(others)
        index = bm25s.BM25(k1=k1, b=b)
        index.index(known, show_progress=False)
        return index.get_scores(asked).tolist()

    return similarity
