"""Rows that say what is right in, whether a text is out, by programs that others keep: math-verify
for mathematics, which reads LaTeX, fractions, sets and units and compares values and not letters,
and the checks of IFEval in lm-eval for instructions."""

import logging
import random
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.judges.local import Asked, ByScore, Judge, Scores

log = logging.getLogger(__name__)


def verifier(asked: Asked) -> Judge:
    """1 where the last expression of the text equals the row's ``answer``, else 0."""
    try:
        from math_verify import parse, verify  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        told = "pip install 'spo-lightning[verifier]'"
        raise UserError(f"judge=verifier needs math-verify: {told}") from error
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)  # of every text without a number

    def judge(rows: Sequence[dict], texts: Sequence[str]) -> Scores:
        scores: Scores = []
        for row, text in zip(rows, texts):
            wanted = parse(str(row["answer"])) if row.get("answer") is not None else []
            scores.append(float(verify(wanted, parse(text))) if wanted else None)
        return scores

    return ByScore(judge)


def steady() -> None:
    """IFEval's check of a language draws, and a short text had now this verdict, now that one."""
    with suppress(ModuleNotFoundError):
        from langdetect import DetectorFactory  # type: ignore[import-not-found]

        DetectorFactory.seed = 0


def instructions(asked: Asked) -> Judge:
    """The share of a row's instructions that the text follows, as IFEval's strict check has it:
    ``instruction_id_list`` and ``kwargs``, its columns. None of rows without, and of those whose
    check needs what is not installed."""
    try:
        from lm_eval.tasks.ifeval.instructions_registry import (  # type: ignore[import-not-found]
            INSTRUCTION_DICT,
        )
    except ModuleNotFoundError as error:
        told = "pip install 'lm-eval[ifeval]'"
        raise UserError(f"judge=instructions needs {error.name}: {told}") from error
    steady()

    def follows(row: Mapping[str, Any], name: str, given: Mapping[str, Any], text: str) -> bool:
        if name not in INSTRUCTION_DICT:
            raise UserError(f"judge=instructions: IFEval has no instruction {name}: correct it")
        instruction = INSTRUCTION_DICT[name](name)
        instruction.build_description(**{key: value for key, value in given.items() if value})
        if "prompt" in (instruction.get_instruction_args() or {}):
            instruction.build_description(prompt=row["prompt"])
        return bool(text.strip() and instruction.check_following(text))

    def score(row: Mapping[str, Any], text: str) -> float | None:
        asked_of = [*zip(row.get("instruction_id_list") or (), row.get("kwargs") or ())]
        kept = random.getstate()
        random.seed(0)  # what to count is drawn where a row asks for a letter that is none, as "#"
        try:
            told = [follows(row, name, given, text) for name, given in asked_of]
        except LookupError as error:  # nltk's, of sentences and words
            log.warning("judge=instructions: %s", str(error).strip().splitlines()[:2])
            return None
        finally:
            random.setstate(kept)
        return sum(told) / len(told) if told else None

    return ByScore(lambda rows, texts: [score(row, text) for row, text in zip(rows, texts)])
