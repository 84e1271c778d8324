"""Validated rows in, token pairs out, with a count of what was dropped, split and truncated.

Tokenised as TRL 1.16 does (its ``DPOTrainer._prepare_dataset``), except that every row is checked,
a leading BOS is never doubled, and an EOS that the tokenizer adds by itself is not doubled either.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spo_lightning.data.batch import Pair
from spo_lightning.data.chat import Rendered, Stretch, readable, rendered, writes
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError

COUNTS: tuple[str, ...] = (
    "kept",
    "dropped/identical",
    "dropped/empty",
    "dropped/long",
    "dropped/split",
    "split",
    "truncated",
)
SIDES = ("chosen", "rejected")
SHOWN = 3  # rows of each reason that are shown
FIXES = {
    "identical": "chosen and rejected are the same",
    "empty": "the prompt or what is scored of a response is empty",
    "long": "what stands before the first scored token fills max_length",
    "split": "the prompt's tokens are not the beginning of prompt + response",
}


@dataclass(frozen=True)
class Encoded:
    """Token pairs and what became of all rows; ``Pair.row`` is the place of the given row."""

    pairs: list[Pair]
    counts: dict[str, int]
    # by reason: the places of the first three rows that were dropped
    examples: dict[str, list[int]] = field(default_factory=dict)


class Sequences(NamedTuple):
    """A row in tokens: the prompt alone, and prompt + each response."""

    prompt: list[int]
    wholes: list[list[int]]
    # of each whole the stretches that are scored; None: what follows the prompt
    scored: list[list[Stretch] | None]
    split: bool


class Answer(NamedTuple):
    """A response up to its last scored token, and where its context begins and ends, see Pair."""

    ids: tuple[int, ...]
    context: tuple[int, ...]


NOTHING = Answer((), ())  # in place of a response that a row has not


class Cut(NamedTuple):
    """A tokenised row: the shared prompt, its responses, and what it took to get there."""

    prompt: tuple[int, ...]
    answers: tuple[Answer, ...]
    split: bool
    truncated: bool
    long: bool


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    on_mismatch: str,
    strict: bool,
    scored: str,
    where: str,
) -> Encoded:
    """Pairs whose prompt + one response has at most ``max_length`` tokens.

    Rows with one response become pairs without the other. ``scored``: of an answer of several
    turns, the assistant's, or all.
    """
    found = encode_some(
        rows,
        tokenizer,
        range(len(rows)),
        max_length=max_length,
        on_mismatch=on_mismatch,
        strict=strict,
        scored=scored,
        where=where,
    )
    check_survivors(found.counts, where)
    return found


def check_survivors(counts: dict[str, int], where: str) -> None:
    """Refuse data of which nothing is left; no data at all is none of it."""
    read = counts["kept"] + sum(counts[f"dropped/{reason}"] for reason in FIXES)
    if read and not counts["kept"]:
        reasons = ", ".join(f"{FIXES[r]}: {counts[f'dropped/{r}']}" for r in FIXES)
        raise UserError(f"{where}: none of {read} pairs survives ({reasons})")


def encode_some(
    rows: Sequence[Row],
    tokenizer: Any,
    places: Sequence[int],
    *,
    max_length: int,
    on_mismatch: str,
    strict: bool,
    scored: str,
    where: str,
) -> Encoded:
    """Part of the data, of which nothing need be left. ``places``: of the rows in the whole."""
    if on_mismatch not in ("split", "drop", "error"):
        raise UserError(f"data.on_mismatch={on_mismatch}: choose split, drop or error")
    counts, pairs = dict.fromkeys(COUNTS, 0), []
    examples: dict[str, list[int]] = {}
    names = [f"{where}, row {place + 1}" for place in places]
    rows = [readable(row, tokenizer) for row in rows]
    cuts: list[Cut | None] = [None] * len(rows)
    given = [tuple(side for side in SIDES if side in row) for row in rows]
    for sides in dict.fromkeys(given):
        same = [index for index, own in enumerate(given) if own == sides]
        some = [rows[index] for index in same], [names[index] for index in same]
        found = _cuts(some[0], sides, tokenizer, max_length, scored, some[1])
        for index, cut in zip(same, found):
            cuts[index] = cut
    for index, cut in enumerate(cuts):
        reason = _reason(rows[index], cut, on_mismatch == "drop")
        if on_mismatch == "error" and cut is not None and cut.split:
            reason, strict = "split", True
        if reason and strict:
            raise UserError(f"{names[index]}: {FIXES[reason]}: correct or remove the row")
        if reason or cut is None:
            counts[f"dropped/{reason}"] += 1
            examples[str(reason)] = [*examples.get(str(reason), []), places[index]][:SHOWN]
            continue
        answers = dict(zip(given[index], cut.answers))
        (chosen, its), (rejected, other) = (answers.get(side, NOTHING) for side in SIDES)
        ids = (cut.prompt, chosen, rejected, places[index], its, other)
        pairs.append(Pair(*ids, margin_of(rows[index]), side_of(rows[index])))
        counts["split"] += cut.split
        counts["truncated"] += cut.truncated
    return Encoded(pairs, counts | {"kept": len(pairs)}, examples)


def margin_of(row: Row) -> float | None:
    """How much better the chosen answer is, as the row says; None where it does not."""
    if "margin" in row:
        return float(row["margin"])
    chosen, rejected = (row.get(f"score_{side}") for side in ("chosen", "rejected"))
    return None if chosen is None or rejected is None else float(chosen) - float(rejected)


def side_of(row: Row) -> float | None:
    """Which answer is the reference's own, as the row says: 0 chosen, 1 rejected."""
    side = row.get("reference_side")
    return None if side is None else float(SIDES.index(side))


