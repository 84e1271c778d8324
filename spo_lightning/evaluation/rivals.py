"""``eval.rival`` in, the answers that the policy's own are compared with out: one per prompt."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from spo_lightning.data import layouts
from spo_lightning.data.chat import in_turns
from spo_lightning.data.reading import read
from spo_lightning.data.rows import prompt_key
from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import RIVALS, said, samples
from spo_lightning.models.generate import Decoding, Engine
from spo_lightning.models.policy import Policy
from spo_lightning.models.sources import check
from spo_lightning.records.progress import Stages

START, CHOSEN = "start", "chosen"


def rivals_of(
    cfg: Any,
    start: Policy | None,
    opened: Callable[[str], Policy],
    task: Any,
    rows: Sequence[dict],
    stages: Stages,
    engine: Engine | None = None,
) -> list[str] | None:
    """None where the start is asked for and there is none. ``engine``: who answers for it."""
    told, named = given(cfg, rows), cfg.eval.get("rival", START)
    if told is not None:
        return told
    answering = start if named == START else opened(named)
    engine = engine if named == START else None
    how = replace(Decoding.of(cfg, seed=cfg.seed), engine=engine)
    return answering and samples(answering, rows, task, how, RIVALS, stages)


def given(cfg: Any, rows: Sequence[dict]) -> list[str] | None:
    """Answers that stand in the data or in a file; None where a model has to give them."""
    named = cfg.eval.get("rival", START)
    if named == CHOSEN:
        for number, row in enumerate(rows, 1):
            if "chosen" not in row:
                raise UserError(
                    f"eval.rival=chosen: held-out row {number} has no chosen answer: name start, "
                    "a file or a model"
                )
        return [said(row["chosen"]) for row in rows]
    if _is_file(named):
        return _of_file(named, cfg.data, rows)
    if named != START:
        check(named)
    return None


def _is_file(named: str) -> bool:
    return Path(named).is_file() and not named.endswith(".gguf")


def _of_file(named: str, data: Any, rows: Sequence[dict]) -> list[str]:
    raw = read(named, split="train", where="eval.rival")
    made = layouts.normalised(raw, named, (layouts.TEXTS,)).rows
    how = {"chat": data.get("chat", False), "system": data.get("system")}
    made = [in_turns(row, **how) for row in made]
    known = {prompt_key(row["prompt"]): said(row["completion"]) for row in made}
    keys = [prompt_key(row["prompt"]) for row in rows]
    missing = [key for key in keys if key not in known]
    if missing:
        raise UserError(
            f"{named} has no answer to {len(missing)} of {len(keys)} held-out prompts, as to "
            f"{missing[0][:60]!r}: add rows of prompt and completion"
        )
    return [known[key] for key in keys]
