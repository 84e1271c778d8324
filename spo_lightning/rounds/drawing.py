"""A round's policy in, its answers, judged, and the pairs made of them out, as files.

The stages are those of ``sample``; between them a round takes its share of the prompts.
"""

import json
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from spo_lightning.data.rows import Row, Task
from spo_lightning.errors import UserError
from spo_lightning.records.directory import write_text
from spo_lightning.records.disk import json_rows
from spo_lightning.records.progress import Stages
from spo_lightning.run.judging import called
from spo_lightning.run.record import Begun, Read, Stage, grown, walk
from spo_lightning.run.sampling import STAGES, Drawn

log = logging.getLogger(__name__)

DATA, PROMPTS, *ANSWERING, _ = STAGES


def draw(cfg: Any, stages: Stages, number: int, beside: Path | None = None) -> None:
    """Write the pairs of a round to ``cfg.output``, its answers and scores beside them."""
    at, whole = answered(cfg, stages, number, beside)
    stages.world.once(lambda: written(at, whole.task))


def draw_beside(mine: Any, theirs: Any, stages: Stages, number: int) -> Path:
    """The file of another policy's answers to a round's prompts. ``mine``: what the round then
    asks its own policy, which is refused before a model is loaded."""
    walk([PROMPTS], everything(mine, stages))
    at, _ = answered(theirs, stages, number)
    at.record.file.close()
    return at.record.path


def answered(
    cfg: Any, stages: Stages, number: int, beside: Path | None = None
) -> tuple[Drawn, Read]:
    """The answers to a round's prompts, in their file, and all that there is to ask.

    ``beside``: a file of another policy's answers to the same prompts, judged with these.
    """
    whole = everything(cfg, stages)
    share = Stage("share", partial(shared, number, beside), "nothing", "again")
    return walk([PROMPTS, share, *ANSWERING], whole), whole


def everything(cfg: Any, stages: Stages) -> Read:
    """All rows that a loop may ask."""
    return called(cfg.loop.rows, "loop")(walk([DATA], Begun(cfg, stages.world, stages, {})))


def shared(number: int, beside: Path | None, at: Read) -> Read:
    """The prompts of a round: the next so many of all, from the first again after the last."""
    rows = [row for row in at.task.train if row["prompt"]]
    if not rows:
        raise UserError("this data has no prompts, so nothing is asked: name prompts.path")
    size = min(at.cfg.loop.prompts or len(rows), len(rows))
    asked = [rows[((number - 1) * size + place) % len(rows)] for place in range(size)]
    if beside is not None:
        _, *theirs = json_rows(beside)
        of = {one["number"]: one["samples"] for one in theirs}
        asked = [{**row, "beside": of[place]} for place, row in enumerate(asked)]
    return grown(Read, at, task=replace(at.task, train=asked))


def written(at: Drawn, whole: Task) -> None:
    """The pairs, in the prompts' order; none at all ends the loop."""
    drawn = sorted(at.record.read(), key=lambda one: one["number"])
    at.record.file.close()
    rows: list[Row] = [*called(at.cfg.loop.pairs, "loop")(at.cfg, whole, drawn)]
    output = Path(at.cfg.output)
    if not rows:
        raise UserError(
            f"{at.record.path}: no prompt gives a pair, as its answers are all alike or score "
            "alike: raise loop.answers or loop.temperature, or name another judge"
        )
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    usable = len({row["prompt_number"] for row in rows})
    log.info("%d pairs of %d of %d prompts: %s", len(rows), usable, len(drawn), output)