def encode_texts(
    rows: Sequence[Row], tokenizer: Any, *, max_length: int, scored: str
) -> list[Pair]:
    """Rows ``{prompt, completion}`` as pairs with no rejected side; unusable rows are left out."""
    names = [f"data.sft, row {index + 1}" for index in range(len(rows))]
    rows = [readable(row, tokenizer) for row in rows]
    cuts = _cuts(rows, ("completion",), tokenizer, max_length, scored, names)
    return [
        Pair(cut.prompt, cut.answers[0].ids, (), index, cut.answers[0].context)
        for index, cut in enumerate(cuts)
        if cut and cut.prompt and cut.answers[0].ids and not cut.long
    ]


def prompt_ids(row: Row, tokenizer: Any) -> list[int]:
    """What generation starts from: the prompt as training tokenises it, before any split."""
    row = readable(row, tokenizer)
    return _sequences([row], (), tokenizer, "assistant", ["the prompt"])[0].prompt


def _reason(row: Row, cut: Cut | None, drop_split: bool) -> str | None:
    if row.get("chosen") == row.get("rejected"):
        return "identical"
    if cut is None or not cut.prompt:
        return "empty"
    if cut.split and drop_split:
        return "split"
    if cut.long:
        return "long"
    if not all(answer.ids for answer in cut.answers):
        return "empty"
    return "identical" if cut.answers[0] in cut.answers[1:] else None


def _cuts(
    rows: Sequence[Row],
    sides: tuple[str, ...],
    tokenizer: Any,
    max_length: int,
    scored: str,
    names: Sequence[str],
) -> list[Cut | None]:
    usable = [
        n for n, row in enumerate(rows) if _has_text(row, sides, tokenizer, scored, names[n])
    ]
    cuts: list[Cut | None] = [None] * len(rows)
    usable_names = [names[index] for index in usable]
    usable_rows = [rows[index] for index in usable]
    sequences = _sequences(usable_rows, sides, tokenizer, scored, usable_names)
    for index, found in zip(usable, sequences):
        cuts[index] = _cut(found, max_length)
    return cuts


def _has_text(row: Row, sides: tuple[str, ...], tokenizer: Any, scored: str, name: str) -> bool:
    eos = tokenizer.eos_token or ""
    if isinstance(row["prompt"], list):
        return bool(row["prompt"]) and all(
            any(
                ((turn.get("content") or "").removesuffix(eos) or turn.get("tool_calls"))
                and (scored == "all" or writes(turn, name))
                for turn in row[side]
            )
            for side in sides
        )
    return all(row[side].removesuffix(eos) for side in sides)


def _cut(found: Sequences, max_length: int) -> Cut:
    n = min(common_prefix(found.prompt, whole) for whole in found.wholes)
    given = [
        [(n, len(whole))] if own is None else [(max(n, first), last) for first, last in own]
        for own, whole in zip(found.scored, found.wholes)
    ]
    return Cut(
        tuple(found.prompt[:n]),
        tuple(_answer(w, n, own, max_length) for w, own in zip(found.wholes, given)),
        split=found.split or n < len(found.prompt),
        truncated=any(own and own[-1][1] > max_length for own in given),
        long=n >= max_length or any(own and own[0][0] >= max_length for own in given),
    )


