"""What is asked in, a judge out: answers to scores, higher is better, None where it cannot tell.

Every judge here scores answers one at a time, and of two prefers the higher score. A new judge is
a function that takes ``Asked`` and its own keys, and a yaml in ``conf/judge``.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, Protocol

from spo_lightning.data.rows import prompt_key
from spo_lightning.errors import UserError
from spo_lightning.evaluation.wins import Verdicts
from spo_lightning.world import ALONE

Scores = list[float | None]


class Judge(Protocol):
    """Scores answers, and says of two which is better."""

    @property
    def requests(self) -> int: ...

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores: ...

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts: ...


@dataclass(frozen=True)
class ByScore:
    """The judge that a score makes."""

    score: Callable[[Sequence[dict], Sequence[str]], Scores]
    requests: int = 0

    def __call__(self, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return self.score(rows, texts)

    def compare(
        self, rows: Sequence[dict], mine: Sequence[str], theirs: Sequence[str]
    ) -> Verdicts:
        wins: Scores = []
        both = zip(self.score(rows, mine), self.score(rows, theirs), mine, theirs)
        for a, b, one, other in both:
            if a is None or b is None or math.isnan(a) or math.isnan(b):
                wins.append(None)
            else:  # one text twice is a tie, however the two batches that it stood in round
                wins.append(0.5 if one == other else (a > b) + (a == b) / 2)
        return Verdicts(wins, [None] * len(wins))


@dataclass(frozen=True)
class Asked:
    """What a judge may need: the task, the policy that answers, and how another is opened."""

    task: Any
    policy: Any
    opened: Callable[..., Any]
    precision: Callable[[], AbstractContextManager]
    stages: Any
    batch_size: int
    max_length: int
    cache: Path | None = None  # where what was paid for is kept
    processes: int = 1  # that ask at a time
    # of who asks and whom, the same one or one that counts what is asked
    metered: Callable[[str, Any], Any] = lambda who, speaker: speaker


def each_against_all(judge: Judge, rows: Sequence[dict], texts: Sequence[str]) -> Scores:
    """Scores by a judge that compares: of several answers to one prompt, which stand together,
    each one's wins against the others, on average."""
    wins: list[Scores] = [[] for _ in texts]
    places = groupby(range(len(rows)), key=lambda place: prompt_key(rows[place]["prompt"]))
    both = [pair for _, some in places for pair in combinations(some, 2)]
    mine, theirs = ([texts[pair[side]] for pair in both] for side in (0, 1))
    for (a, b), win in zip(both, judge.compare([rows[a] for a, _ in both], mine, theirs).wins):
        if win is not None:
            wins[a].append(win)
            wins[b].append(1 - win)
    return [sum(some) / len(some) if some else None for some in wins]  # type: ignore[arg-type]


def task(asked: Asked) -> Judge | None:
    """The data's own judge; None where it has none."""
    judge = asked.task.judge
    return judge and ByScore(lambda rows, texts: [float(judge(text)) for text in texts])


def answer(asked: Asked) -> Judge:
    """1 where the final answer in the text is the row's, else 0."""
    from spo_lightning.evaluation.held_out import correct

    if asked.task.answer_of is None:
        raise UserError("judge=answer: this data has no answers: choose function or likelihood")

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        right = (correct(asked.task, row, text) for row, text in zip(rows, texts))
        return [None if one is None else float(one) for one in right]

    return ByScore(judge)


def function(asked: Asked, *, path: str) -> Judge:
    """A Python function of yours, ``module.name``, called with a row and an answer's text."""
    module, _, name = path.rpartition(".")
    try:
        called = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge.path={path}: not found ({error}): name module.function") from error

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return [_number(called(row, text), path) for row, text in zip(rows, texts)]

    return ByScore(judge)


def _number(found: Any, path: str) -> float | None:
    if found is not None and not (isinstance(found, (int, float)) and math.isfinite(found)):
        raise UserError(
            f"judge.path={path} returned {found!r}: a finite number, or None, is wanted"
        )
    return None if found is None else float(found)


def likelihood(asked: Asked, *, model: str | None, per_token: bool) -> Judge:
    """log pi(answer | prompt) in nats under ``model``, or under the policy that answered."""
    if model is None and asked.policy is None:
        raise UserError("judge.model=null is the policy, and an endpoint answers: name a model")
    read = reading(asked, asked.policy if model is None else asked.opened(model))

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        sums = [(None, 1) if x is None else (x.sum().item(), len(x)) for x in read(rows, texts)]
        return [total and total / (count if per_token else 1) for total, count in sums]

    return ByScore(judge)


def reward(asked: Asked, *, model: str) -> Judge:
    """The reward of the whole answer, by a model for sequence classification with one label."""
    judged = asked.opened(model, rewards=True)
    if not judged.rewards:
        raise UserError(
            f"judge.model={model} is no sequence classifier: name a reward model, or choose "
            "judge=likelihood"
        )
    read = reading(asked, judged)

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        return [None if found is None else found.item() for found in read(rows, texts)]

    return ByScore(judge)


def reading(asked: Asked, judged: Any) -> Callable[[Sequence[dict], Sequence[str]], list[Any]]:
    """What a model gives for each answer, as a tensor: log-probabilities of its tokens, or its
    reward. None of one that is empty, or whose prompt leaves it no room."""
    from spo_lightning.data.chat import as_asked
    from spo_lightning.data.encode import encode_texts
    from spo_lightning.data.sets import Pairs
    from spo_lightning.models.rewards import to_reward
    from spo_lightning.models.scorer import LOGITS, score
    from spo_lightning.models.sharing import scorer_of
    from spo_lightning.records.progress import Within

    scorer = scorer_of(judged, asked.max_length, share=True, logits=LOGITS)
    pad = judged.tokenizer.pad_token_id

    def read(rows: Sequence[dict], texts: Sequence[str]) -> list[Any]:
        asked_rows = [
            {**row, "completion": as_asked(row["prompt"], text)} for row, text in zip(rows, texts)
        ]
        found: list[Any] = [None] * len(texts)
        how = {"max_length": asked.max_length, "scored": "assistant"}
        some = Pairs(encode_texts(asked_rows, judged.tokenizer, **how), None, pad)
        some = to_reward(some, judged.lm) if judged.rewards else some
        scored = score(
            scorer,
            some,
            batches=some.batches(asked.batch_size),
            precision=asked.precision,
            stages=Within(asked.stages, ALONE),
            title="judging",
        )
        for pair, values in zip(some.pairs, scored.references or ()):
            found[pair.row] = values.double()
        return found

    return read
