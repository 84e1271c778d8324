"""Rows with answers in, whether a text comes to the answer out: by math-verify, which reads LaTeX,
fractions, sets and units, and compares values and not letters."""

import logging
from collections.abc import Sequence

from spo_lightning.errors import UserError
from spo_lightning.judges.local import Asked, ByScore, Judge, Scores


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