def _answer(whole: list[int], n: int, scored: list[Stretch], max_length: int) -> Answer:
    """What follows the first ``n`` tokens, up to the last that is scored and fits."""
    edges = [0]  # where context ends and where it begins, by turns
    for first, last in scored:
        first, last = max(first - n, edges[-1]), min(last, max_length) - n
        if first < last:
            edges = [*edges[:-1], last] if edges[-1] == first else [*edges, first, last]
    return Answer(tuple(whole[n : n + edges[-1]]), tuple(edges[:-1]))


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shortest = min(len(ids), len(others))
    if ids[:shortest] == others[:shortest]:
        return shortest
    return next(n for n in range(shortest) if ids[n] != others[n])


def _sequences(
    rows: Sequence[Row],
    sides: tuple[str, ...],
    tokenizer: Any,
    scored: str,
    names: Sequence[str],
) -> list[Sequences]:
    """Per row the tokens of the prompt and of prompt + each side."""
    chats = [isinstance(row["prompt"], list) for row in rows]
    if not all(chats) and sides and tokenizer.eos_token is None:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"{name}: no EOS token, so an answer has no end: set tokenizer.eos_token")
    texts = [
        rendered(row, sides, tokenizer, scored=scored, where=name)
        if chat
        else _plain_texts(row, sides, tokenizer)
        for row, chat, name in zip(rows, chats, names)
    ]
    tokens: list[list[list[int]]] = [[] for _ in rows]
    for kind in set(chats):
        places = [index for index, chat in enumerate(chats) if chat is kind]
        # a template writes its own special tokens
        flat = _tokens([t for p in places for t in texts[p].texts], tokenizer, special=not kind)
        width = 1 + len(sides)
        for number, place in enumerate(places):
            tokens[place] = flat[number * width : (number + 1) * width]
    return [_sequence(*both, tokenizer) for both in zip(texts, tokens)]


def _sequence(texts: Rendered, tokens: list[list[int]], tokenizer: Any) -> Sequences:
    """The words that are scored, in tokens: one that reaches beyond a turn is not the turn's."""
    # the prompt has a BOS of its own before which the tokenizer or template put another
    doubled = tokens[0][:2] == [tokenizer.bos_token_id] * 2
    prompt, *wholes = (ids[doubled:] for ids in tokens)
    scored: list[list[Stretch] | None] = []
    for words, text, ids in zip(texts.words, texts.texts[1:], tokens[1:]):
        if words is None:
            scored.append(None)
            continue
        edges = [edge for stretch in words for edge in stretch]
        if tokenizer.is_fast:
            how = {"add_special_tokens": False, "return_offsets_mapping": True, "verbose": False}
            ends = [end for _, end in tokenizer(text, **how)["offset_mapping"]]
            found = [bisect_right(ends, edge) - doubled for edge in edges]
        else:
            parts = _tokens([text[:edge] for edge in edges], tokenizer, special=False)
            found = [common_prefix(part, ids) - doubled for part in parts]
        scored.append(list(zip(found[::2], found[1::2])))
    return Sequences(prompt, wholes, scored, texts.split)


def _plain_texts(row: Row, sides: tuple[str, ...], tokenizer: Any) -> Rendered:
    eos = tokenizer.eos_token
    ended = [row[side] if row[side].endswith(eos) else row[side] + eos for side in sides]
    texts = [row["prompt"], *(row["prompt"] + text for text in ended)]
    return Rendered(texts, [None] * len(sides), split=False)


def _tokens(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    def call(batch: list[str]) -> list[list[int]]:
        # verbose: the warning about the model's own length says nothing about max_length
        kwargs = {"add_special_tokens": special, "return_attention_mask": False}
        return tokenizer(batch, **kwargs, verbose=False)["input_ids"]

    # text ends with the EOS that it was given: one that the tokenizer adds is taken off again
    adds_eos = special and call(["a"])[0][-1:] == [tokenizer.eos_token_id]
    return [ids[: len(ids) - adds_eos] for ids in call(texts)]
