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
from spo_lightning.records.progress import Stages
from spo_lightning.run.judging import called
from spo_lightning.run.record import Begun, Read, Stage, grown, walk
from spo_lightning.run.sampling import STAGES, Drawn

log = logging.getLogger(__name__)


def draw(cfg: Any, stages: Stages, number: int) -> None:
    """Write the pairs of a round to ``cfg.output``, its answers and scores beside them."""
    data, prompts, *answering, _ = STAGES
    begun = Begun(cfg, stages.world, stages, {})
    whole: Read = called(cfg.loop.rows, "loop")(walk([data], begun))
    share = Stage("share", partial(shared, number), "nothing", "again")
    at = walk([prompts, share, *answering], whole)
    stages.world.once(lambda: written(at, whole.task))


def shared(number: int, at: Read) -> Read:
    """The prompts of a round: the next so many of all, from the first again after the last."""
    rows = [row for row in at.task.train if row["prompt"]]
    if not rows:
        raise UserError("this data has no prompts, so nothing is asked: name prompts.path")
    size = min(at.cfg.loop.prompts or len(rows), len(rows))
    places = [((number - 1) * size + place) % len(rows) for place in range(size)]
    return grown(Read, at, task=replace(at.task, train=[rows[place] for place in places]))


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
