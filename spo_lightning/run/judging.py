"""The ``judge`` of a config in, who decides which answer is better out."""

import inspect
from functools import partial
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built
from spo_lightning.errors import UserError
from spo_lightning.run.record import Opened

if TYPE_CHECKING:
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.judges.local import Judge
    from spo_lightning.models.policy import Policy


def called(node: Any, where: str) -> Any:
    """A judge or strategy, its keys checked before anything slow."""
    made = built(node)
    parts = made.keywords.get("members", {})
    for one in (made, *parts.values()):
        try:
            inspect.signature(one.func).bind_partial(**one.keywords)
        except TypeError as error:
            raise UserError(f"{where}: {error}; see conf/{where} for its keys") from error
    return made


def chosen(cfg: Any) -> Any:
    """What makes the judge; its keys are checked."""
    # a run that began before there was this key goes on as it did
    own = {"_target_": "spo_lightning.judges.local.task", "_partial_": True}
    return called(cfg.get("judge", own), "judge")


def judge_of(at: Opened, settings: Any) -> "Judge | None":
    """None where the data is to judge and has no judge. ``settings``: as ``opened`` reads them."""
    from spo_lightning.cache.shards import cache_of
    from spo_lightning.judges.local import Asked
    from spo_lightning.models.policy import opened

    cfg, cache = at.cfg, cache_of(at.cfg)
    asked = Asked(
        at.task,
        at.policy,
        partial(opened, settings=settings, device=at.world.device),
        at.precision,
        at.stages,
        cfg.eval.batch_size,
        cfg.max_length,
        cache and cache / "verdicts",
    )
    return chosen(cfg)(asked)


def against(at: Opened, settings: Any, start: "Policy | None", rows: Any) -> "Against | None":
    """What held-out answers to ``rows`` are compared with; None where nothing is judged."""
    from spo_lightning.evaluation.rivals import START, rivals_of
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.models.policy import opened

    judge, named = judge_of(at, settings), at.cfg.eval.get("rival", START)
    if judge is None:
        if named != START:
            raise UserError(
                f"eval.rival={named} has no effect: this data has no judge: name one, judge=..."
            )
        return None
    another = partial(opened, settings=settings, device=at.world.device)
    texts = rivals_of(at.cfg, start, another, at.task, rows, at.stages)
    if texts is None and not at.cfg.judge._target_.endswith(".local.task"):
        raise UserError(
            "judge has no effect: eval.rival=start is the reference, and none is named: give "
            "reference=..., or eval.rival=chosen, a file or a model"
        )
    return None if texts is None else Against(texts, judge)
