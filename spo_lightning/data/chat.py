"""Rows of messages in, the texts that a model reads out, and which stretches of them are scored.

Every conversation goes through the tokenizer's chat template. What an assistant wrote, up to where
the template ends its turn, is scored; what others wrote between its turns is context.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError

CLOCK = "strftime_now"  # what a template asks for the date
BEGAN = datetime.now()  # the date of the whole run, also after midnight
DATE = re.compile(CLOCK + r"\(\s*(['\"])(.*?)\1\s*\)")
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
BRACKETS = re.compile(r"\[/?[A-Z_]{3,}\]")  # marks that some templates write as plain text
SYSTEM = ", or leave data.system out"
OWN = ("weight", "train")  # keys of a message that are ours to read, not the template's

Stretch = tuple[int, int]  # from the first on, up to the second


class Rendered(NamedTuple):
    """A row as texts: its prompt, then prompt + each answer."""

    texts: list[str]
    # per answer the stretches of its text that are scored; None: whatever follows the prompt
    words: list[list[Stretch] | None]
    split: bool  # a later turn does not begin as the template asks for one


def in_turns(row: Row, *, chat: bool, system: str | None) -> Row:
    """The row with its texts as user and assistant turns where ``chat`` asks for it, and with a
    system turn where it has none."""
    texts = [key for key in ("prompt", "chosen", "rejected", "completion") if _is_text(row, key)]
    if texts and not chat:
        if system is not None:
            raise UserError("data.system: rows of text have no turns: set data.chat=true")
        return row
    if not chat and system is None:
        return row
    # what is asked for is a chat: the same row as plain text is no way out
    turned = {key: value for key, value in row.items() if key != "plain"}
    for key in texts:
        role = "user" if key == "prompt" else "assistant"
        turned[key] = [{"role": role, "content": row[key]}] if row[key] else []
    prompt = turned.get("prompt")
    if system is None or not isinstance(prompt, list) or not prompt:
        return turned
    if not any(map(_instructs, prompt)):
        turned["prompt"] = [{"role": "system", "content": system}, *prompt]
    return turned


def as_asked(prompt: str | list[Row], text: str) -> Any:
    """An answer as text, or as a turn where the prompt is made of turns."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def shown(text: Any) -> str:
    """A prompt or answer as one text: messages are joined."""
    if isinstance(text, str):
        return text
    return "\n".join(
        f"{turn['role']}: {turn.get('content') or json.dumps(turn.get('tool_calls', ''))}"
        for turn in text
    )


def plain(turns: Sequence[Row]) -> list[Row]:
    """Messages as a template or an endpoint reads them: it would take a null for a value."""
    return [{k: v for k, v in turn.items() if k not in OWN and v is not None} for turn in turns]


def readable(row: Row, tokenizer: Any) -> Row:
    """The row as plain text where it has one, and the tokenizer no chat template."""
    return row | row.get("plain", {}) if tokenizer.chat_template is None else row


def writes(turn: Row, where: str) -> bool:
    """Whether a message is the assistant's, and not marked as context."""
    weight, trains = turn.get("weight", 1), turn.get("train", True)
    if weight not in (0, 1) or not isinstance(trains, bool):
        told = f"weight {weight!r}" if weight not in (0, 1) else f"train {trains!r}"
        raise UserError(f"{where}: a message has {told}: give weight 0 or 1, train true or false")
    return turn["role"] == "assistant" and bool(weight) and trains


def rendered(
    row: Row, sides: Sequence[str], tokenizer: Any, *, scored: str, where: str
) -> Rendered:
    """The texts of a row of messages; ``scored``: the assistant's turns, or all."""
    template = Template.of(row, tokenizer, where)
    prompt, answers = row["prompt"], [template.closed(row["prompt"], row[side]) for side in sides]
    # a prompt that nobody's assistant answers first is not made to ask for it
    asks = scored == "all" or not answers or any(a[0]["role"] == "assistant" for a in answers)
    texts, words, split = [template(prompt, asks=asks)], [], False
    template.check(prompt, texts[0])
    for turns in answers:
        texts.append(template(prompt + turns))
        # the prompt's once more: some write the system turn only until an answer follows
        template.check(prompt + turns, texts[-1])
        one = len(turns) == 1 and writes(turns[0], where)
        if scored == "all" or one:
            words.append(None)
            continue
        places = [n for n, turn in enumerate(turns, len(prompt)) if writes(turn, where)]
        find = template.marked if template.marks else template.parted
        found, parts = find(prompt + turns, places, texts[-1])
        words.append(found)
        split |= parts
    return Rendered(texts, words, split)


