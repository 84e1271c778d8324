"""Config in, everything a run trains and measures on out: policy, pairs with reference, rows."""

import copy
import logging
import os
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.cache import reference
from spo_lightning.cache.shards import Shards
from spo_lightning.cache.tokens import Tokens
from spo_lightning.config.knobs import warm_start_steps
from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import Encoded, check_survivors, encode_texts
from spo_lightning.data.rows import Task
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import greedy_answers
from spo_lightning.models import policy as policies
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import RECOMPUTED, Scorer
from spo_lightning.models.sharing import as_read_by, check_head, scorer_for
from spo_lightning.records.progress import Stages, Within
from spo_lightning.sampling.pairing import (
    cache_of,
    chunk_encoder,
    decoding,
    encoded,
    limit_of,
    lower_texts,
    tokens_of,
    with_pairs,
    without_high_ches,
)
from spo_lightning.training import sft
from spo_lightning.training.feed import Feed

log = logging.getLogger(__name__)

FLOATS = 2**18  # in a MiB
CURVE_ROWS = 500  # held-out prompts on which the warm start is watched


@dataclass(frozen=True)
class Prepared:
    """What training and evaluation work on. ``held_rows``: the held-out rows that are answered;
    ``place``: for each held-out pair the row of ``held_rows`` it belongs to."""

    policy: Policy
    scorer: Scorer
    task: Task
    train: Pairs
    held: Pairs
    lower: Pairs | None  # the lower level's own texts; None: the chosen responses
    held_rows: list[dict]
    place: list[int]
    counts: dict[str, dict[str, int]]
    feed: Feed | None = None  # the training pairs, where ``train`` has the first chunk only


def device_of(hardware: DictConfig) -> torch.device:
    """Where the stages around training run; says in one line what ``auto`` took."""
    wants, has = hardware.accelerator, torch.cuda.is_available()
    if wants == "gpu" and not has:
        raise UserError("hardware.accelerator=gpu, and there is none here: use hardware=cpu")
    found = torch.device("cuda" if has and wants in ("auto", "gpu") else "cpu")
    if wants == "auto":
        named = torch.cuda.get_device_name() if has else f"{torch.get_num_threads()} CPU threads"
        log.info("Hardware: %s", named)
    return found


def check_checkpoints(model: DictConfig) -> None:
    """Refuse local directories that hold no model, before any is loaded."""
    for where in (model.pretrained, model.reference):
        if where is not None:
            policies.source_of(where)


def precision_of(hardware: DictConfig, device: torch.device) -> Callable[[], Any]:
    """A context maker for forwards outside Lightning, equal to its precision plugin's."""
    if hardware.precision == "bf16-mixed":
        return partial(torch.autocast, device.type, torch.bfloat16)
    return nullcontext


