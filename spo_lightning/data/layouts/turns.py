"""What was asked and what was answered, as published, in; messages, or text as it was, out.

A prompt that is a question, a transcript, or stands beside a system text becomes turns, and so do
its answers. Where all of it was text, the row keeps it as ``plain`` for a tokenizer without a chat
template: a transcript as it stood, a question with an empty line after it.
"""

import json
from typing import Any, NamedTuple

from spo_lightning.data.layouts.columns import SPEAKER, SPOKEN, TURN, kind_of
from spo_lightning.data.rows import ROLES, Row
from spo_lightning.errors import UserError

SPEAKERS = {
    **{name: "user" for name in ("human", "user", "prompter")},
    **{name: "assistant" for name in ("gpt", "assistant", "chatgpt", "model", "bot", "bard")},
    **{name: "system" for name in ("system",)},
    **{name: "tool" for name in ("observation", "tool", "function_response")},
    **{name: "function_call" for name in ("function_call", "tool_call")},
}
ANSWER = "\n\nAssistant:"  # what a transcript's prompt ends with


class LeftOut(Exception):
    """A row that becomes no pair, and why: what it is counted under."""


class Asked(NamedTuple):
    """A prompt; ``plain`` is the same as text, which ``lead`` parts from an answer."""

    prompt: str | list[Row]
    plain: str | None = None
    lead: str = ""

    def answered(self, **sides: Any) -> Row:
        """The row of the prompt and answers to it, of one form."""
        if isinstance(self.prompt, str) and all(isinstance(s, str) for s in sides.values()):
            return {"prompt": self.prompt, **sides}
        prompt = [user(self.prompt)] if isinstance(self.prompt, str) else self.prompt
        row: Row = {"prompt": prompt, **{name: spoken(side) for name, side in sides.items()}}
        if self.plain is not None and all(isinstance(side, str) for side in sides.values()):
            lead = self.lead
            said = {n: lead + s.lstrip() if lead else s for n, s in sides.items()}
            row["plain"] = {"prompt": self.plain, **said}
        return row


def asked(row: Row) -> Asked:
    """The prompt among the roles ``prompt``, ``question``, ``input``, ``system``."""
    system = row.get("system") or ""
    given = row.get("prompt", row.get("question"))
    if not isinstance(given, str):
        turns = messages(given)
        begins = bool(turns) and turns[0]["role"] == "system"
        return Asked(turns if not system or begins else [system_turn(system), *turns])
    if kind_of(given) == "transcript":
        turns, plain = opened(given)
        return Asked([system_turn(system), *turns] if system else turns, plain, " ")
    if "question" not in row and "system" not in row and not row.get("input"):
        return Asked(given)
    text = "\n".join(part for part in (given, row.get("input")) if part)
    turns = [*([system_turn(system)] if system else []), *_history(row), user(text)]
    plain = "".join(f"{turn['content']}\n\n" for turn in turns if turn["content"])
    return Asked(turns, plain)


def _history(row: Row) -> list[Row]:
    """Earlier turns, which stand in a column as lists of what was asked and what was answered."""
    turns = []
    for both in row.get("history") or ():
        if kind_of(both) != "texts" or len(both) != 2:
            raise UserError("history: write it as lists of two texts, [[asked, answered], ...]")
        turns += [user(both[0]), *spoken(both[1])]
    return turns


def user(text: str) -> Row:
    return {"role": "user", "content": text}


def system_turn(text: str) -> Row:
    return {"role": "system", "content": text}


def spoken(answer: Any) -> list[Row]:
    """An answer as the assistant's turns."""
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return messages(answer)


def messages(given: Any) -> list[Row]:
    """Messages, or turns ``{from, value}``, or one of either, as messages."""
    return [_message(turn) for turn in (given if isinstance(given, list) else [given]) if turn]


def _message(turn: Row) -> Row:
    key = next((key for key in ("role", *SPEAKER) if key in turn), None)
    if key is None:
        return turn
    speaker = SPEAKERS.get(str(turn[key]).lower())
    said = next((turn[name] for name in SPOKEN if name in turn), None)
    if key == "role":
        role = speaker if speaker in ROLES else turn["role"]
        return {**turn, "role": role} | (
            {"content": said} if said and "content" not in turn else {}
        )
    if speaker is None:
        known = ", ".join(SPEAKERS)
        raise UserError(f"a turn is from {turn[key]!r}: this package knows {known}")
    if speaker != "function_call":
        return {"role": speaker, "content": said}
    try:
        calls = json.loads(str(said))
        calls = calls if isinstance(calls, list) else [calls]
        made = [{"name": call["name"], "arguments": call["arguments"]} for call in calls]
    except (ValueError, KeyError, TypeError):
        told = "a function_call is no JSON with name and arguments: mend the turn"
        raise UserError(told) from None
    called = [{"type": "function", "function": call} for call in made]
    return {"role": "assistant", "content": "", "tool_calls": called}


