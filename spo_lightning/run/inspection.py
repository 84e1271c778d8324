"""Data and a tokenizer in, what the rows become out; sampled pairs are sampled first."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.errors import UserError
from spo_lightning.records.progress import hushed, quiet, silent
from spo_lightning.run.record import Begun
from spo_lightning.run.stages import data, pairs, policy, warm_start
from spo_lightning.world import World

if TYPE_CHECKING:
    from spo_lightning.data.encode import Encoded
    from spo_lightning.data.rows import Row
    from spo_lightning.data.summary import Summary


def inspect(cfg: Any) -> "Summary":
    """What the command says and shows."""
    _refuse(cfg.output)
    quiet()

    def place() -> Any:
        from spo_lightning.models.device import device_of

        return device_of(cfg.hardware)

    with hushed(data.__module__):  # the summary has the notes on the rows
        at: Any = data(Begun(cfg, World(place=place), silent(), {}))

    from omegaconf import OmegaConf

    from spo_lightning.cache.tokens import encoded
    from spo_lightning.data.chat import remarks
    from spo_lightning.data.ranking import of_questions
    from spo_lightning.data.summary import summary
    from spo_lightning.models.policy import tokenizer_of

    task, held = at.task, at.task.held_out[: cfg.eval.max_rows]
    if task.samples:  # the pairs are the policy's own samples
        for stage in (policy, warm_start, pairs):
            at = stage(at)
        task, tokenizer, held = at.task, at.policy.tokenizer, at.task.held_out
    else:
        tokenizer = tokenizer_of(cfg.model.pretrained, cfg.model)
    template = OmegaConf.select(cfg, "loss.template")
    if template is not None:
        task = of_questions(replace(task, held_out=held), template, tokenizer)
        held = task.held_out
    boundless: Any = OmegaConf.merge(cfg, {"max_length": sys.maxsize})

    def uncut(rows: "list[Row]") -> "Encoded":
        return encoded(boundless, tokenizer, rows, "uncut")

    return summary(
        replace(
            task, held_out=held, notes=(*task.notes, *remarks([*task.train, *held], tokenizer))
        ),
        {
            "train": encoded(cfg, tokenizer, task.train, "train"),
            "held-out": encoded(cfg, tokenizer, held, "held-out"),
        },
        tokenizer,
        name=cfg.data.get("path") or cfg.data.get("_target_").rpartition(".")[2],
        max_length=cfg.max_length,
        uncut=uncut,
    )


def _refuse(output: str) -> None:
    """Whatever is not the name of a page, before anything is read."""
    path = Path(output).expanduser()
    if path.suffix != ".html" or path.is_dir():
        raise UserError(f"output={output}: name a page, as in output=inspect.html")
    if not path.parent.is_dir():
        raise UserError(f"output={output}: there is no directory {path.parent}: make it first")
