"""Layouts whose rows hold answers and a verdict on them: roles in, pairs out.

A row that is a tie, or whose answers are both bad or not judged, is left out and counted. How much
better the chosen answer is, is kept as ``margin``.
"""

import json
import random
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from spo_lightning.data.layouts.columns import WORDS, kind_of
from spo_lightning.data.layouts.given import kept_of
from spo_lightning.data.layouts.turns import LeftOut, apart, asked, messages, spoken, user
from spo_lightning.data.rows import Row, prompt_key
from spo_lightning.errors import UserError

TIE, BOTH_BAD, UNJUDGED = "tie", "both answers are bad", "no verdict"
BAD = re.compile(r"both[ _]?bad|neither|none of (the )?(two|both)", re.IGNORECASE)
EVEN = re.compile(r"\W*(tie|tied|draw|both|equal|equally.*|same|even)\b.*", re.IGNORECASE)
ORDER = re.compile(r"(\w+)\s*(>+|<+|[=~]+)\s*(\w+)")  # A>B, A>>B, A=B
LETTERS = ("a", "b")  # how two answers are called, whatever their columns are

Scored = list[tuple[Any, float]]  # answers, the higher the better


def verdict(row: Row, *, means: Mapping[Any, str] | None = None) -> list[Row]:
    """Two answers and a word, a name or a number for the better one."""
    best = _named(row["label"], row["answers"], row.get("names"), means)
    return [_pair(row, best, abs(float(row["strength"])) if "strength" in row else None)]


def votes(row: Row) -> list[Row]:
    """Two answers and several verdicts: the majority's; the margin is in votes."""
    found = dict.fromkeys(row["answers"], 0)
    for vote in row["votes"].values():
        with suppress(LeftOut):
            found[_named(vote, row["answers"])] += 1
    worst, best = sorted(found, key=lambda mark: found[mark])
    if 2 * found[best] <= len(row["votes"]):
        raise LeftOut(TIE)
    return [_pair(row, best, float(found[best] - found[worst]))]


def strength(row: Row) -> list[Row]:
    """Two answers and how much better the second is; below 0 the first is better."""
    value = float(row["strength"])
    if not value:
        raise LeftOut(TIE)
    return [_pair(row, list(row["answers"])[value > 0], abs(value))]


def scores(row: Row) -> list[Row]:
    """Two answers and a score of each."""
    first, second = map(float, row["scores"].values())
    if first == second:
        raise LeftOut(TIE)
    marks = list(row["answers"])
    return [_pair(row, marks[second > first], abs(first - second))]


def flags(row: Row) -> list[Row]:
    """Two answers, each with a mark of whether it has won; lists of them are several turns."""
    won = [str(value).strip().lower() in ("1", "1.0", "true") for value in row["won"].values()]
    if won[0] == won[1]:
        raise LeftOut(TIE)
    best = list(row["answers"])[won[1]]
    (other,) = (mark for mark in row["answers"] if mark != best)
    asks, *told = map(_listed, (row.get("prompt"), row["answers"][best], row["answers"][other]))
    if asks is None or None in told:
        return [_pair(row, best, None)]
    return [apart(*(_conversation(asks, answers) for answers in told if answers is not None))]


def _listed(text: Any) -> list[str] | None:
    """The texts of a list that is written as JSON; None of another text."""
    if not isinstance(text, str) or not text.startswith("["):
        return None
    try:
        found = json.loads(text)
    except ValueError:
        return None
    return [part or "" for part in found] if kind_of(found) == "texts" else None


def _conversation(asks: Sequence[str], answers: Sequence[str]) -> list[Row]:
    return [turn for q, a in zip(asks, answers) for turn in (user(q), *spoken(a))]


def arena(row: Row) -> list[Row]:
    """Two conversations and a vote; the turns that both begin with are the prompt."""
    best = _named(row["label"], row["conversations"], row.get("names"))
    judged = int(float(row["turn"])) if "turn" in row else None
    by_mark = {m: _until(messages(told), judged) for m, told in row["conversations"].items()}
    (other,) = (mark for mark in by_mark if mark != best)
    return [apart(by_mark[best], by_mark[other])]


def _until(turns: list[Row], judged: int | None) -> list[Row]:
    """A conversation up to the answer that was judged, where that is not the last one."""
    users = [place for place, turn in enumerate(turns) if turn["role"] == "user"]
    return turns if judged is None or judged >= len(users) else turns[: users[judged]]


def choice(row: Row) -> list[Row]:
    """A list of two answers and the place of the better one, from 0."""
    if len(row["answers"]) != 2:
        raise UserError(f"{len(row['answers'])} answers and one choice: give two of them")
    two = {**row, "answers": dict(zip(("0", "1"), row["answers"]))}
    return [_pair(two, _named(row["label"], two["answers"]), None)]


def ordered(row: Row) -> list[Row]:
    """A list of two answers, the better one first."""
    if len(row["answers"]) != 2:
        raise UserError(f"{len(row['answers'])} answers: give two, the chosen one first")
    return [_pair({**row, "answers": dict(zip(("0", "1"), row["answers"]))}, "0", None)]


def several(row: Row, *, pairing: str, seed: int) -> list[Row]:
    """A list of good answers and one of bad ones."""
    answers = [*row["chosen"], *row["rejected"]]
    values = [1.0] * len(row["chosen"]) + [0.0] * len(row["rejected"])
    found = _pairs({**row, "answers": answers}, values, pairing, seed, scored=False)
    return [{key: value for key, value in pair.items() if key != "margin"} for pair in found]


def ranked(row: Row, *, pairing: str, seed: int) -> list[Row]:
    """Answers with their ranks, 1 for the best."""
    values = [None if rank is None else -float(rank) for rank in row["ranks"]]
    return _pairs(row, values, pairing, seed, scored=False)


