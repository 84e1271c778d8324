"""A tree and questions that the search never asked in, what its prompts score on them out."""

import random
from collections.abc import Sequence
from typing import Any

from spo_lightning.capability.paired import change
from spo_lightning.data.rows import Row
from spo_lightning.prompting.beam import Judged, Node, best_of


def compared(
    judged: Judged, tree: Sequence[Node], rows: Sequence[Row], seed: int
) -> dict[str, dict[str, Any]]:
    """Of the start, the best prompt and a random one of the others, where there are such: mean
    score with its 95% interval, and how far that is from the start's, question by question."""
    best = best_of(tree)
    prompts = {"start": tree[0].prompt}
    if best.prompt != tree[0].prompt:
        prompts["best"] = best.prompt
    others = [*dict.fromkeys(n.prompt for n in tree if n.prompt not in prompts.values())]
    if others:
        prompts["random"] = random.Random(seed).choice(others)
    found = dict(zip(prompts, judged([*prompts.values()], rows)))
    scores = {name: [case.verdict.score for case in cases] for name, cases in found.items()}
    # on questions that all have a score for
    whole = [n for n in range(len(rows)) if all(of[n] is not None for of in scores.values())]
    return {
        name: _numbers([of[n] for n in whole], [scores["start"][n] for n in whole])
        | {"prompt": prompts[name]}
        for name, of in scores.items()
    }


def _numbers(mine: Sequence[Any], first: Sequence[Any]) -> dict[str, Any]:
    if not mine:
        return {"rows": 0}
    own = change([0.0] * len(mine), mine)
    numbers = {"rows": len(mine), "score": own["difference"], "low": own["low"]}
    return numbers | {"high": own["high"], "against_start": change(first, mine)}
