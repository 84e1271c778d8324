"""Layouts whose rows say which answer is the chosen one: roles in, pairs out."""

import re
from typing import Any

from spo_lightning.data.layouts.turns import (
    ANSWER,
    after,
    apart,
    asked,
    from_transcripts,
    messages,
    shared,
    spoken,
    system_turn,
    user,
)
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError

KEPT = ("margin", "score_chosen", "score_rejected", "tools", "reference_side")


def trl(row: Row) -> list[Row]:
    """Prompt and answers as they stand; a text beside a system text becomes turns."""
    said, prompt, begun = [], row["prompt"], row.get("begun")
    if begun and isinstance(prompt, str):
        row = {**row, "chosen": begun + row["chosen"], "rejected": begun + row["rejected"]}
        said = ["both answers begin with the steps of a column of their own"]
    if "system" in row or not isinstance(prompt, str):
        return [{**made, "said": said} for made in answered(row)]
    sides = {name: row[name] for name in ("chosen", "rejected")}
    if prompt and all(side.startswith(prompt) for side in sides.values()):
        said += ["both answers begin with the whole prompt, which is read twice"]
    return [{"prompt": prompt, **sides, **kept_of(row), "said": said}]


def implicit(row: Row, *, separator: str | None) -> list[Row]:
    """The prompt is what both answers begin with."""
    chosen, rejected = row["chosen"], row["rejected"]
    if not isinstance(chosen, str):
        return [{**apart(messages(chosen), messages(rejected)), **kept_of(row)}]
    common, said = shared(chosen, rejected), []
    if not chosen or not rejected or chosen == rejected:
        at = 0  # encoding drops the pair and counts it
    elif separator:
        at = common.rfind(separator) + len(separator)
        if at < len(separator):
            told = f"no {separator!r} in the beginning that chosen and rejected share"
            raise UserError(f"{told}: add a 'prompt' or correct data.separator")
    else:
        at, end = _end(common)
        said = [f"no prompt: it ends at the last {end} of what both answers begin with"]
    sides = {"prompt": chosen[:at], "chosen": chosen[at:], "rejected": rejected[at:]}
    return [{**sides, **kept_of(row), "said": said}]


def _end(common: str) -> tuple[int, str]:
    """Where the prompt of two texts ends: at a whole turn, else line, else word."""
    turn = common.rfind(ANSWER)
    if turn >= 0:
        return turn + len(ANSWER), "turn"
    line = common.rfind("\n")
    if line >= 0:
        return line + 1, "line break"
    # the space goes with the answer, whose first token most tokenizers begin with it
    words = [space.start() for space in re.finditer(r"\s+", common) if space.start()]
    if not words:
        raise UserError("chosen and rejected share no word to be the prompt: add a 'prompt'")
    return words[-1], "word"


def beside(row: Row) -> list[Row]:
    """A text prompt beside conversations that begin with it, or beside answers alone."""
    prompt, sides = row["prompt"], [messages(row[name]) for name in ("chosen", "rejected")]
    system = [system_turn(row["system"])] if row.get("system") else []
    if all(side and side[0]["role"] == "assistant" for side in sides):
        made = {"prompt": [*system, user(prompt)], "chosen": sides[0], "rejected": sides[1]}
    else:
        made = apart(*sides)
        texts = [str(turn.get("content")) for turn in made["prompt"] if turn["role"] == "user"]
        if not sides[0] == sides[1] and prompt.strip() not in [text.strip() for text in texts]:
            raise UserError(
                "the prompt is none of the user's turns that chosen and rejected both begin with: "
                "mend the row, or rename the column if it is no prompt"
            )
        if made["prompt"] and made["prompt"][0]["role"] != "system":
            made["prompt"] = [*system, *made["prompt"]]
    return [{**made, **kept_of(row)}]


def transcripts(row: Row) -> list[Row]:
    """Two whole transcripts, as HH-RLHF has them."""
    return [{**from_transcripts(row["chosen"], row["rejected"]), **kept_of(row)}]


def ended(row: Row) -> list[Row]:
    """A conversation whose last answer is the chosen one, and the rejected one."""
    turns = messages(row["turns"])
    if row.get("system") and turns[:1] and turns[0].get("role") != "system":
        turns = [system_turn(row["system"]), *turns]
    if not turns or turns[-1].get("role") != "assistant":
        raise UserError("the conversation ends in no answer, which would be the chosen one")
    rejected = spoken(row["rejected"])
    if rejected[:1] and rejected[0] in turns[:2] and rejected[0].get("role") != "assistant":
        return [{**apart(turns, rejected), **kept_of(row)}]
    return [{"prompt": turns[:-1], "chosen": turns[-1:], "rejected": rejected, **kept_of(row)}]


def answered(row: Row) -> list[Row]:
    """What was asked, in columns or in turns, and two answers to it."""
    made, sides = asked(row), {name: row[name] for name in ("chosen", "rejected")}
    if isinstance(made.prompt, str) or any(isinstance(side, str) for side in sides.values()):
        return [{**made.answered(**sides), **kept_of(row)}]
    turns = {name: messages(side) for name, side in sides.items()}
    return [{**after(made.prompt, **turns), **kept_of(row)}]


def kept_of(row: Row) -> Row:
    """The scores of the answers, how much better the chosen one is, which one is the reference's
    own, and the tools."""
    kept: dict[str, Any] = {name: row[name] for name in KEPT if row.get(name) not in (None, [])}
    kept |= {name: float(kept[name]) for name in KEPT[:3] if name in kept}
    if kept.get("reference_side", "chosen") not in ("chosen", "rejected"):
        told = f"reference_side is {kept['reference_side']!r}"
        raise UserError(f"{told}: make it chosen or rejected, or leave it out")
    if "margin" not in kept and "score_chosen" in kept and "score_rejected" in kept:
        kept["margin"] = max(0.0, kept["score_chosen"] - kept["score_rejected"])
    return kept
