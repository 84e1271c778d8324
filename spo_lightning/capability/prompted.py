"""Rows in, the same rows under a system prompt and after examples out: what a search has found, in
use. ``system_prompt``, ``system_turn``, ``examples`` and ``retrieval`` of a configuration say how.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.config.build import built
from spo_lightning.data.chat import in_turns, shown
from spo_lightning.data.reading import read
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError
from spo_lightning.models.nearest import Similarity


@dataclass(frozen=True)
class Bank:
    """Answered questions, and what says which of them are near to another one."""

    rows: Sequence[Row]
    count: int
    near: Similarity

    def nearest(self, prompt: Any) -> list[Row]:
        """The nearest last, beside the question itself."""
        scores = self.near(shown(prompt), [shown(row["prompt"]) for row in self.rows])
        order = sorted(range(len(scores)), key=lambda place: (-scores[place], place))
        return [self.rows[place] for place in reversed(order[: self.count])]


def bank_of(cfg: Any) -> Bank | None:
    """None where no examples are named."""
    place = cfg.examples.path
    if place is None:
        return None
    rows = read(place, split="train", where="examples.path")
    for at, row in enumerate(rows):
        for key in ("prompt", "completion"):
            if not isinstance(row.get(key), str) or not row[key].strip():
                raise UserError(f"{rows.named(at)}: no text '{key}': add it")
    if not rows:
        raise UserError(f"examples.path={place} has no rows: add some, or leave it out")
    return Bank(rows, cfg.examples.count, built(cfg.retrieval))


def text_of(cfg: Any) -> str | None:
    """The text of ``system_prompt``; None where it names nothing."""
    place = cfg.get("system_prompt")
    if place is None:
        return None
    try:
        text = Path(place).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"system_prompt={place}: cannot be read ({error})") from error
    if not text:
        raise UserError(f"system_prompt={place} is empty: write a prompt, or leave it out")
    return text


def check_template(tokenizer: Any, turns: bool, who: str) -> None:
    """Refuse to ask a model by turns that has no way to say them."""
    if turns and tokenizer.chat_template is None:
        raise UserError(
            f"{who} has no chat template to say a system prompt with: set system_turn=false, and "
            "it stands before the prompt's text"
        )


def prompted(cfg: Any, rows: Sequence[Row]) -> list[Row]:
    """The rows as ``eval`` and ``sample`` ask them; without a system prompt as they are."""
    system = text_of(cfg)
    if system is None:
        return [*rows]
    bank, turns = bank_of(cfg), cfg.system_turn
    return [
        under(row, system, bank.nearest(row["prompt"]) if bank else (), turns=turns)
        for row in rows
    ]


def under(row: Row, system: str, examples: Sequence[Row], *, turns: bool) -> Row:
    """The row, asked under a system prompt and after examples of ``prompt`` and ``completion``: as
    turns, or as texts one after the other, for a model that has no chat template."""
    if not turns:
        if not isinstance(row["prompt"], str):
            raise UserError("system_turn=false is of prompts that are text: leave it out")
        told = (f"{one['prompt']}\n{one['completion']}" for one in examples)
        return row | {"prompt": "\n\n".join([system, *told, row["prompt"]])}
    turned = in_turns(row, chat=True, system=None)
    if any(turn.get("role") in ("system", "developer") for turn in turned["prompt"]):
        raise UserError(
            f"the prompt {shown(row['prompt'])[:40]!r} has a system turn of its own: take it out"
        )
    before = [in_turns(one, chat=True, system=None) for one in examples]
    shots = [turn for one in before for turn in (*one["prompt"], *one["completion"])]
    opening = {"role": "system", "content": system}
    return turned | {"prompt": [opening, *shots, *turned["prompt"]]}