@dataclass(frozen=True)
class Template:
    """The chat template of a tokenizer, with what one row hands to it."""

    tokenizer: Any
    text: str
    given: Row
    where: str

    @classmethod
    def of(cls, row: Row, tokenizer: Any, where: str) -> "Template":
        if tokenizer.chat_template is None:
            raise UserError(
                f"{tokenizer.name_or_path or 'the tokenizer'}: no chat template, and {where} "
                "holds messages: use a tokenizer that has one, or give prompt, chosen and "
                "rejected as text, with data.chat=false"
            )
        given = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
        text = tokenizer.get_chat_template(given.pop("chat_template", None), given["tools"])
        dated = DATE.sub(lambda asked: json.dumps(BEGAN.strftime(asked[2])), text)
        return cls(tokenizer, dated, given, where)

    def __call__(self, turns: Sequence[Row], *, asks: bool = False) -> str:
        """``asks``: with what the template has an assistant go on from."""
        return self._rendered(turns, asks)[0]

    def check(self, turns: Sequence[Row], text: str) -> None:
        """Refuse a template that leaves out what nobody would miss: instructions and calls."""
        for turn in turns:
            words = [(turn.get("content") or "").strip()] if _instructs(turn) else _called(turn)
            for left_out in (word for word in words if word not in text):
                what = f"{turn['role']} turn" if _instructs(turn) else "tool call"
                told = f"the chat template leaves out the {what} {left_out[:40]!r}"
                raise UserError(
                    f"{self.where}: {told}: mend the template, or take it out of the data"
                    + SYSTEM * _instructs(turn)
                )

    @property
    def marks(self) -> bool:
        return GENERATION.search(self.text) is not None

    def marked(
        self, turns: Sequence[Row], places: Sequence[int], whole: str
    ) -> tuple[list[Stretch], bool]:
        """What the template itself marks as generated, of the turns at these places."""
        found, blocks = [], self._rendered(turns, False)[1]
        for place in places:
            # asked to go on, so that none of the marks is that of the conversation's end
            asked, before = self._rendered(turns[:place], True)
            later = self._rendered(turns[: place + 1], True)[1]
            own = blocks[len(before) : len(later) if place + 1 < len(turns) else None]
            # some mark the head of the turn too, which the policy is given
            head = len(asked) if whole.startswith(asked) else 0
            own, turn = [(max(head, start), stop) for start, stop in own], turns[place]
            says = turn.get("content") or turn.get("tool_calls")
            if says and all(start >= stop for start, stop in own):
                told = f"the generation marks of the chat template leave out turn {place + 1}"
                raise UserError(f"{self.where}: {told}: mend the template, or data.scored=all")
            found += own[:-1] + [(start, self._end(whole, stop)) for start, stop in own[-1:]]
        return found, False

    def _end(self, whole: str, stop: int) -> int:
        """Where a turn ends that is marked up to ``stop``: its end mark, if that stands behind."""
        ends = tuple(_specials(self.tokenizer))
        if whole[:stop].rstrip().endswith(ends):
            return stop
        behind = [end for end in ends if whole.startswith(end, stop)]
        return stop + max(map(len, behind), default=0)

    def parted(
        self, turns: Sequence[Row], places: Sequence[int], whole: str
    ) -> tuple[list[Stretch], bool]:
        """What each of these turns adds to the turns before it, less what it was asked with."""
        found, split = [], False
        for place in places:
            before, after = self(turns[:place]), self(turns[: place + 1])
            asked = self(turns[:place], asks=True)
            prefixes = whole.startswith(before) and whole.startswith(after)
            if not prefixes or not asked.startswith(before):
                raise UserError(
                    f"{self.where}: the chat template writes turn {place + 1} otherwise when "
                    "others follow, and has no generation marks, so the assistant's words cannot "
                    "be told apart: give it marks, cut the answers to one turn, or set "
                    "data.scored=all"
                )
            start = len(os.path.commonprefix([asked, whole]))
            split |= start < len(asked)
            found.append((start, len(after)))
        return found, split

    def closed(self, prompt: list[Row], turns: list[Row]) -> list[Row]:
        """The turns without the EOS that their texts bring along, where the template writes it."""
        eos = self.tokenizer.eos_token
        if not eos or not any(_ends(turn, eos) for turn in turns):
            return turns
        bare = [
            {**turn, "content": turn["content"].removesuffix(eos)} if _ends(turn, eos) else turn
            for turn in turns
        ]
        return bare if self(prompt + bare).rstrip().endswith(eos) else turns

    def _rendered(self, turns: Sequence[Row], asks: bool) -> tuple[str, list[Stretch]]:
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        words = {**self.tokenizer.special_tokens_map, **self.given}
        words |= {"chat_template": self.text, "add_generation_prompt": asks}
        words["return_assistant_tokens_mask"] = self.marks
        try:
            made: Any = render_jinja_template(conversations=[plain(turns)], **words)
        except (TemplateError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            told = f"the chat template refuses it ({reason}): mend the turns of the data"
            system = SYSTEM * any(map(_instructs, turns))
            raise UserError(f"{self.where}: {told}{system}") from None
        (text,), blocks = made
        return text, blocks[0] if blocks else []


def remarks(rows: Sequence[Row], tokenizer: Any) -> list[str]:
    """What a user is told of rows and template, a line each."""
    if tokenizer.chat_template is None:
        return []
    found = []
    texts = [row["prompt"] for row in rows if isinstance(row["prompt"], str)]
    if texts:
        marks = _marks(tokenizer)
        share = sum(any(mark in text for mark in marks) for text in texts) / len(texts)
        found.append(
            f"{len(texts):,} rows of text stay text, though the tokenizer has a chat template: "
            f"{share:.0%} of them carry its marks; data.chat=true makes turns of them"
        )
    chats = [row for row in rows if isinstance(row["prompt"], list) and row["prompt"]]
    for chat in chats[:1]:
        found += _of_template(chat, tokenizer)
    for chat in [chat for chat in chats if _thought(chat)][:1]:
        if _thought(chat) not in Template.of(chat, tokenizer, "a row")(_answered(chat)):
            found.append(
                "The chat template leaves out the thoughts of answers (<think> ...): what is "
                "scored is what follows them"
            )
    return found


def _answered(row: Row) -> list[Row]:
    return row["prompt"] + (row.get("chosen") or row.get("completion") or [])


def _thought(row: Row) -> str:
    """What the answer of a row thinks before it speaks."""
    last = _answered(row)[-1].get("content") or ""
    return last.rpartition("</think>")[0].partition("<think>")[2].strip()


def _of_template(row: Row, tokenizer: Any) -> list[str]:
    """What the template does to a row of messages, as far as it is not what one expects."""
    template, found = Template.of(row, tokenizer, "the first row"), []
    turns = _answered(row)
    turns = turns[
        : 1 + max((n for n, t in enumerate(turns) if t["role"] == "assistant"), default=0)
    ]
    text = template(turns)
    if turns[-1]["role"] == "assistant" and not text.rstrip().endswith(
        tuple(_specials(tokenizer))
    ):
        found.append(
            "The chat template ends an answer with no token of its own: nothing that is scored "
            "teaches the policy to stop"
        )
    bare = Template.of({**row, "tools": None}, tokenizer, "the first row")
    if row.get("tools") and text == bare(turns):
        found.append("The chat template leaves out the tools of the rows")
    if CLOCK in tokenizer.get_chat_template(None, row.get("tools")):
        day = BEGAN.strftime("%d %b %Y")
        found.append(
            f"The chat template writes the date: {day} in this run, and other tokens another day, "
            "so they are not cached"
        )
    return found


def _marks(tokenizer: Any) -> list[str]:
    """Texts by which a conversation that was rendered before is known."""
    template = tokenizer.get_chat_template(None, None)
    return [
        *(text for text in _specials(tokenizer) if text in template),
        *sorted(set(BRACKETS.findall(template))),
    ]


def _specials(tokenizer: Any) -> list[str]:
    """Texts of the tokens that stand for no text of their own; transformers adds them."""
    return sorted({*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()})


def _is_text(row: Row, key: str) -> bool:
    return isinstance(row.get(key), str)


def _instructs(turn: Row) -> bool:
    return turn.get("role") in ("system", "developer")


def _called(turn: Row) -> list[str]:
    """The names of the functions that a turn calls."""
    calls = [call for call in turn.get("tool_calls") or () if isinstance(call, dict)]
    named = [call.get("function", call) for call in calls]
    return [str(one["name"]) for one in named if isinstance(one, dict) and "name" in one]


def _ends(turn: Row, eos: str) -> bool:
    content = turn.get("content")
    return turn["role"] == "assistant" and isinstance(content, str) and content.endswith(eos)
