"""Rows of pairs in, questions out: which of two answers is better, A or B, each in both orders.

A question is a pair like any other. Its prompt holds both answers, by a template, and its own
answers are the two letters, a token each, so that the gap l_w - l_l of a model is its log-odds.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from spo_lightning.data.chat import as_asked, readable, shown
from spo_lightning.data.encode import common_prefix
from spo_lightning.data.rows import Row, Task
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError

LETTERS = ("A", "B")
FIELDS = re.compile(r"\{(prompt|first|second)\}")
OF_THE_PAIR = ("plain", "tools")  # what of its row a question has not


def questions(rows: Sequence[Row], template: str, tokenizer: Any) -> list[Row]:
    """Two of each row, at 2n and 2n + 1: the chosen answer first, and second.

    Of a chat, where the model has a template for one, a question is a user turn.
    """
    found = []
    for row in (readable(row, tokenizer) for row in rows):
        if "chosen" not in row or "rejected" not in row:
            told = "rows have one answer each, and a ranker compares two"
            raise UserError(f"{told}: name rows of prompt, chosen and rejected")
        prompt, *answers = (
            _text(row[name], tokenizer) for name in ("prompt", "chosen", "rejected")
        )
        chat = isinstance(row["prompt"], list) and tokenizer.chat_template is not None
        kept = {name: it for name, it in row.items() if name not in OF_THE_PAIR}
        # what tells nothing apart stays what it is, for the encoding to drop and to count
        apart = all(answers) and answers[0] != answers[1]
        for step in (1, -1):
            first, second = answers[::step]
            words = {"prompt": prompt, "first": first, "second": second}
            text = FIELDS.sub(lambda field, words=words: words[field[1]], template)
            asked = [{"role": "user", "content": text}] if chat else text
            named = [letter if chat else f" {letter}" for letter in LETTERS[::step]]
            chosen, rejected = (as_asked(asked, it) for it in (named if apart else answers))
            found.append({**kept, "prompt": asked, "chosen": chosen, "rejected": rejected})
    return found


def of_questions(task: Task, template: str, tokenizer: Any) -> Task:
    """The task with its pairs asked about; all else stays."""
    check_letters(tokenizer)
    sides = {name: getattr(task, name) for name in ("train", "held_out")}
    return replace(task, **{n: questions(rows, template, tokenizer) for n, rows in sides.items()})


def check_letters(tokenizer: Any) -> None:
    """Refuse a tokenizer in which one letter is the other."""
    one, other = (tokenizer(f" {it}", add_special_tokens=False)["input_ids"] for it in LETTERS)
    if one == other:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: it writes {' and '.join(LETTERS)} with "
            "the same tokens, so the better answer cannot be named: take another model"
        )


def to_letters(pairs: Pairs) -> Pairs:
    """Tokenised questions whose answers are the token in which the letters differ, and no end."""
    found = []
    for pair in pairs.pairs:
        n = common_prefix(pair.chosen, pair.rejected)
        ids = {"chosen": pair.chosen[n : n + 1], "rejected": pair.rejected[n : n + 1]}
        bare = replace(pair, prompt=pair.prompt + pair.chosen[:n], **ids)
        found.append(replace(bare, chosen_context=(), rejected_context=(), margin=None))
    return replace(pairs, pairs=found, orders=True)


def _text(side: Any, tokenizer: Any) -> str:
    """A prompt or an answer as one text; of one turn its words alone."""
    text = side if isinstance(side, str) else shown(side)
    if isinstance(side, list) and len(side) == 1 and side[0].get("content"):
        text = side[0]["content"]
    return text.strip().removesuffix(tokenizer.eos_token or "").strip()