def parsed(transcript: str) -> list[Row]:
    """The turns of a transcript; what stands before the first is a system's.

    Several turns of one speaker in a row are one, as most templates ask for turns in turn.
    """
    marks = list(TURN.finditer(transcript))
    before = transcript[: marks[0].start()] if marks else transcript
    turns = [system_turn(before.strip())] if before.strip() else []
    ends = [mark.start() for mark in marks[1:]] + [len(transcript)]
    for mark, end in zip(marks, ends):
        role = "user" if mark[1] == "Human" else "assistant"
        content = transcript[mark.end() : end].strip()
        if turns and turns[-1]["role"] == role:
            content = "\n\n".join(part for part in (turns.pop()["content"], content) if part)
        turns.append({"role": role, "content": content})
    return turns


def opened(transcript: str) -> tuple[list[Row], str]:
    """A transcript that the assistant is to go on with: its turns, and its text."""
    text = transcript.rstrip()
    if text.endswith(ANSWER):
        return parsed(text.removesuffix(ANSWER)), text
    if parsed(text)[-1]["role"] != "user":
        raise UserError("the prompt ends in an answer: let it end in what is asked")
    return parsed(text), text + ANSWER


def shared(chosen: str, rejected: str) -> str:
    """The text that both begin with."""
    low, high = 0, min(len(chosen), len(rejected))
    while low < high:  # by halves: letter by letter takes seconds for a large file
        middle = (low + high + 1) // 2
        same = chosen[low:middle] == rejected[low:middle]
        low, high = (middle, high) if same else (low, middle - 1)
    return chosen[:low]


def from_transcripts(chosen: str, rejected: str) -> Row:
    """The pair of two transcripts: the prompt is what both begin with, to its last answer."""
    at = shared(chosen, rejected).rfind(ANSWER)
    if at < 0:
        raise UserError("chosen and rejected share no turn: add a 'prompt'")
    prompt, before, said = chosen[: at + len(ANSWER)], parsed(chosen[:at]), set()
    row: Row = {"plain": {"prompt": prompt}}
    begun = before.pop()["content"] if before and before[-1]["role"] == "assistant" else None
    for name, side in (("chosen", chosen), ("rejected", rejected)):
        rest = _answered(side[len(prompt) :])
        turns = parsed(ANSWER + rest)
        if rest != side[len(prompt) :]:
            said.add("an answer ends in a Human turn, which is cut off")
        if begun is not None or len(turns) < 1 + len(TURN.findall(rest)):
            said.add("several Assistant turns in a row, read as one")
        if begun is not None:
            turns[0] = {**turns[0], "content": f"{begun}\n\n{turns[0]['content']}".rstrip()}
        row[name], row["plain"][name] = turns, rest
    return {"prompt": before, **row, "said": sorted(said)}


def _answered(rest: str) -> str:
    """What follows the prompt, without the Human turns that stand after its last answer."""
    marks = [mark for mark in TURN.finditer(rest) if mark.start() or rest.startswith("\n\n")]
    while marks and marks[-1][1] == "Human":
        rest = rest[: marks.pop().start()]
    return rest


def apart(chosen: list[Row], rejected: list[Row]) -> Row:
    """The pair of two conversations: the turns that both begin with are the prompt."""
    shortest = min(len(chosen), len(rejected))
    n = next((n for n in range(shortest) if chosen[n] != rejected[n]), shortest)
    if not n and shortest:
        raise UserError("chosen and rejected share no turn: add a 'prompt'")
    return {"prompt": chosen[:n], "chosen": chosen[n:], "rejected": rejected[n:]}


def after(prompt: list[Row], chosen: list[Row], rejected: list[Row]) -> Row:
    """The pair of a prompt and answers; turns of the prompt that both repeat are cut off."""
    sides, n = (chosen, rejected), len(prompt)
    if prompt and all(len(side) > n and side[:n] == prompt for side in sides):
        return {"prompt": prompt, "chosen": chosen[n:], "rejected": rejected[n:]}
    if prompt and all(side[:1] == prompt[:1] for side in sides):
        return apart(chosen, rejected)  # the column of the prompt is a whole conversation
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
