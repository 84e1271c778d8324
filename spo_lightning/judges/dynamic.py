"""An answer in, its mean score on the aspects that matter for its question out: dynamic rewarding.

A language model first picks the aspects, of the question alone, then scores the answer from 1 to 5
on each. Singla et al. 2411.08733; the wording, and one reply for all aspects, are ours.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spo_lightning.data.chat import shown
from spo_lightning.errors import UserError
from spo_lightning.evaluation.wins import Verdicts
from spo_lightning.judges.local import Asked, ByScore, Judge, Scores
from spo_lightning.models.engines import Place, Speaker, speaker
from spo_lightning.models.generate import Decoding
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

NAMES = {"pick": ("prompt", "aspects"), "question": ("prompt", "answer", "aspects")}
BEST = 5.0
SCORE = r"\W{0,8}(?:score|rating)?\W{0,6}([1-5](?:\.\d+)?)(?!\d)"


class Verdict(NamedTuple):
    """What is said of one answer; ``score`` is None where no reply could be read."""

    score: float | None
    aspects: Mapping[str, float]
    reasons: Mapping[str, str]


def by_score(score: float | None) -> Verdict:
    """Of a judge that says no more."""
    return Verdict(score, {}, {})


@dataclass(frozen=True)
class Dynamic:
    """``again``: how often a reply that cannot be read is asked for anew."""

    speaker: Speaker
    how: Decoding
    stages: Stages
    aspects: Mapping[str, str]
    pick: str
    question: str
    again: int
    requests: int = 2
    known: dict[str, list[str]] = field(default_factory=dict)  # of a question: what matters

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return [verdict.score for verdict in self.verdicts(rows, texts)]

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts:
        return ByScore(self).compare(rows, mine, theirs)

    def verdicts(self, rows: Sequence[dict], texts: Sequence[str]) -> list[Verdict]:
        """Each answer's scores, aspect by aspect, and their mean."""
        questions = [shown(row["prompt"]) for row in rows]
        self._pick([*dict.fromkeys(one for one in questions if one not in self.known)])
        told = [self.known[question] for question in questions]
        asked = [place for place, names in enumerate(told) if names]
        bodies = [
            filled(
                self.question,
                prompt=questions[place],
                answer=texts[place],
                aspects="\n".join(f"{name}: {self.aspects[name]}" for name in told[place]),
            )
            for place in asked
        ]
        wanted = [told[place] for place in asked]
        found = self._read(bodies, lambda text, at: scores_in(text, wanted[at]))
        verdicts = [by_score(None)] * len(rows)
        for place, one in zip(asked, found):
            if one:
                aspects = {name: score for name, (score, _) in one.items()}
                reasons = {name: said for name, (_, said) in one.items()}
                verdicts[place] = Verdict(sum(aspects.values()) / len(one), aspects, reasons)
        return verdicts

    def _pick(self, questions: Sequence[str]) -> None:
        every = "\n".join(f"{name}: {meaning}" for name, meaning in self.aspects.items())
        bodies = [filled(self.pick, prompt=one, aspects=every) for one in questions]
        found = self._read(bodies, lambda text, at: named_in(text, [*self.aspects]))
        self.known.update({question: names or [] for question, names in zip(questions, found)})

    def _read(self, bodies: Sequence[str], reading: Callable[[str, int], Any]) -> list[Any]:
        """What is read in the replies; one without anything is asked for again, and is told so."""
        turns = [[{"role": "user", "content": body}] for body in bodies]
        found: list[Any] = [None] * len(bodies)
        left = list(range(len(bodies)))
        for tried in range(self.again + 1):
            if not left:
                break
            rows = [{"prompt": turns[place], "seed": tried} for place in left]
            replies = self.speaker.say(rows, self.how, self.stages, "judging")
            for place, reply in zip(left, replies):
                found[place] = reading(reply.text, place) or None
                turns[place] = [
                    *turns[place],
                    {"role": "assistant", "content": reply.text},
                    {
                        "role": "user",
                        "content": "I cannot read that. Give only the lines asked for.",
                    },
                ]
            left = [place for place in left if found[place] is None]
        if left:
            log.warning("%d of %d replies of the judge cannot be read", len(left), len(bodies))
        return found


def dynamic(
    asked: Asked,
    *,
    engine: Callable[[Place], Any],
    aspects: Sequence[str],
    pick: str,
    question: str,
    again: int,
    temperature: float,
    max_tokens: int,
) -> Judge:
    """A language model that says first what matters; ``asked.metered`` sees all it is asked."""
    for key, text in (("pick", pick), ("question", question)):
        for name in NAMES[key]:
            if f"{{{name}}}" not in text:
                raise UserError(
                    f"judge.{key} has no {{{name}}}: it must hold each of {NAMES[key]}"
                )
    parts = [str(one).partition(": ") for one in aspects]
    if not parts or not all(name and meaning for name, _, meaning in parts):
        raise UserError("judge.aspects: give names and what each means, ['NAME: TEXT', ...]")
    meanings = {name: meaning for name, _, meaning in parts}
    place = Place(asked.cache, asked.processes, "judge.engine", asked.opened)
    who = asked.metered("judge", speaker(engine, place))
    how = Decoding(max_tokens, asked.batch_size, (), temperature)
    return Dynamic(who, how, asked.stages, meanings, pick, question, again)


def filled(text: str, **of: str) -> str:
    """The text with what stands in braces replaced, at once: a name inside a value stays."""
    return re.sub("|".join(f"{{{name}}}" for name in of), lambda found: of[found[0][1:-1]], text)


def named_in(text: str, names: Sequence[str]) -> list[str]:
    """Those of the names that the text holds, in their order."""
    return [name for name in names if re.search(rf"(?i)(?<!\w){_loose(name)}(?!\w)", text)]


def scores_in(text: str, names: Sequence[str]) -> dict[str, tuple[float, str]]:
    """The score that follows each name, and the rest of its line."""
    found: dict[str, tuple[float, str]] = {}
    for name in names:
        one = re.search(rf"(?i)(?<!\w){_loose(name)}{SCORE}([^\n]*)", text)
        if one is not None and float(one[1]) <= BEST:
            found[name] = float(one[1]), one[2].lstrip(" /5.,:;-*)|").strip()
    return found


def _loose(name: str) -> str:
    """The name, with any mark between its words."""
    return r"[\W_]".join(map(re.escape, re.split(r"\W", name)))
