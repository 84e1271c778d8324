"""The ``judge`` and the ``engine`` of a config in, who decides which answer is better and who
answers in the policy's place out."""

import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built
from spo_lightning.errors import UserError
from spo_lightning.run.record import Opened

if TYPE_CHECKING:
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.judges.local import Judge
    from spo_lightning.models.generate import Engine
    from spo_lightning.models.policy import Policy
    from spo_lightning.models.sources import Source


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


class NotYet(Exception):
    """What is asked of a model before any is loaded."""


class Unopened:
    """In the place of a model: what its directory says of it, and ``NotYet`` to all else."""

    def __init__(self, source: "Source | None" = None):
        self._source = source

    def __getattr__(self, name: str) -> Any:
        raise NotYet

    @property
    def rewards(self) -> bool:
        kinds = self._read("config.json").get("architectures") or [""]
        return kinds[0].endswith("ForSequenceClassification")

    @property
    def template(self) -> str | None:
        from spo_lightning.models.policy import TEMPLATE

        return self._read("tokenizer_config.json").get(TEMPLATE)

    def _read(self, name: str) -> dict[str, Any]:
        if self._source is None or self._source.adapters:  # which may make another kind of it
            raise NotYet
        try:
            return json.loads((self._source.path / name).read_text("utf-8"))
        except (OSError, ValueError) as error:
            raise NotYet from error


def check_judge(cfg: Any, task: Any, policy: Any) -> bool:
    """Refuse a judge that cannot be meant, before a model is loaded; whether there is one.
    ``policy``: ``Unopened``, or None where an endpoint answers."""
    from spo_lightning.judges.local import Asked
    from spo_lightning.models import sources
    from spo_lightning.records.progress import silent

    def opened(model: str, **_: Any) -> Unopened:
        return Unopened(sources.check(model))

    size: Any = cfg.eval.batch_size, cfg.max_length
    asked = Asked(task, policy, opened, nullcontext, silent(), *size)
    made = chosen(cfg)
    for member in made.keywords.get("members", {}).values():
        with suppress(NotYet):  # and the next one may be refused all the same
            member(asked)
    with suppress(NotYet):
        return made(asked) is not None
    return True


def check_rival(cfg: Any, rows: Sequence[dict], judged: bool, start: bool) -> None:
    """Refuse a rival that has no answers to the rows, or that nobody would compare with, before a
    model is loaded. ``start``: whether there is one."""
    from spo_lightning.evaluation.rivals import START, given

    named = cfg.eval.get("rival", START)
    if not judged and named != START:
        raise UserError(
            f"eval.rival={named} has no effect: this data has no judge: name one, judge=..."
        )
    if not start and named == START and not cfg.judge._target_.endswith(".local.task"):
        raise UserError(
            "judge has no effect: eval.rival=start is the reference, and none is named: give "
            "reference=..., or eval.rival=chosen, a file or a model"
        )
    given(cfg, rows)


def refuse_to_judge(cfg: Any, task: Any) -> None:
    """A run's judge, rival, or looks at what nobody judges."""
    judged = check_judge(cfg, task, Unopened())
    check_rival(cfg, task.held_out[: cfg.eval.max_rows], judged, start=True)
    looks = cfg.eval.get("judge", {}).get("every_n_steps")
    ranks = cfg.loss.get("rewards") or cfg.loss.get("template")
    if looks and (ranks or not judged):
        raise UserError(
            f"eval.judge.every_n_steps={looks}: nothing is judged: name a judge, judge=..."
        )


def engine_of(cfg: Any, processes: int = 1) -> "Engine | None":
    """None where the policy itself answers. ``processes``: that ask for answers at a time."""
    from spo_lightning.cache.shards import cache_of
    from spo_lightning.models.engines import Place

    cache = cache_of(cfg)
    return called(cfg.engine, "engine")(Place(cache and cache / "answers", processes))


def judge_of(at: Opened, settings: Any, processes: int = 1, **more: Any) -> "Judge | None":
    """None where the data is to judge and has no judge. ``settings``: as ``opened`` reads them.
    ``processes``: that judge at a time. ``more``: of ``Asked``, in the place of these."""
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
        processes,
    )
    return chosen(cfg)(replace(asked, **more))


def against(
    at: Opened,
    settings: Any,
    start: "Policy | None",
    rows: Any,
    engine: "Engine | None" = None,
) -> "Against | None":
    """What held-out answers to ``rows`` are compared with; None where nothing is judged.
    ``engine``: who answers in the start's place."""
    from spo_lightning.evaluation.rivals import rivals_of
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.models.policy import opened

    judge = judge_of(at, settings)
    if judge is None:
        return None
    another = partial(opened, settings=settings, device=at.world.device)
    texts = rivals_of(at.cfg, start, another, at.task, rows, at.stages, engine)
    return None if texts is None else Against(texts, judge)
