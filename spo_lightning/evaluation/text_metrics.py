"""Answers and references in, exact match and ROUGE out; nothing is fetched."""

from typing import Any

import datasets
import evaluate

TEXTS = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
)


def _info(description: str) -> Any:
    return evaluate.MetricInfo(description=description, citation="", features=TEXTS)


class ExactMatch(evaluate.Metric):
    """Share of predictions equal to their reference."""

    def _info(self) -> Any:
        return _info("Share of predictions equal to their reference.")

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        right = sum(p == r for p, r in zip(predictions, references))
        return {"exact_match": right / len(references)}


class Rouge(evaluate.Metric):
    """Mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L by the rouge_score library, no stemming."""

    def _info(self) -> Any:
        return _info("Mean ROUGE-1, ROUGE-2 and ROUGE-L F1.")

    def _compute(self, predictions: Any, references: Any, **_: Any) -> dict[str, float]:
        from rouge_score.rouge_scorer import RougeScorer

        kinds = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(kinds, use_stemmer=False)
        scored = [scorer.score(r, p) for p, r in zip(predictions, references)]
        return {kind: sum(s[kind].fmeasure for s in scored) / len(scored) for kind in kinds}
