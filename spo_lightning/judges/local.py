"""What is asked in, a judge out: answers to scores, higher is better, None where it cannot tell.

A new judge is a function here that takes ``Asked`` and its own keys, and a yaml in ``conf/judge``.
"""

import importlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.world import ALONE

Judge = Callable[[Sequence[dict], Sequence[str]], list[float | None]]


@dataclass(frozen=True)
class Asked:
    """What a judge may need: the task, the policy that answers, and how another is opened."""

    task: Any
    policy: Any
    opened: Callable[[str], Any]
    precision: Callable[[], AbstractContextManager]
    stages: Any
    batch_size: int
    max_length: int


def task(asked: Asked) -> Judge:
    """The data's own judge, the one that win_rate compares by."""
    judge = asked.task.judge
    if judge is None:
        raise UserError("judge=task: this data has none: choose answer, function or likelihood")
    return lambda rows, texts: [float(judge(text)) for text in texts]


def answer(asked: Asked) -> Judge:
    """1 where the final answer in the text is the row's, else 0."""
    from spo_lightning.evaluation.held_out import correct

    if asked.task.answer_of is None:
        raise UserError("judge=answer: this data has no answers: choose function or likelihood")

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> list[float | None]:
        right = (correct(asked.task, row, text) for row, text in zip(rows, texts))
        return [None if one is None else float(one) for one in right]

    return judge


def function(asked: Asked, *, path: str) -> Judge:
    """A Python function of yours, ``module.name``, called with a row and an answer's text."""
    module, _, name = path.rpartition(".")
    try:
        called = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"judge.path={path}: not found ({error}): name module.function") from error

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> list[float | None]:
        return [_number(called(row, text), path) for row, text in zip(rows, texts)]

    return judge


def _number(found: Any, path: str) -> float | None:
    if found is not None and not (isinstance(found, (int, float)) and math.isfinite(found)):
        raise UserError(
            f"judge.path={path} returned {found!r}: a finite number, or None, is wanted"
        )
    return None if found is None else float(found)


def likelihood(asked: Asked, *, model: str | None, per_token: bool) -> Judge:
    """log pi(answer | prompt) in nats under ``model``, or under the policy that answered."""
    from spo_lightning.data.chat import as_asked
    from spo_lightning.data.encode import encode_texts
    from spo_lightning.data.sets import Pairs
    from spo_lightning.models.scorer import LOGITS, score
    from spo_lightning.models.sharing import scorer_of
    from spo_lightning.records.progress import Within

    judged = asked.policy if model is None else asked.opened(model)
    scorer = scorer_of(judged, asked.max_length, share=True, logits=LOGITS)
    pad = judged.tokenizer.pad_token_id

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> list[float | None]:
        asked_rows = [
            {**row, "completion": as_asked(row["prompt"], text)} for row, text in zip(rows, texts)
        ]
        found: list[float | None] = [None] * len(texts)  # empty, or too long to be scored
        how = {"max_length": asked.max_length, "scored": "assistant"}
        some = Pairs(encode_texts(asked_rows, judged.tokenizer, **how), None, pad)
        scored = score(
            scorer,
            some,
            batches=some.batches(asked.batch_size),
            precision=asked.precision,
            stages=Within(asked.stages, ALONE),
            title="likelihood",
        )
        for pair, logps in zip(some.pairs, scored.references or ()):
            total = logps.double().sum().item()
            found[pair.row] = total / len(logps) if per_token else total
        return found

    return judge
