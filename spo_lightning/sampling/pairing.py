"""Rows of a task in, token pairs out: sampled from the policy where the data asks, encoded."""

import copy
import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo_lightning.cache.tokens import Tokens, name_of
from spo_lightning.data.encode import Encoded, encode_pairs, encode_some, encode_texts
from spo_lightning.data.rows import Chunk, Task
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation import ches
from spo_lightning.models.generate import Decoding, judged_pairs
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.directory import write_text
from spo_lightning.records.progress import Stages
from spo_lightning.training import sft

log = logging.getLogger(__name__)

MAX_GB = 5.0  # cache.max_gb of a configuration that has none


def cache_of(cfg: DictConfig) -> Path | None:
    """Where runs share what they trained, sampled and scored; None: nowhere."""
    return Path(cfg.cache.dir) if cfg.cache.get("enabled", True) else None


def limit_of(cfg: DictConfig) -> float:
    """Bytes that one kind of what is shared may take."""
    return cfg.cache.get("max_gb", MAX_GB) * 1e9


def tokens_of(cfg: DictConfig, tokenizer: Any) -> Tokens | None:
    """Where runs share what the tokenizer made of their rows; None: nowhere."""
    home, name = cache_of(cfg), name_of(tokenizer)
    if home is None or name is None:
        return None
    return Tokens(home / "tokens", name, limit_of(cfg))


def decoding(cfg: DictConfig, temperature: float = 0.0, seed: int = 0) -> Decoding:
    stop = tuple(cfg.eval.stop)
    return Decoding(cfg.eval.max_new_tokens, cfg.eval.batch_size, stop, temperature, seed)


@dataclass(frozen=True)
class Places:
    """Held-out rows that are answered, and for each held-out pair row the one it belongs to."""

    rows: list[dict]
    of: list[int]


def with_pairs(cfg: DictConfig, task: Task, policy: Policy, stages: Stages) -> tuple[Task, Places]:
    """The task with its pairs; sampled from the policy, once per policy, where the data asks."""
    held = task.held_out[: cfg.eval.max_rows]
    if not task.samples:
        return replace(task, held_out=held), Places(held, list(range(len(held))))
    train, _, ties = sampled(cfg, task, task.train, policy, stages)
    pairs, of, _ = sampled(cfg, task, held, policy, stages)
    counts = {**task.counts, "prompts whose samples the judge ties": ties}
    return replace(task, train=train, held_out=pairs, counts=counts), Places(held, of)


def sampled(
    cfg: DictConfig, task: Task, rows: Sequence[dict], policy: Policy, stages: Stages
) -> tuple[list[dict], list[int], int]:
    """Pair rows judged among the policy's samples, the row each came from, the ties; cached."""
    assert task.judge is not None
    how = decoding(cfg, task.temperature, cfg.seed)
    asked = [list(rows), task.samples, str(how), sft.key(policy, (), {})]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    cached = cache_of(cfg)
    home = None if cached is None else cached / "sampled_pairs" / f"{digest[:16]}.json"
    if home is not None and home.exists():
        log.info("Sampled pairs: taken from %s", home)
        found = json.loads(home.read_text(encoding="utf-8"))
        return found["pairs"], found["of"], found["ties"]
    numbered = [{**row, "place": place} for place, row in enumerate(rows)]
    pairs, ties = judged_pairs(policy, numbered, task.judge, how, stages, samples=task.samples)
    of = [row.pop("place") for row in pairs]
    if home is not None:
        home.parent.mkdir(parents=True, exist_ok=True)
        write_text(home, json.dumps({"pairs": pairs, "of": of, "ties": ties}))
    return pairs, of, ties


def encoded(
    cfg: DictConfig, tokenizer: Any, rows: Sequence[dict], name: str, kept: Tokens | None = None
) -> Encoded:
    """Token pairs of one side of the data; ``kept``: where they are looked up and kept."""
    where, how = f"{cfg.data.get('path') or 'data'} ({name})", _how(cfg)
    encode = partial(encode_pairs, rows, tokenizer, where=where, **how)
    return encode() if kept is None else kept.find(rows, range(len(rows)), how, encode)


def chunk_encoder(
    cfg: DictConfig, tokenizer: Any, kept: Tokens | None
) -> Callable[[Chunk], Encoded]:
    """Token pairs of a part of the training rows; rows have the numbers they have in the file.

    With a tokenizer of its own: two threads must not use the same one.
    """
    own, how = copy.deepcopy(tokenizer), _how(cfg)

    def encode(chunk: Chunk) -> Encoded:
        rows, places = chunk.rows, chunk.places
        anew = partial(encode_some, rows, own, places, where=cfg.data.path, **how)
        return anew() if kept is None else kept.find(rows, places, how, anew)

    return encode


def _how(cfg: DictConfig) -> dict[str, Any]:
    return {
        "max_length": cfg.max_length,
        "on_mismatch": cfg.data.on_mismatch,
        "strict": cfg.data.strict,
    }


def lower_texts(cfg: DictConfig, task: Task, policy: Policy) -> Pairs:
    """The lower level's own texts, as pairs without a rejected side."""
    texts = encode_texts(task.lower, policy.tokenizer, max_length=cfg.max_length)
    if not texts:
        raise UserError(
            f"data.sft={cfg.data.sft}: no row has a prompt and a completion that fit max_length"
        )
    log.info("Texts (lower level): kept %d of %d", len(texts), len(task.lower))
    return Pairs(texts, None, policy.tokenizer.pad_token_id)


def without_high_ches(
    cfg: DictConfig,
    policy: Policy,
    scorer: Scorer,
    pairs: Pairs,
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> Pairs:
    """The training pairs less the share with the highest normalised CHES under the policy's start.

    Razin et al. 2410.08847 keep only the lowest 5%; here the highest share goes, and the rest
    stays.
    """
    share = cfg.data.drop_high_ches
    if not share:
        return pairs
    with policy.start(), stages.stage("CHES", len(pairs)) as advance:
        found = ches.scores(
            scorer, pairs, batch_size=cfg.eval.batch_size, precision=precision, advance=advance
        )
    kept = ches.without_highest(pairs, found[:, 1], share)
    log.info(
        "Pairs (train): %d of %d dropped, those of highest normalised CHES (the paper's filter "
        "keeps the lowest 5%%)",
        len(pairs) - len(kept),
        len(pairs),
    )
    return kept