def prepare(
    cfg: DictConfig,
    task: Task,
    device: torch.device,
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> Prepared:
    """Load or build, warm start, sample pairs where the data asks for it, tokenise, score."""
    policy = base_policy(cfg, task, device, stages)
    task, places = with_pairs(cfg, task, policy, stages)
    kept = tokens_of(cfg, policy.tokenizer)
    sides = {
        "train": train_side(cfg, task, policy.tokenizer, kept),
        "held-out": encoded(cfg, policy.tokenizer, task.held_out, "held-out", kept),
    }
    counts = {"source": task.counts, **{name: some.counts for name, some in sides.items()}}
    for name, some in sides.items():
        told = ", ".join(f"{key} {count}" for key, count in some.counts.items() if count)
        log.info("Pairs (%s): %s", name, told)
    policy = policies.adapt(policy, **cfg.model.lora, seed=cfg.seed)
    policy.module.to(device)
    longest = longest_of(pair for some in sides.values() for pair in some.pairs)
    if task.chunks is not None:  # prompt + one response has max_length at most, so a row has:
        longest = 2 * cfg.max_length
    logits = cfg.hardware.logits_mib * FLOATS
    scorer = scorer_of(policy, longest, share=cfg.model.share_prompt, logits=logits)
    if cfg.hardware.activation_checkpointing:
        policy.lm.gradient_checkpointing_enable(RECOMPUTED)
    pad = policy.tokenizer.pad_token_id
    sets = {name: Pairs(some.pairs, None, pad) for name, some in sides.items()}
    sets["train"] = without_high_ches(cfg, policy, scorer, sets["train"], precision, stages)
    gone = len(sides["train"].pairs) - len(sets["train"])
    counts["train"] |= {"kept": len(sets["train"]), "dropped/ches": gone}
    if task.lower:
        sets["lower level"] = lower_texts(cfg, task, policy)
    sets = with_reference(cfg, policy, scorer, sets, precision, stages)
    held = sets["held-out"]
    feed = None
    if task.chunks is not None:
        encode = chunk_encoder(cfg, policy.tokenizer, kept)
        judge = later_reference(cfg, policy, scorer, precision, stages)
        feed = Feed(
            sets["train"], sides["train"].counts, task.chunks, encode, judge, seed=cfg.seed
        )
    scorer.compiled = cfg.hardware.compile  # the probe and the reference have run without
    return Prepared(
        policy,
        scorer,
        task,
        sets["train"],
        held,
        sets.get("lower level"),
        places.rows,
        [places.of[pair.row] for pair in held.pairs],
        counts,
        feed,
    )


def train_side(cfg: DictConfig, task: Task, tokenizer: Any, kept: Tokens | None) -> Encoded:
    """The training pairs, those of the first chunk where there are more."""
    if task.chunks is None:
        return encoded(cfg, tokenizer, task.train, "train", kept)
    log.info("Pairs (train): those of the first %d rows; the rest follows", cfg.data.chunk_rows)
    first = chunk_encoder(cfg, tokenizer, kept)(next(task.chunks(0)))
    check_survivors(first.counts, f"{cfg.data.path}, the first {cfg.data.chunk_rows} rows")
    return first


def base_policy(cfg: DictConfig, task: Task, device: torch.device, stages: Stages) -> Policy:
    """The model as preference training starts from it, adapters not yet added."""
    settings: Any = OmegaConf.to_container(cfg.model, resolve=True)
    shared = ("pretrained", "revision", "trust_remote_code", "dtype", "attention", "config")
    policy = policies.load(**{key: settings[key] for key in shared}, seed=cfg.seed)
    policy.lm.to(device)
    if policy.built and not task.sft and not task.samples:
        log.warning(
            "The model is built from its config and starts untrained: model.pretrained names "
            "a checkpoint to start from"
        )
    steps = warm_start_steps(cfg)
    if steps and task.sft:
        settings = {**OmegaConf.to_container(cfg.sft, resolve=True), "max_steps": steps}  # type: ignore
        texts = encode_texts(task.sft, policy.tokenizer, max_length=cfg.max_length)
        sft.warm_start(policy, texts, _quality(cfg, task, policy), settings, cache_of(cfg), stages)
    elif steps and cfg.sft.max_steps:
        raise UserError("sft.max_steps is set, but this data brings no SFT text: leave it out")
    return policy


def _quality(cfg: DictConfig, task: Task, policy: Policy) -> Callable[[], float] | None:
    if task.answer_of is None or not task.held_out or task.held_out[0].get("answer") is None:
        return None
    how = decoding(cfg)
    rows = task.held_out[:CURVE_ROWS]

    def exact_match() -> float:
        from spo_lightning.records.progress import silent

        return greedy_answers(policy, rows, task, how, silent()).numbers["exact_match"]

    return exact_match


def longest_of(pairs: Iterable[Pair]) -> int:
    return max((len(pair) for pair in pairs), default=0)


def scorer_of(policy: Policy, longest: int, *, share: bool, logits: int) -> Scorer:
    """Decide how batches with rows of up to ``longest`` tokens are read.

    ``logits``: how many are alive at once.
    """
    check_head(policy.lm)
    policy.lm.train()  # dropout is off; activation checkpointing asks for it
    return scorer_for(policy.lm, longest, share=share, logits=logits)


def with_reference(
    cfg: DictConfig,
    policy: Policy,
    scorer: Scorer,
    sets: dict[str, Pairs],
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> dict[str, Pairs]:
    """Every pair under the reference, the policy's start or another checkpoint, scored once."""
    shelf, judge = _referee(cfg, policy, scorer, precision)
    with policy.start():
        return reference.with_reference(
            sets,
            shelf,
            judge,
            batch_size=cfg.eval.batch_size,
            precision=precision,
            stages=stages,
        )


def later_reference(
    cfg: DictConfig,
    policy: Policy,
    scorer: Scorer,
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> Callable[[Pairs], Pairs]:
    """The same for pairs that are read while the policy trains: a copy stays what it is now.

    Adapters need none: they are switched off meanwhile.
    """
    if cfg.model.reference is None and not policy.adapted:
        scorer = copy.deepcopy(scorer).requires_grad_(False)
    shelf, judge = _referee(cfg, policy, scorer, precision)

    def scored(pairs: Pairs) -> Pairs:
        with policy.start():
            return reference.with_reference(
                {"train": pairs},
                shelf,
                judge,
                batch_size=cfg.eval.batch_size,
                precision=precision,
                stages=Within(stages),
            )["train"]

    return scored


def _referee(
    cfg: DictConfig,
    policy: Policy,
    scorer: Scorer,
    precision: Callable[[], AbstractContextManager],
) -> tuple[Shards | None, Callable[[], Scorer]]:
    """Where the reference's rows are kept, and what scores those that are not there.

    A reference whose rows are all in the cache is not even loaded where its files name it.
    """
    other, home = cfg.model.reference, cache_of(cfg)
    device, shelf = policy.lm.device, None

    @cache
    def opened() -> Policy:
        return policy if other is None else opened_checkpoint(other, cfg.model, device)

    if other is not None:
        trusted = cfg.model.trust_remote_code
        check_same_tokens(policy.tokenizer, policies.tokenizer_of(other, None, trusted), other)
    if home is not None:
        name = other and reference.files_name(other, cfg.model, device, precision)
        name = name or reference.weights_name(opened(), precision)
        shelf = Shards(home / "reference", name, limit_of(cfg))
    return shelf, lambda: scorer if other is None else as_read_by(scorer, opened().lm)


def opened_checkpoint(where: str, settings: DictConfig, device: torch.device) -> Policy:
    """A checkpoint as it is; ``settings`` has its dtype, attention and trust_remote_code."""
    opened = policies.load(
        pretrained=where,
        revision=None,
        trust_remote_code=settings.trust_remote_code,
        dtype=settings.dtype,
        attention=settings.attention,
        config={},
        seed=0,
    )
    opened.lm.to(device)
    return opened


def check_same_tokens(mine: Any, theirs: Any, where: str) -> None:
    """Log-probabilities of two models compare only over the same token ids, so same tokenizer."""
    if mine.get_vocab() != theirs.get_vocab():
        raise UserError(f"the reference {where} has another tokenizer than the policy")


def set_threads(hardware: DictConfig) -> None:
    if hardware.threads:
        torch.set_num_threads(hardware.threads)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
