"""A round's files in, its numbers out: what the loop's page shows of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spo_lightning.evaluation.held_out import compared
from spo_lightning.evaluation.wins import Against
from spo_lightning.judges.local import Judge
from spo_lightning.models.policy import Policy
from spo_lightning.records.disk import json_rows
from spo_lightning.records.progress import Stages
from spo_lightning.run import stages as shared
from spo_lightning.run.judging import judge_of
from spo_lightning.run.record import Begun
from spo_lightning.sampling.record import record_of
from spo_lightning.world import World


def look(
    cfg: Any, stages: Stages, place: Path, number: int, numbers: dict[str, Any]
) -> dict[str, Any]:
    """``number``, its ``pairs`` and what it drew; ``init`` and ``final`` of its run; ``judged``:
    greedy held-out answers at its end against those of the loop's start and of its own, and what
    the judge gives them before and after. ``cfg``: with the model at the round's end."""
    found = {"number": number, **_drawn(place / f"pairs-{number}.jsonl", cfg.loop.answers)}
    found |= {name: numbers[name] for name in ("init", "final", "steps")}
    mine, first = (rows_of(place / f"round-{n}" / "samples.jsonl") for n in (number, 1))
    return found | {"judged": _judged(cfg, stages, mine, first)}


def rows_of(path: Path) -> list[dict[str, Any]]:
    return json_rows(path) if path.exists() else []


def _drawn(pairs: Path, own: int) -> dict[str, Any]:
    """How many prompts there were, how many gave a pair, and the mean score of the round's own
    answers, the first so many of each."""
    _, *asked = rows_of(record_of(pairs))
    scores = [s for one in asked for s in one["scores"][:own] if s is not None]
    usable = {row["prompt_number"] for row in rows_of(pairs)}
    found = {"prompts": len(asked), "pairs": len(rows_of(pairs))}
    found |= {"usable": len(usable) / len(asked), "score": _mean(scores)}
    return found


def _judged(cfg: Any, stages: Stages, mine: Sequence[dict], first: Sequence[dict]) -> dict:
    at = shared.policy(shared.data(Begun(cfg, stages.world, stages, {})))
    judge = judge_of(at, cfg.model)
    if judge is None or not mine:
        return {}
    rows = at.task.held_out[: cfg.eval.max_rows]
    after = [row["after"] for row in mine]
    rivals = {"last": mine, "start": first}
    found: dict[str, Any] = {
        name: _against(at.policy, judge, rows, after, [one["before"] for one in some], at.world)
        for name, some in rivals.items()
    }
    before = [row["before"] for row in mine]
    for name, texts in (("before", before), ("after", after)):
        found[name] = _mean([score for score in judge(rows, texts) if score is not None])
    return found


def _against(
    policy: Policy,
    judge: Judge,
    rows: Sequence[dict],
    mine: Sequence[str],
    theirs: Sequence[str],
    world: World,
) -> dict[str, float]:
    return compared(policy, rows, mine, Against(theirs, judge), world).numbers(range(len(rows)))


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
