"""A policy in, what it can do out: its answers to ``eval.prompts``, counted without a judge, and
its results in ``eval.tasks``.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from spo_lightning.capability import harness
from spo_lightning.capability.prompted import check_template, prompted, text_of
from spo_lightning.data.chat import in_turns
from spo_lightning.data.encode import prompt_ids
from spo_lightning.data.reading import read
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import HeldOut
from spo_lightning.evaluation.shares import Items, items, shares
from spo_lightning.models.generate import Decoding, Engine, answered
from spo_lightning.models.policy import Policy
from spo_lightning.records.progress import Stages


class Looked(NamedTuple):
    """Numbers, and what each prompt adds to them."""

    numbers: dict[str, float]
    items: Items


def prompts_of(cfg: Any) -> list[Row]:
    """The rows of ``eval.prompts``; none where it names nothing."""
    place = cfg.eval.get("prompts")
    if place is None:
        return []
    found = read(place, split="train", where="eval.prompts")
    for at, row in enumerate(found):
        if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
            raise UserError(f"{found.named(at)}: no 'prompt': add one, a text or messages")
        if isinstance(row["prompt"], list) and not all(
            isinstance(it, dict) for it in row["prompt"]
        ):
            raise UserError(f"{found.named(at)}: 'prompt' is a list, and not of messages")
    rows = [in_turns(row, chat=cfg.data.chat, system=cfg.data.system) for row in found]
    return prompted(cfg, rows)


def check(cfg: Any) -> None:
    """Refuse what ``look`` could not do, before anything slow."""
    loss = cfg.get("loss", {})
    if loss.get("rewards") or loss.get("template"):
        refuse_without_texts(cfg, "this loss trains a model that ranks")
    prompts_of(cfg)
    harness.check(cfg)


def check_policy(cfg: Any, policy: Policy) -> None:
    """Refuse a model that cannot be asked, before anything slow."""
    if text_of(cfg) is not None:
        check_template(policy.tokenizer, cfg.system_turn, "the model")
    for row in prompts_of(cfg):
        prompt_ids(row, policy.tokenizer)
    if cfg.eval.get("tasks") and cfg.eval.tasks_chat and policy.tokenizer.chat_template is None:
        raise UserError("eval.tasks_chat=true: the model has no chat template: leave it out")


def refuse_without_texts(cfg: Any, who: str) -> None:
    """What ranks answers nothing."""
    for key in ("prompts", "tasks"):
        if cfg.eval.get(key):
            raise UserError(
                f"eval.{key} has no effect: {who}, which answers nothing; leave it out"
            )


def look(
    cfg: Any, policy: Policy, stages: Stages, engine: Engine | None = None, start: bool = False
) -> Looked:
    """The numbers of both, of the policy as it is in memory. ``engine``: who answers the prompts
    in its place. ``start``: many runs begin with it, and its tasks are kept for them."""
    found = Looked(*harness.results(cfg, policy, stages, start))
    rows = prompts_of(cfg)
    if rows:
        how = replace(Decoding.of(cfg, seed=cfg.seed), engine=engine)
        given = answered(policy, rows, how, stages, "eval.prompts")
        refusals = refusals_of(cfg)
        found.numbers.update(_named(shares(given, refusals)))
        found.items.update(_named(items(given, refusals)))
    return found


def beyond(found: HeldOut, looked: Looked, cfg: Any) -> HeldOut:
    """The held-out numbers and those of ``look``, with what each answer adds."""
    each = items(found.answers.given, refusals_of(cfg)) | looked.items
    right = found.answers.right
    if right and None not in right:
        each["exact_match"] = [float(one or 0) for one in right]
    return found._replace(numbers={**found.numbers, **looked.numbers}, items=each)


def refusals_of(cfg: Any) -> Sequence[str]:
    """How an answer that refuses begins."""
    return cfg.eval.get("refusals", ())


def _named(found: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("answers/", "prompts/"): value for name, value in found.items()}
