"""Prompts in, answers out: batched greedy or sampled generation."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from omegaconf import DictConfig

from spo_lightning.data.encode import prompt_ids
from spo_lightning.errors import UserError
from spo_lightning.models.policy import Policy
from spo_lightning.models.reading import text_config
from spo_lightning.records.progress import Stages
from spo_lightning.world import Turn


@dataclass(frozen=True)
class Decoding:
    """How answers are drawn. ``temperature`` 0 is greedy."""

    max_new_tokens: int
    batch_size: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0

    @classmethod
    def of(cls, cfg: DictConfig, temperature: float = 0.0, seed: int = 0) -> "Decoding":
        """As the ``eval`` config says."""
        stop = tuple(cfg.eval.stop)
        return cls(cfg.eval.max_new_tokens, cfg.eval.batch_size, stop, temperature, seed)


class Answer(NamedTuple):
    """What a policy says to a prompt."""

    text: str
    tokens: int  # without the one that ends it
    cut: bool  # by the limit: the policy had not come to an end


def stop_ids(policy: Policy, stop: Sequence[str]) -> list[int]:
    """The ids that end an answer: the model's own and the texts of ``eval.stop``."""
    own = policy.lm.generation_config.eos_token_id
    ids = {policy.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])}
    for text in stop:
        found = policy.tokenizer.convert_tokens_to_ids(text)
        if found is None or found == policy.tokenizer.unk_token_id:
            raise UserError(f"eval.stop: {text!r} is not one token of the tokenizer")
        ids.add(found)
    return sorted(i for i in ids if i is not None)


def answers(
    policy: Policy, rows: Sequence[dict], how: Decoding, stages: Stages, title: str
) -> list[str]:
    """The texts of what the rows' prompts are answered with."""
    return [answer.text for answer in answered(policy, rows, how, stages, title)]


@torch.no_grad()
def answered(
    policy: Policy, rows: Sequence[dict], how: Decoding, stages: Stages, title: str
) -> list[Answer]:
    """One answer per row's prompt, in the rows' order. The same seed gives the same answers.

    Greedy ones are dealt over processes. Sampled ones come from one stream of random numbers that
    goes on from batch to batch: every process draws them all, and the first one's are taken.
    """
    prompts = [prompt_ids(row, policy.tokenizer) for row in rows]
    ends = stop_ids(policy, how.stop)
    # likes with likes, so that little is padded
    order = sorted(range(len(rows)), key=lambda i: len(prompts[i]))
    chunks = [order[at : at + how.batch_size] for at in range(0, len(order), how.batch_size)]
    world = stages.world
    turns = world.deal(chunks)
    if how.temperature > 0:
        turns = (Turn(chunk, world.first, [chunk]) for chunk in chunks)
    mine: dict[int, Answer] = {}
    torch.manual_seed(how.seed)
    was_training = policy.lm.training
    policy.lm.eval()
    with stages.stage(title, len(rows)) as advance:
        for chunk, counts, together in turns:
            found = _generate(policy, [prompts[i] for i in chunk], ends, how)
            if counts:
                mine |= dict(zip(chunk, found))
            advance(sum(map(len, together)))
    policy.lm.train(was_training)
    whole = {place: one for some in world.gather(mine) for place, one in some.items()}
    return [whole[place] for place in range(len(rows))]


def _generate(
    policy: Policy, prompts: list[list[int]], ends: list[int], how: Decoding
) -> list[Answer]:
    from transformers import GenerationConfig

    width = max(len(p) for p in prompts)
    pad = policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=policy.lm.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.lm.device
    )
    limit = getattr(text_config(policy.lm), "max_position_embeddings", None)
    room = how.max_new_tokens if limit is None else min(how.max_new_tokens, limit - width)
    if room < 1:
        return [Answer("", 0, cut=True)] * len(prompts)
    drawn: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0}
        drawn["top_p"] = how.top_p
    config = GenerationConfig(
        max_new_tokens=room, eos_token_id=ends, pad_token_id=pad, use_cache=True, **drawn
    )
    out = policy.lm.generate(ids, attention_mask=mask, generation_config=config)
    return [_answer(policy, row[width:].tolist(), set(ends)) for row in out]


def _answer(policy: Policy, ids: list[int], ends: set[int]) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = policy.tokenizer.decode(ids[:end], skip_special_tokens=True)
    return Answer(text, end, cut=end == len(ids))
