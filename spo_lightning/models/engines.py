"""Prompts in, answers out, by whom ``engine`` names: the policy in memory, or an endpoint.

A new engine is a function that takes ``Place`` and its own keys, and a yaml in ``conf/engine``.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from spo_lightning.data.chat import plain
from spo_lightning.errors import UserError
from spo_lightning.models.endpoint import Endpoint, Pace, Reply, key_of
from spo_lightning.models.generate import Answer, Decoding, Engine
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


def hf(place: Place) -> Engine | None:
    """The policy in memory: nobody in its place."""
    return None


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
                f"engine.more.{key}: the command says it itself: set its own key, or leave it out"
            )
    pace = Pace(timeout, retries, concurrency, requests_per_minute, place.processes)
    prices, unsent = (dollars_read, dollars_written), frozenset(k for k in more if more[k] is None)
    key = key_of("engine", key_from)
    return Openai(
        Endpoint("engine", base_url, key, pace, prices, place.cache, unsent), model, more
    )
