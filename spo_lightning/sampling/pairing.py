"""A policy and a judge in, preference pairs out: the policy's own answers, the best and the worst.

Sampled once per policy, rows and settings: what an earlier run sampled is taken from the cache.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig

from spo_lightning.cache.shards import cache_of
from spo_lightning.data.chat import as_asked
from spo_lightning.data.labels import apart
from spo_lightning.data.rows import Task
from spo_lightning.errors import UserError
from spo_lightning.models.generate import Decoding, answers
from spo_lightning.models.policy import Policy
from spo_lightning.records.directory import write_text
from spo_lightning.records.progress import Stages
from spo_lightning.training import sft

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Places:
    """Held-out rows that are answered, and for each held-out pair row the one it belongs to."""

    rows: list[dict]
    of: list[int]


def with_pairs(cfg: DictConfig, task: Task, policy: Policy, stages: Stages) -> tuple[Task, Places]:
    """The task with its pairs; sampled from the policy, once per policy, where the data asks."""
    held = task.held_out[: cfg.eval.max_rows]
    if not task.samples:
        return replace(task, held_out=held), Places(held, list(range(len(held))))
    train, counts = task.train, task.counts
    if not task.given:
        train, _, ties = sampled(cfg, task, train, policy, stages)
        if not train and cfg.max_steps:
            raise UserError(
                f"the judge likes all samples of every one of {ties} prompts alike: raise "
                "data.samples or data.prompts, or pretrain longer (sft.max_steps)"
            )
        counts = {**counts, "prompts whose samples the judge ties": ties}
    pairs, of, _ = sampled(cfg, task, held, policy, stages)
    if cfg.data.get("unpaired"):
        train = apart(train)
    return replace(task, train=train, held_out=pairs, counts=counts), Places(held, of)


def sampled(
    cfg: DictConfig, task: Task, rows: Sequence[dict], policy: Policy, stages: Stages
) -> tuple[list[dict], list[int], int]:
    """Pair rows judged among the policy's samples, the row each came from, the ties; cached."""
    assert task.judge is not None
    how = Decoding.of(cfg, task.temperature, cfg.seed)
    asked = [list(rows), task.samples, str(how), sft.key(policy, (), {})]
    digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
    cached = cache_of(cfg)
    home = None if cached is None else cached / "sampled_pairs" / f"{digest[:16]}.json"

    def known() -> Any:
        if home is None or not home.exists():
            return None
        log.info("Sampled pairs: taken from %s", home)
        return json.loads(home.read_text(encoding="utf-8"))

    found = stages.world.once(known)
    if found is not None:
        return found["pairs"], found["of"], found["ties"]
    numbered = [{**row, "place": place} for place, row in enumerate(rows)]
    pairs, ties = judged_pairs(policy, numbered, task.judge, how, stages, samples=task.samples)
    of = [row.pop("place") for row in pairs]
    if home is not None and stages.world.first:
        home.parent.mkdir(parents=True, exist_ok=True)
        write_text(home, json.dumps({"pairs": pairs, "of": of, "ties": ties}))
    return pairs, of, ties


def judged_pairs(
    policy: Policy,
    rows: Sequence[dict],
    judge: Callable[[str], float],
    how: Decoding,
    stages: Stages,
    *,
    samples: int,
) -> tuple[list[dict], int]:
    """Per prompt the best and the worst of ``samples`` answers under the judge, on-policy.

    Also how many prompts gave no pair because the judge saw no difference.
    """
    repeated = [row for row in rows for _ in range(samples)]
    texts = answers(policy, repeated, how, stages, "sampling pairs")
    pairs = []
    for place, row in enumerate(rows):
        mine = texts[place * samples : (place + 1) * samples]
        best, worst = max(mine, key=judge), min(mine, key=judge)
        if judge(best) > judge(worst):
            chosen, rejected = (as_asked(row["prompt"], text) for text in (best, worst))
            pairs.append({**row, "chosen": chosen, "rejected": rejected})
    return pairs, len(rows) - len(pairs)
