"""Self-play, Chen et al. 2401.01335: rows with an answer in; it is chosen, the policy's rejected.

Nothing needs a judge. Where the data has one, the answers' scores are kept to be looked at.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from spo_lightning.data.chat import as_asked
from spo_lightning.data.rows import Row, Task, prompt_key
from spo_lightning.errors import UserError
from spo_lightning.judges.local import Asked, ByScore, Judge
from spo_lightning.run.record import Read, grown
from spo_lightning.sampling.draw import provenance

UNJUDGED = {"_target_": f"{__name__}.unjudged", "_partial_": True}


def rows(at: Read) -> Read:
    """The training rows that have an answer, or the SFT rows of data whose prompts have none."""
    own = [row for row in at.task.train if "chosen" in row]
    texts = [{**row, "chosen": row["completion"]} for row in at.task.sft]
    if not own and not texts:
        raise UserError("this data has no answers to its prompts, and loop=spin chooses them")
    task, cfg = replace(at.task, train=own or texts), at.cfg
    if task.judge is None and cfg.judge._target_.endswith(".local.task"):
        cfg = cfg.copy()
        cfg.judge = UNJUDGED
    return grown(Read, at, task=task, cfg=cfg)


def pairs(cfg: Any, task: Task, drawn: Sequence[dict]) -> Iterator[Row]:
    """The data's answer against each of the policy's that is another."""
    given = {prompt_key(row["prompt"]): row["chosen"] for row in task.train}
    source = provenance(cfg)
    for one in drawn:
        prompt = one["row"]["prompt"]
        best = given[prompt_key(prompt)]
        for text in one["samples"]:
            if text and as_asked(prompt, text) != best:
                kept = {key: value for key, value in one["row"].items() if key != "answer"}
                told = {"rejected": as_asked(prompt, text), "prompt_number": one["number"]}
                yield {**kept, "chosen": best, **told, **source}


def unjudged(asked: Asked) -> Judge:
    """No score of any answer."""
    return ByScore(lambda rows, texts: [None] * len(texts))
