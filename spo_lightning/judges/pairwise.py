"""Two answers to a prompt in, what a language model says of them out: in both orders, averaged.

A judge that leans to the first answer, whichever it is, gives each side its half of such verdicts.
"""

import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import shown
from spo_lightning.evaluation.wins import Verdicts
from spo_lightning.judges.local import Asked, Judge, Scores, each_against_all
from spo_lightning.models.endpoint import Endpoint, Pace, Reply, key_of
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

NAMES = ("prompt", "first", "second")  # what stands in a question in braces
TOP = 20  # likeliest tokens that an endpoint is asked for; more it refuses


@dataclass(frozen=True)
class Pairwise:
    """``read``: a reply to what it says of the first answer: 1, 0.5 of a tie, 0, or a share."""

    endpoint: Endpoint
    stages: Stages
    body: Mapping[str, Any]
    system: str | None
    question: str
    read: Callable[[Reply], float | None]
    requests: int = 2  # both orders

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts:
        """Equal answers are a tie that nobody is asked about."""
        asked = [place for place in range(len(rows)) if mine[place] != theirs[place]]
        bodies = []
        for a, b in ((mine, theirs), (theirs, mine)):
            bodies += [self._asked(rows[place], a[place], b[place]) for place in asked]
        replies, told = self.endpoint.replies(bodies, self.stages, "judging")
        said = [self.read(reply) for reply in replies]
        if asked:
            log.info("Judged: %s", told)
        if asked and all(one is None for one in said):
            log.warning(
                "judge.model=%s: no reply is a verdict, the first is %r: see judge.question",
                self.body["model"],
                replies[0].text[:80],
            )
        wins: Scores = [0.5] * len(rows)
        mixed: list[bool | None] = [None] * len(rows)
        for place, first, second in zip(asked, said, said[len(asked) :]):
            if first is None or second is None:
                wins[place] = None  # one order alone leans as the judge does
            else:
                wins[place] = (first + 1 - second) / 2
                mixed[place] = (first - 0.5) * (0.5 - second) < 0
        return Verdicts(wins, mixed)

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return each_against_all(self, rows, texts)

    def _asked(self, row: Mapping[str, Any], first: str, second: str) -> dict[str, Any]:
        texts = {"prompt": shown(row["prompt"]), "first": first, "second": second}
        # at once, so that no name inside a text is taken for one of the question's
        said = re.sub(
            "|".join(f"{{{name}}}" for name in NAMES), lambda m: texts[m[0][1:-1]], self.question
        )
        turns = [] if self.system is None else [{"role": "system", "content": self.system}]
        return {**self.body, "messages": [*turns, {"role": "user", "content": said}]}


def pairwise(
    asked: Asked,
    *,
    base_url: str,
    model: str,
    key_from: str | None,
    system: str | None,
    question: str,
    labels: Sequence[str],
    tie: str | None,
    logprobs: bool,
    temperature: float,
    max_tokens: int,
    more: Mapping[str, Any],
    timeout: float,
    retries: int,
    concurrency: int,
    requests_per_minute: float | None,
    dollars_read: float | None,
    dollars_written: float | None,
) -> Judge:
    """A model behind an endpoint of OpenAI's protocol."""
    for name in NAMES:
        if f"{{{name}}}" not in question:
            raise UserError(f"judge.question has no {{{name}}}: it must hold each of {NAMES}")
    words = [*labels] if tie is None else [*labels, tie]
    if not all(isinstance(word, str) for word in words):
        raise UserError(f"judge.labels={labels}, judge.tie={tie}: give texts, in quotes")
    words = [_bare(word) for word in words]
    if len(labels) != 2 or not all(words) or len({*words}) < len(words):
        raise UserError(f"judge.labels={labels}: give two words that differ, and from judge.tie")
    body = {"model": model, "temperature": temperature, "max_tokens": max_tokens, **more}
    if logprobs:
        body |= {"logprobs": True, "top_logprobs": TOP}
    values = dict(zip(words, (1.0, 0.0, 0.5)))
    pace = Pace(timeout, retries, concurrency, requests_per_minute, asked.processes)
    prices = (dollars_read, dollars_written)
    endpoint = Endpoint("judge", base_url, key_of("judge", key_from), pace, prices, asked.cache)
    read = _likelier if logprobs else _strict
    say = (system, question, lambda reply: read(reply, values))
    return Pairwise(endpoint, asked.stages, body, *say)


def _bare(word: str) -> str:
    """Without marks around it, in small letters."""
    return re.sub(r"^\W+|\W+$", "", word).lower()


def _strict(reply: Reply, values: Mapping[str, float]) -> float | None:
    """One of the labels and nothing else, marks around it apart."""
    return values.get(_bare(reply.text))


def _likelier(reply: Reply, values: Mapping[str, float]) -> float | None:
    """The share of probability that the labels have among them, as the first token of a reply."""
    if reply.top is None:
        raise UserError("judge.logprobs=true: the endpoint returns none: set it to false")
    found = [(values.get(_bare(token)), logp) for token, logp in reply.top.items()]
    told = [(value, math.exp(logp)) for value, logp in found if value is not None]
    mass = sum(share for _, share in told)
    return sum(value * share for value, share in told) / mass if mass else None
