"""Prompts in, answers out, by whom ``engine`` names: a model in memory, or an endpoint.

A new engine is a function that takes ``Place`` and its own keys, and a yaml in ``conf/engine``.
What can be asked beside the policy, by a judge that reads or by a search, is a ``Speaker``.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from spo_lightning.data.chat import plain
from spo_lightning.data.encode import prompt_ids
from spo_lightning.errors import UserError
from spo_lightning.models.endpoint import MILLION, Endpoint, Pace, Reply, key_of
from spo_lightning.models.generate import Answer, Decoding, Engine, answered
from spo_lightning.models.policy import Policy
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

FIRST_SEED = 100_003  # of a draw: seed * this + the answer's place
SEEDS = 2**31  # below it: some servers hold a seed in 32 bits
# of a request: what stands elsewhere; null takes away those that some endpoint does not know
OWN = ("model", "prompt", "messages", "tools", "chat_template_kwargs", "stream", "n")
SAID = ("temperature", "top_p", "max_tokens", "stop", "seed")


class Place(NamedTuple):
    """Where an engine works."""

    cache: Path | None  # where what was paid for is kept
    processes: int  # that draw at a time
    group: str = "engine"  # of the configuration, whose keys a refusal names
    opened: Callable[[str], Policy] | None = None  # None: no model but the command's own


class Said(NamedTuple):
    """A reply, and what it took."""

    text: str
    read: int  # tokens
    written: int
    dollars: float


class Speaker(Protocol):
    """Who is asked for replies; every row has a ``seed`` of its own beside its ``prompt``."""

    def say(
        self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str
    ) -> list[Said]: ...


@dataclass(frozen=True)
class Another:
    """A model of this machine beside the command's own."""

    policy: Policy

    def say(self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str) -> list[Said]:
        """Drawn together, from the first row's seed on."""
        seeded = replace(how, seed=rows[0]["seed"])
        given = answered(self.policy, rows, seeded, stages, title)
        read = (len(prompt_ids(row, self.policy.tokenizer)) for row in rows)
        return [Said(one.text, count, one.tokens, 0.0) for one, count in zip(given, read)]


@dataclass(frozen=True)
class Openai:
    """A model behind an endpoint. ``more``: further keys of a request; null takes one away."""

    endpoint: Endpoint
    model: str
    more: Mapping[str, Any]

    def __call__(
        self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str
    ) -> list[Answer]:
        """One answer per row's prompt; of several processes the first asks for all."""
        bodies = [self._asked(row, how, place) for place, row in enumerate(rows)]
        replies, told = stages.world.once(lambda: self.endpoint.replies(bodies, stages, title))
        if stages.world.first:
            log.info("Answered by %s: %s", self.model, told)
        return [_answer(one, how.stop) for one in replies]

    def say(self, rows: Sequence[dict], how: Decoding, stages: Stages, title: str) -> list[Said]:
        """A reply to each, with what the endpoint's prices make of it."""
        bodies = [self._asked(row, replace(how, seed=row["seed"]), 0) for row in rows]
        replies, _ = self.endpoint.replies(bodies, stages, title)
        prices = [price or 0.0 for price in self.endpoint.dollars]
        return [
            Said(
                _answer(one, how.stop).text,
                *one.tokens,
                sum(count * price for count, price in zip(one.tokens, prices)) / MILLION,
            )
            for one in replies
        ]

    def _asked(self, row: Mapping[str, Any], how: Decoding, place: int) -> dict[str, Any]:
        """Messages are a conversation, which the endpoint renders; a text is read as it stands, as
        the policy would read it."""
        prompt = row["prompt"]
        body: dict[str, Any] = {"model": self.model}
        body |= {"prompt": prompt} if isinstance(prompt, str) else {"messages": plain(prompt)}
        if row.get("tools"):
            body["tools"] = row["tools"]
        if row.get("chat_template_kwargs"):  # as vLLM and SGLang call it too
            body["chat_template_kwargs"] = row["chat_template_kwargs"]
        body |= {"temperature": how.temperature, "max_tokens": how.max_new_tokens}
        if how.stop:
            body["stop"] = [*how.stop]
        if how.temperature > 0:  # every answer has a seed of its own, and is drawn once
            body |= {"top_p": how.top_p, "seed": (how.seed * FIRST_SEED + place) % SEEDS}
        return body | {key: value for key, value in self.more.items() if value is not None}


def _answer(reply: Reply, stop: Sequence[str]) -> Answer:
    """Up to what ends it, which some servers leave at its end."""
    text = reply.text
    for end in stop:
        text = text.partition(end)[0]
    return Answer(text, reply.tokens[1], cut=reply.cut and text == reply.text)


def hf(place: Place, *, model: str | None) -> Any:
    """The policy in memory, nobody in its place; or a model by its name, beside it."""
    if model is None:
        return None
    if place.opened is None:
        raise UserError(
            f"{place.group}.model={model}: with engine=hf the command's own model answers: leave "
            "it out"
        )
    return Another(place.opened(model))


def speaker(engine: Callable[[Place], Any], place: Place, *, turns: bool = True) -> Speaker:
    """Whom an ``engine`` node names, to be asked beside the policy; by ``turns``, or by texts."""
    found = engine(place)
    if found is None:
        raise UserError(
            f"{place.group}.model=null: name who answers: a directory, .gguf file, pkg://NAME or "
            f"hub id, or an endpoint (engine@{place.group}=openai)"
        )
    if turns and isinstance(found, Another) and found.policy.tokenizer.chat_template is None:
        raise UserError(
            f"{place.group}.model has no chat template, and is asked by turns: name another, or "
            "of the base set system_turn=false"
        )
    return found


def openai(
    place: Place,
    *,
    base_url: str,
    model: str,
    key_from: str | None,
    more: Mapping[str, Any],
    timeout: float,
    retries: int,
    concurrency: int,
    requests_per_minute: float | None,
    dollars_read: float | None,
    dollars_written: float | None,
) -> Engine | None:
    """A model behind an endpoint of OpenAI's protocol."""
    for key in more:
        if key in OWN or (key in SAID and more[key] is not None):
            raise UserError(
                f"{place.group}.more.{key}: the command says it itself: set its own key, or "
                "leave it out"
            )
    pace = Pace(timeout, retries, concurrency, requests_per_minute, place.processes)
    prices, unsent = (dollars_read, dollars_written), frozenset(k for k in more if more[k] is None)
    key = key_of(place.group, key_from)
    return Openai(
        Endpoint(place.group, base_url, key, pace, prices, place.cache, unsent), model, more
    )
