"""Prompts in, answers out: batched greedy or sampled generation."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

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
    """How answers are drawn. ``temperature`` 0 is greedy. ``engine``: who answers in the policy's
    place."""

    max_new_tokens: int
    batch_size: int
    stop: tuple[str, ...]
    temperature: float = 0.0
    seed: int = 0
    top_p: float = 1.0
    engine: "Engine | None" = field(default=None, repr=False, compare=False)

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


class Engine(Protocol):
    """Who answers in the policy's place."""

    def __call__(
        self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str
    ) -> list[Answer]: ...


class Stops(NamedTuple):
    """What ends an answer: the model's own ends, and the texts of ``eval.stop``."""

    ids: set[int]  # those of one token too
    texts: list[str]  # that are no token of their own everywhere: looked for in what is written

    @classmethod
    def of(cls, policy: Policy, stop: Sequence[str]) -> "Stops":
        own = policy.lm.generation_config.eos_token_id
        ids, texts = (
            {policy.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])},
            [],
        )
        for text in stop:
            if not isinstance(text, str) or not text:
                raise UserError(f"eval.stop: {text!r} is no text: give [TEXT, ...]")
            mark = policy.tokenizer.get_added_vocab().get(text)
            token = policy.tokenizer.convert_tokens_to_ids(text) if mark is None else mark
            if token is not None and (mark is not None or token != policy.tokenizer.unk_token_id):
                ids.add(token)
            if mark is None:  # a word is other tokens after a space; </s> is one everywhere
                texts.append(text)
        if texts:
            ids.add(policy.tokenizer.pad_token_id)  # what fills a row after such a text
        return cls(ids - {None}, texts)


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
    goes on from batch to batch: every process draws them all, and the first one's are taken. So it
    is where processes have parts of the weights and gather them for every token.
    """
    if how.engine is not None:
        return how.engine(rows, how, stages, title)
    parts = policy.spread if policy.spread and policy.spread.root else None
    if parts is None:
        policy = policy.gathered(policy.device) or policy
    prompts = [prompt_ids(row, policy.tokenizer) for row in rows]
    stops, rooms = Stops.of(policy, how.stop), rooms_of(policy, prompts, how)
    chunks = batches([*map(len, prompts)], rooms, how.batch_size)
    world = stages.world
    turns = world.deal(chunks)
    if how.temperature > 0 or parts is not None:
        turns = (Turn(chunk, world.first, [chunk]) for chunk in chunks)
    mine: dict[int, Answer] = {}
    torch.manual_seed(how.seed)
    was_training = policy.lm.training
    policy.lm.eval()
    whole_ends = nullcontext() if parts is None else parts.whole_ends()
    with stages.stage(title, len(rows)) as advance, whole_ends:
        for chunk, counts, together in turns:
            asked, room = [prompts[i] for i in chunk], rooms[chunk[0]]
            found = _generate(policy, asked, room, stops, how)
            if counts:
                mine |= dict(zip(chunk, found))
            advance(sum(map(len, together)))
    policy.lm.train(was_training)
    whole = {place: one for some in world.gather(mine) for place, one in some.items()}
    return [whole[place] for place in range(len(rows))]


def rooms_of(policy: Policy, prompts: Sequence[Sequence[int]], how: Decoding) -> list[int]:
    """Tokens that each prompt leaves for an answer."""
    limit = getattr(text_config(policy.lm), "max_position_embeddings", None)
    if limit is None:
        return [how.max_new_tokens] * len(prompts)
    return [max(0, min(how.max_new_tokens, limit - len(prompt))) for prompt in prompts]


def batches(lengths: Sequence[int], rooms: Sequence[int], size: int) -> list[list[int]]:
    """Places of prompts, likes with likes so that little is padded.

    All of a batch have the same room, so that none is cut because of whom it stands beside.
    """
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: lengths[place]):
        if found and len(found[-1]) < size and rooms[found[-1][0]] == rooms[place]:
            found[-1].append(place)
        else:
            found.append([place])
    return found


def _generate(
    policy: Policy, prompts: list[list[int]], room: int, stops: Stops, how: Decoding
) -> list[Answer]:
    from transformers import GenerationConfig

    if not room:
        return [Answer("", 0, cut=True)] * len(prompts)
    width, pad = max(map(len, prompts)), policy.tokenizer.pad_token_id
    ids = torch.tensor([[pad] * (width - len(p)) + p for p in prompts], device=policy.device)
    mask = torch.tensor(
        [[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=policy.device
    )
    drawn: dict[str, Any] = {"do_sample": False}
    if how.temperature > 0:
        drawn = {"do_sample": True, "temperature": how.temperature, "top_k": 0}
        drawn["top_p"] = how.top_p
    config = GenerationConfig(
        max_new_tokens=room,
        eos_token_id=sorted(stops.ids),
        pad_token_id=pad,
        use_cache=True,
        **drawn,
    )
    reads: dict[str, Any] = {"stopping_criteria": _written(policy.tokenizer, stops.texts, width)}
    # processes that gather for each other's tokens stop together
    reads["synced_gpus"] = policy.spread is not None
    out = policy.lm.generate(ids, attention_mask=mask, generation_config=config, **reads)
    return [_answer(policy, row[width:].tolist(), room, stops) for row in out]


def _written(tokenizer: Any, texts: list[str], width: int) -> Any:
    """Texts that end an answer, looked for in what follows the prompt."""
    from transformers.generation.stopping_criteria import (
        StoppingCriteria,
        StoppingCriteriaList,
        StopStringCriteria,
    )

    class Written(StoppingCriteria):
        def __init__(self):
            self.found = StopStringCriteria(tokenizer, texts)

        def __call__(self, input_ids: Any, scores: Any, **more: Any) -> Any:
            return self.found(input_ids[:, width:], scores, **more)

    return StoppingCriteriaList([Written()] if texts else [])


def _answer(policy: Policy, ids: list[int], room: int, stops: Stops) -> Answer:
    end = next((place for place, token in enumerate(ids) if token in stops.ids), len(ids))
    text = policy.tokenizer.decode(ids[:end], skip_special_tokens=True)
    ends = [at for at in map(text.find, stops.texts) if at >= 0]
    return Answer(text[: min(ends, default=None)], end, cut=end == room and not ends)
