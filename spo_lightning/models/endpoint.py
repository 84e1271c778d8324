"""Requests in, replies out: an endpoint of OpenAI's protocol, asked nothing twice.

Every reply is kept on the disk as it comes, under a name made of what was asked, so that a run
that was stopped goes on where it was. The key comes from the environment and enters no file.
"""

import hashlib
import json
import os
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from spo_lightning.errors import UserError
from spo_lightning.records.progress import Stages

BUSY = (408, 409, 425, 429)  # and 500 or more: asked again
FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0  # seconds; the wait doubles from try to try
MILLION = 1_000_000


@dataclass(frozen=True)
class Reply:
    """What came back."""

    text: str
    top: Mapping[str, float] | None  # log-probabilities of the first token's likeliest
    tokens: tuple[int, int]  # read and written, as the endpoint counts them
    cut: bool = False  # by the limit of tokens

    @classmethod
    def of(cls, found: Any) -> "Reply":
        """Of the protocol's answer; raises where it is none."""
        choice, usage = found["choices"][0], found.get("usage") or {}
        counts = (usage.get("prompt_tokens") or 0, usage.get("completion_tokens") or 0)
        top = None
        first = ((choice.get("logprobs") or {}).get("content") or [{}])[0]
        if first.get("top_logprobs") is not None:
            top = {one["token"]: float(one["logprob"]) for one in first["top_logprobs"]}
        text = choice["text"] if "text" in choice else choice["message"].get("content")
        cut = choice.get("finish_reason") == "length"
        return cls(str(text or ""), top, (int(counts[0]), int(counts[1])), cut)


class Busy(Exception):
    """No reply this time; ``wait``: seconds that the endpoint asked for."""

    def __init__(self, why: str, wait: float | None = None):
        super().__init__(why)
        self.wait = wait