def rated(row: Row, *, pairing: str, seed: int) -> list[Row]:
    """Answers with their scores, the best with the highest."""
    values = [None if score is None else float(score) for score in row["scores"]]
    return _pairs(row, values, pairing, seed, scored=True)


def _pairs(
    row: Row, values: Sequence[float | None], pairing: str, seed: int, *, scored: bool
) -> list[Row]:
    if pairing not in PAIRINGS:
        raise UserError(f"data.pairing={pairing}: choose {', '.join(PAIRINGS)}")
    if len(values) != len(row["answers"]):
        raise UserError(f"{len(row['answers'])} answers and {len(values)} ranks or scores of them")
    given = zip(row["answers"], values)
    told = [(answer, value) for answer, value in given if answer is not None and value is not None]
    made = asked(row)
    # the row's own, so that it does not depend on the rows before it
    chance = random.Random(f"{seed} {prompt_key(made.prompt)}")
    found = PAIRINGS[pairing](sorted(told, key=lambda one: -one[1]), chance)
    if not found:
        raise LeftOut("fewer than two answers have a rank or score" if len(told) < 2 else TIE)
    rows = []
    for (chosen, high), (rejected, low) in found:
        pair = made.answered(chosen=chosen, rejected=rejected) | {"margin": high - low}
        rows.append(pair | ({"score_chosen": high, "score_rejected": low} if scored else {}))
    return rows


def _best_worst(told: Scored, chance: random.Random) -> list[Scored]:
    worst = [one for one in told if one[1] == told[-1][1] < told[0][1]]
    return [[told[0], worst[0]]] if worst else []


def _best_random(told: Scored, chance: random.Random) -> list[Scored]:
    worse = [one for one in told if one[1] < told[0][1]]
    return [[told[0], chance.choice(worse)]] if worse else []


def _adjacent(told: Scored, chance: random.Random) -> list[Scored]:
    return [[a, b] for a, b in zip(told, told[1:]) if a[1] > b[1]]


def _all(told: Scored, chance: random.Random) -> list[Scored]:
    return [[a, b] for a in told for b in told if a[1] > b[1]]


PAIRINGS: dict[str, Callable[[Scored, random.Random], list[Scored]]] = {
    "best_worst": _best_worst,
    "best_random": _best_random,
    "adjacent": _adjacent,
    "all": _all,
}


def _pair(row: Row, best: str, margin: float | None) -> Row:
    """The answer with the mark ``best`` against the other one."""
    (other,) = (mark for mark in row["answers"] if mark != best)
    kept: Row = {} if margin is None else {"margin": margin}
    if "scores" in row:
        by_mark = dict(zip(row["answers"], row["scores"].values()))
        kept |= {"score_chosen": by_mark[best], "score_rejected": by_mark[other]}
    sides = {"chosen": row["answers"][best], "rejected": row["answers"][other]}
    for side in sides.values():
        if not isinstance(side, str | list | dict):
            raise LeftOut(f"an answer is {WORDS[kind_of(side)]}")
    return {**asked(row).answered(**sides), **kept_of(kept)}


def _named(
    label: Any,
    answers: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
    means: Mapping[Any, str] | None = None,
) -> str:
    """The mark of the answer that a verdict names, by mark, place, name or its very text.

    ``means``: the mark of each verdict, where a layout says it.
    """
    word = _word(label)
    if label is None or word.lower() in ("", "none", "null", "nan"):
        raise LeftOut(UNJUDGED)
    order = ORDER.fullmatch(word.strip("[]")) if word not in answers.values() else None
    if order and order[2][0] in "=~":
        raise LeftOut(TIE)
    word = (order[3] if order[2][0] == "<" else order[1]) if order else word
    pointed = {str(key): mark for key, mark in means.items()} if means else None
    for mark in answers if pointed is None else ():
        if word == answers[mark] or mark in _pointed(word, list(answers), names):
            return mark
    if pointed and word in pointed:
        return pointed[word]
    if BAD.search(word):
        raise LeftOut(BOTH_BAD)
    # where the answers are called 1 and 2, 0 is neither
    if EVEN.fullmatch(word) or (word == "0" and list(answers) == ["1", "2"]):
        raise LeftOut(TIE)
    called = " and ".join(pointed or answers)
    raise UserError(
        f"the verdict is {word[:40]!r}, and it can be {called}: mend it, or write a layout that "
        "says what it means (docs/extending.md)"
    )


def _word(label: Any) -> str:
    whole = isinstance(label, bool | float) and float(label).is_integer()
    return str(int(label) if whole else label).strip()


def check_numbers(rows: Sequence[Row]) -> None:
    """Refuse 0 and 1 alone as verdicts on the answers 1 and 2: 0 may be a tie, or the first."""
    judged = [row["label"] for row in rows if list(row.get("answers", ())) == ["1", "2"]]
    if {_word(label) for label in judged} == {"0", "1"}:
        raise UserError(
            "the verdicts on the answers 1 and 2 are 0 and 1 alone: write 1 and 2 where 0 is the "
            "first answer, or tie where 0 is one"
        )


def _pointed(word: str, marks: list[str], names: Mapping[str, str] | None) -> set[str]:
    """The marks that a word may stand for: model_a, A, response1, 1, or a model's name."""
    called = list((names or {}).values())
    if len(set(called)) == 2 and word in called:
        return {marks[called.index(word)]}
    last = re.split(r"[\s_]", word.lower())[-1]
    number = re.search(r"(?<=[a-z])\d+$", last)
    ends = {last, number[0] if number else last}
    return {m for m, letter in zip(marks, LETTERS) if ends & {letter, m.lower()}}
