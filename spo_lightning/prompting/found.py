"""The configuration of a search in, its prompt, examples, tree, page and log out.

All that is asked of models is in calls.jsonl as it comes: a search that was killed is walked again
from its start, asks nothing that stands there, and ends as it would have ended.
"""

import json
import logging
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spo_lightning import __version__
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError
from spo_lightning.prompting import bank, page
from spo_lightning.prompting.beam import Node, Shape, best_of, search
from spo_lightning.prompting.calls import Calls, Spent
from spo_lightning.prompting.checked import compared
from spo_lightning.prompting.roles import roles_of
from spo_lightning.records.directory import (
    CHOICES,
    PACE,
    without_secrets,
    words_without_secrets,
    write_text,
)
from spo_lightning.records.lock import held
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.records.resume import refuse_another
from spo_lightning.sweep.again import TREE
from spo_lightning.world import World

log = logging.getLogger(__name__)

ROLES = ("roles.base", "roles.optimizer", "judge.engine", "judge")
MAY_DIFFER = (
    *("resume", "search.depth", "budget"),
    *(f"{role}.{key}" for role in ROLES for key in PACE),
)
PAGE_SECONDS = 30.0  # between two pages of a search that goes on
PROMPT, EXAMPLES, CALLS = "prompt.txt", "examples.jsonl", "calls.jsonl"


def find(
    cfg: Any, place: Path, choices: Mapping[str, str], command: Sequence[str], world: World
) -> dict[str, Any]:
    """Search to the end, or to the budget's; what tree.json holds."""
    quiet()
    how = f"Go on with: python -m spo_lightning.prompt_search resume={place}"
    stages = Stages(lambda *_: None, Stop(), how, world)
    with held(place):
        record = _begun(cfg, place, choices, command)
        calls = Calls(place / CALLS, cfg.budget.calls, cfg.budget.dollars, cfg.batch_size)
        try:
            with stages.stop.listening():
                walked(cfg, place, record, calls, stages)
        except UserError:
            if not calls.count:  # bad input leaves no search of its settings
                for name in (TREE, "config.yaml"):
                    (place / name).unlink(missing_ok=True)
            raise
    log.info("\n%s\n\nPrompt: %s\nPage: %s", page.told(record), place / PROMPT, place / page.NAME)
    return record


def _begun(
    cfg: Any, place: Path, choices: Mapping[str, str], command: Sequence[str]
) -> dict[str, Any]:
    """What tree.json holds before the next call; a search of other settings is refused."""
    config, path = place / "config.yaml", place / TREE
    if config.exists():
        refuse_another(cfg, config, MAY_DIFFER)
    head = f"{CHOICES}{json.dumps(dict(choices))}\n"
    plain = without_secrets(OmegaConf.to_container(cfg, resolve=True, enum_to_str=True))
    write_text(config, head + OmegaConf.to_yaml(plain))
    if path.exists():
        log.info("Going on with the search of %s", place)
        return json.loads(path.read_text(encoding="utf-8")) | {"stopped": None}
    record: dict[str, Any] = {"version": __version__, "command": words_without_secrets(command)}
    record |= {"cwd": str(Path.cwd()), "stopped": None, "best": None, "check": None, "nodes": []}
    write_text(path, json.dumps(record, indent=1) + "\n")
    return record


def walked(cfg: Any, place: Path, record: dict[str, Any], calls: Calls, stages: Stages) -> None:
    """The bank, the search, the comparison: each as far as the budget goes."""
    roles = roles_of(cfg, calls, stages)
    tree: list[Node] = []
    drawn = 0.0  # when the page was

    def note(*, ended: bool = False) -> None:
        nonlocal drawn
        record["nodes"] = [node.told() for node in tree]
        record["best"] = best_of(tree).number if tree else None
        record["calls"] = {
            role: dict(zip(("calls", "read", "written", "dollars"), of))
            for role, of in calls.by_role.items()
        }
        best = best_of(tree).prompt if tree else roles.start
        write_text(place / PROMPT, best + "\n")
        write_text(place / TREE, json.dumps(record, ensure_ascii=False, indent=1) + "\n")
        if tree and not ended:
            at = best_of(tree)
            log.info("Step %d: value %.3f, score %.3f", tree[-1].depth, at.value, at.reward)
        if ended or time.monotonic() - drawn > PAGE_SECONDS:
            write_text(place / page.NAME, page.whole(record))
            drawn = time.monotonic()

    def keep(rows: Sequence[Row]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        write_text(place / EXAMPLES, text)

    shape = Shape(**{key: cfg.search[key] for key in Shape.__dataclass_fields__})
    try:
        if roles.bank is not None:
            how = (cfg.bank.rounds, shape.enough, roles.verdicts, roles.rewriter.revision)
            roles.take(bank.rewritten(roles.bank.rows, *how, keep))
            keep(roles.bank.rows)
        search(roles.start, roles.rows, shape, roles.rewriter, roles.judged, tree, note)
        if roles.apart:
            record["check"] = compared(roles.judged, tree, roles.apart, cfg.seed)
    except Spent as error:
        record["stopped"] = str(error)
        log.warning("The budget is spent (%s): the search ends with what it has", error)
    note(ended=True)