class Pace(NamedTuple):
    """How patiently and how fast an endpoint is asked."""

    timeout: float  # seconds
    retries: int
    concurrency: int
    requests_per_minute: float | None
    processes: int  # that ask at a time, and keep the limits together

    @property
    def at_once(self) -> int:
        """Requests of one process."""
        return max(1, self.concurrency // self.processes)

    @property
    def apart(self) -> float:
        """Seconds between its requests."""
        limit = self.requests_per_minute
        return 0.0 if limit is None else 60 * self.processes / limit


@dataclass
class Endpoint:
    """``group``: of the configuration, whose keys a refusal names. ``key``: of the Authorization
    header, or None. ``cache``: None keeps nothing. ``unsent``: keys of a request that tell it
    apart on the disk alone."""

    group: str
    base_url: str
    key: str | None
    pace: Pace
    dollars: tuple[float | None, float | None]  # per million tokens read and written
    cache: Path | None
    unsent: frozenset[str] = frozenset()
    _halt: threading.Event = field(default_factory=threading.Event, init=False)
    _lock: threading.Lock = field(default_factory=threading.Lock, init=False)
    _next: float = field(default=0.0, init=False)  # when the next request may begin

    def replies(
        self, bodies: Sequence[Mapping[str, Any]], stages: Stages, title: str
    ) -> tuple[list[Reply], str]:
        """A reply to each, and what they took in words."""
        names = [self._name(body) for body in bodies]
        found = {name: kept for name in dict.fromkeys(names) if (kept := self._kept(name))}
        wanted = {n: body for n, body in zip(names, bodies) if n not in found}
        before = len(found)
        self._halt.clear()
        with (
            ThreadPoolExecutor(self.pace.at_once) as pool,
            stages.stage(title, before + len(wanted), done=before) as advance,
        ):
            places = {pool.submit(self._reply, n, body): n for n, body in wanted.items()}
            try:
                left = {*places}
                while left:  # a look each second, as a signal is obeyed where one advances
                    done, left = wait(left, 1.0, FIRST_COMPLETED)
                    found |= {places[future]: future.result() for future in done}
                    advance(len(done), self._told([found[n] for n in wanted if n in found]))
                    if stages.stop.signal is not None:  # also within another stage
                        raise stages.stop.raised(stages.how_to_go_on)
            except BaseException:
                self._halt.set()
                for future in places:  # those on their way come to their end, and are kept
                    future.cancel()
                raise
        told = self._told([found[name] for name in wanted])
        return [found[name] for name in names], f"{told}, {before} of earlier runs"

    def _told(self, new: Sequence[Reply]) -> str:
        counts = [sum(reply.tokens[side] for reply in new) for side in (0, 1)]
        told = f"{len(new)} requests, {counts[0]:,} tokens read and {counts[1]:,} written"
        prices = [0.0 if price is None else price for price in self.dollars]
        if any(prices):
            told += f", ${sum(c * p for c, p in zip(counts, prices)) / MILLION:.4f}"
        return told

    def _name(self, body: Mapping[str, Any]) -> str:
        asked = json.dumps([self.base_url, body], sort_keys=True)
        return hashlib.sha256(asked.encode()).hexdigest()

    def _place(self, name: str) -> Path | None:
        return self.cache and self.cache / name[:2] / f"{name}.json"

    def _kept(self, name: str) -> Reply | None:
        place = self._place(name)
        if place is None or not place.exists():
            return None
        try:
            kept = json.loads(place.read_text(encoding="utf-8"))
            counts = (kept["tokens"][0], kept["tokens"][1])
            return Reply(kept["text"], kept["top"], counts, kept.get("cut", False))
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None  # asked again

    def _reply(self, name: str, body: Mapping[str, Any]) -> Reply:
        from spo_lightning.records.disk import write_text

        why = "stopped"
        for tried in range(self.pace.retries + 1):
            self._wait_for_turn()
            if self._halt.is_set():
                break
            try:
                reply = self._asked(body)
            except Busy as error:
                why, wait = str(error), error.wait
                if tried < self.pace.retries:
                    self._halt.wait(min(wait or FIRST_WAIT * 2**tried, LONGEST_WAIT))
                continue
            place = self._place(name)
            if place is not None:
                kept = {"asked": body, "text": reply.text, "top": reply.top, "cut": reply.cut}
                place.parent.mkdir(parents=True, exist_ok=True)
                write_text(place, json.dumps(kept | {"tokens": reply.tokens}, ensure_ascii=False))
            return reply
        raise UserError(
            f"{self.base_url} gave no reply in {self.pace.retries + 1} tries ({why}): see that it "
            "runs there, then go on; what came is kept where cache.enabled is true"
        )

    def _wait_for_turn(self) -> None:
        with self._lock:
            now = time.monotonic()
            wait = max(self._next - now, 0)
            self._next = now + wait + self.pace.apart
        self._halt.wait(wait)

    def _asked(self, body: Mapping[str, Any]) -> Reply:
        """One request: of a prompt's text, or of a conversation's turns."""
        import requests

        path = "completions" if "prompt" in body else "chat/completions"
        url = f"{self.base_url.rstrip('/')}/{path}"
        sent = {key: value for key, value in body.items() if key not in self.unsent}
        head = {} if self.key is None else {"Authorization": f"Bearer {self.key}"}
        try:
            # without auth, requests puts what ~/.netrc has in the place of the key
            found = requests.post(
                url,
                json=sent,
                headers=head,
                timeout=self.pace.timeout,
                auth=lambda request: request,
            )
        except ValueError as error:  # no address
            raise UserError(
                f"{self.group}.base_url={self.base_url}: {self._public(error)}"
            ) from error
        except requests.RequestException as error:
            raise Busy(type(error).__name__) from error
        if found.status_code in BUSY or found.status_code >= 500:
            raise Busy(f"status {found.status_code}", _seconds(found.headers.get("Retry-After")))
        if not found.ok:
            said = self._public(found.text)
            raise UserError(
                f"{url} answers {found.status_code} ({said}): see {self.group}.model, "
                f"{self.group}.base_url and the variable that {self.group}.key_from names"
            )
        try:
            return Reply.of(found.json())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise Busy("a reply that is none of the protocol") from error

    def _public(self, said: Any) -> str:
        """The begin of a message, without the key."""
        text = str(said) if self.key is None else str(said).replace(self.key, "<removed>")
        return " ".join(text[:300].split())


def key_of(group: str, variable: str | None) -> str | None:
    """The value of an environment variable; one that is named must be there."""
    if variable is None:
        return None
    if not variable.isidentifier():  # what it is may be the key itself, which is not repeated
        raise UserError(f"{group}.key_from names an environment variable, and holds no key itself")
    if not os.environ.get(variable):
        raise UserError(
            f"{group}.key_from={variable}: no such environment variable: export it, or null where "
            "the endpoint asks for no key"
        )
    key = os.environ[variable].strip()
    if not (key.isascii() and key.isprintable()):
        raise UserError(
            f"{group}.key_from={variable}: no header can hold its value: export it anew"
        )
    return key


def _seconds(text: str | None) -> float | None:
    try:
        return max(0.0, float(text or ""))
    except ValueError:
        return None
