"""Examples in, the same with better answers out: each is judged, rewritten and judged again."""

from collections.abc import Callable, Sequence

from spo_lightning.data.rows import Row
from spo_lightning.judges.dynamic import Verdict

Judging = Callable[[Sequence[Row], Sequence[str]], list[Verdict]]
Revising = Callable[[Sequence[Row], Sequence[Verdict]], list[str | None]]


def rewritten(
    rows: Sequence[Row],
    rounds: int,
    enough: float | None,
    judging: Judging,
    revising: Revising,
    keep: Callable[[Sequence[Row]], None],
) -> list[Row]:
    """Rows of ``prompt``, ``completion``, its ``score`` and the answer ``before``. An answer is
    replaced by one with a higher score alone; ``keep`` is called with all rows as they get better.
    """
    if not rounds:
        return [*rows]
    verdicts = judging(rows, [row["completion"] for row in rows])
    found = [
        {**row, "before": row["completion"], "score": verdict.score}
        for row, verdict in zip(rows, verdicts)
    ]
    keep(found)
    for _ in range(rounds):
        places = [place for place, one in enumerate(found) if not _enough(one["score"], enough)]
        proposed = revising([found[n] for n in places], [verdicts[n] for n in places])
        told = [(place, text) for place, text in zip(places, proposed) if text is not None]
        if not told:
            break
        again = judging([found[place] for place, _ in told], [text for _, text in told])
        for (place, text), verdict in zip(told, again):
            if verdict.score is not None and verdict.score > (found[place]["score"] or 0):
                verdicts[place] = verdict
                found[place] |= {"completion": text, "score": verdict.score}
        keep(found)
    return found


def _enough(score: float | None, enough: float | None) -> bool:
    return score is not None and enough is not None and score > enough
