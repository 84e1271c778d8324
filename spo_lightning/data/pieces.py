"""A token pair in, text that can be read out: in pieces, each with how its tokens are used.

Special tokens are pieces of their own, so that nothing of what the model is given stays unseen.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from spo_lightning.data.batch import Pair

PROMPT, SCORED, CONTEXT, OMITTED = "prompt", "scored", "context", "omitted"
MOST = 1000  # tokens of a part that are shown: the last ones of a prompt, the first of an answer
HALF = "\ufffd"  # what a decoder makes of a letter of which a byte is missing
SIDES = ("chosen", "rejected")


@dataclass(frozen=True)
class Piece:
    """Tokens that are shown together. ``use``: PROMPT, SCORED, CONTEXT within an answer, or
    OMITTED for a word about tokens that are not shown."""

    text: str
    use: str
    special: bool
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Shown:
    """A pair as the model reads it. ``side``: of the data; ``tokens``: of its three parts."""

    side: str
    row: int
    tokens: tuple[int, int, int]
    prompt: list[Piece]
    chosen: list[Piece]
    rejected: list[Piece]


def scored(pair: Pair) -> tuple[Sequence[bool], Sequence[bool]]:
    """Whether each token of the chosen and of the rejected answer is scored."""
    chosen, rejected = ({place for run in runs for place in run} for runs in pair.scored)
    return (
        [place in chosen for place in range(len(pair.chosen))],
        [place in rejected for place in range(len(pair.rejected))],
    )


def shown(pair: Pair, side: str, tokenizer: Any, *, by_token: bool) -> Shown:
    """The pair in pieces: a piece for every token, or for every run of tokens of one kind."""
    special = special_ids(tokenizer)

    def pieces(ids: Sequence[int], uses: Sequence[str], before: Sequence[int]) -> list[Piece]:
        kinds = [(use, token in special) for use, token in zip(uses, ids)]
        return _pieces(ids, kinds, before, tokenizer, by_token)

    left = _left_out(len(pair.prompt))
    prompt = [*left, *pieces(pair.prompt[-MOST:], [PROMPT] * len(pair.prompt), ())]
    answers = []
    for ids, marks in zip((pair.chosen, pair.rejected), scored(pair)):
        uses = [SCORED if mark else CONTEXT for mark in marks]
        answers.append(pieces(ids[:MOST], uses, pair.prompt[-1:]) + _left_out(len(ids)))
    tokens = (len(pair.prompt), len(pair.chosen), len(pair.rejected))
    return Shown(side, pair.row, tokens, prompt, *answers)


def _left_out(tokens: int) -> list[Piece]:
    told = f"[{tokens - MOST:,} tokens left out]"
    return [Piece(told, OMITTED, False, ())] if tokens > MOST else []


def special_ids(tokenizer: Any) -> set[int]:
    """Tokens that stand for no text of their own."""
    added = tokenizer.added_tokens_decoder
    return {*tokenizer.all_special_ids, *(n for n, token in added.items() if token.special)}


def _pieces(
    ids: Sequence[int],
    kinds: Sequence[tuple[str, bool]],
    before: Sequence[int],
    tokenizer: Any,
    by_token: bool,
) -> list[Piece]:
    """``before``: what a decoder must have seen to keep the space that a text begins with."""
    found: list[Piece] = []
    place = end = 0
    for (use, special), run in groupby(kinds):
        last, end = end, end + len(list(run))
        while last < end:
            last = last + 1 if by_token else end
            own = tuple(ids[place:last])
            text = _after(before, own, tokenizer)
            if text.endswith(HALF) and last < end:
                continue  # the letter goes on in the next token
            found.append(Piece(text, use, special, own))
            before, place = own, last
    return found


def _after(before: Sequence[int], ids: Sequence[int], tokenizer: Any) -> str:
    """The text of ``ids``; some decoders drop the space that a text of its own begins with."""
    first, whole = (_decoded(some, tokenizer) for some in (before, [*before, *ids]))
    return whole[len(first) :] if whole.startswith(first) else _decoded(ids, tokenizer)


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
