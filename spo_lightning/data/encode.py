"""Validated rows in, token pairs out, with a count of what was dropped, split and truncated.

Tokenised as TRL 1.16 does (its ``DPOTrainer._prepare_dataset``), except that every row is checked,
a leading BOS is never doubled, and an EOS that the tokenizer adds by itself is not doubled either.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from spo_lightning.data.batch import Pair
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
SHOWN = 3  # rows of each reason that are shown
FIXES = {
    "identical": "chosen and rejected are the same",
    "empty": "the prompt or a response is empty",
    "long": "the prompt alone fills max_length",
    "split": "the prompt's tokens are not the beginning of prompt + response",
}


@dataclass(frozen=True)
class Encoded:
    """Token pairs and what became of all rows; ``Pair.row`` is the place of the given row."""

    pairs: list[Pair]
    counts: dict[str, int]
    # by reason: the places of the first three rows that were dropped
    examples: dict[str, list[int]] = field(default_factory=dict)


class Cut(NamedTuple):
    """A tokenised row: the shared prompt, its responses, and what it took to get there."""

    prompt: list[int]
    responses: tuple[list[int], ...]
    split: bool
    truncated: bool


def encode_pairs(
    rows: Sequence[Row],
    tokenizer: Any,
    *,
    max_length: int,
    on_mismatch: str,
    strict: bool,
    where: str,
) -> Encoded:
    """Pairs whose prompt + one response has at most ``max_length`` tokens."""
    found = encode_some(
        rows,
        tokenizer,
        range(len(rows)),
        max_length=max_length,
        on_mismatch=on_mismatch,
        strict=strict,
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
    where: str,
) -> Encoded:
    """Part of the data, of which nothing need be left. ``places``: of the rows in the whole."""
    if on_mismatch not in ("split", "drop", "error"):
        raise UserError(f"data.on_mismatch={on_mismatch}: choose split, drop or error")
    counts, pairs = dict.fromkeys(COUNTS, 0), []
    examples: dict[str, list[int]] = {}
    names = [f"{where}, row {place + 1}" for place in places]
    for index, cut in enumerate(_cuts(rows, ("chosen", "rejected"), tokenizer, max_length, names)):
        reason = _reason(rows[index], cut, max_length, on_mismatch == "drop")
        if on_mismatch == "error" and cut is not None and cut.split:
            reason, strict = "split", True
        if reason and strict:
            raise UserError(f"{names[index]}: {FIXES[reason]}: correct or remove the row")
        if reason or cut is None:
            counts[f"dropped/{reason}"] += 1
            examples[str(reason)] = [*examples.get(str(reason), []), places[index]][:SHOWN]
            continue
        pairs.append(Pair(tuple(cut.prompt), *map(tuple, cut.responses), row=places[index]))
        counts["split"] += cut.split
        counts["truncated"] += cut.truncated
    return Encoded(pairs, counts | {"kept": len(pairs)}, examples)


def encode_texts(rows: Sequence[Row], tokenizer: Any, *, max_length: int) -> list[Pair]:
    """Rows ``{prompt, completion}`` as pairs with no rejected side; unusable rows are left out."""
    names = [f"data.sft, row {index + 1}" for index in range(len(rows))]
    cuts = enumerate(_cuts(rows, ("completion",), tokenizer, max_length, names))
    return [
        Pair(tuple(cut.prompt), tuple(cut.responses[0]), (), row=index)
        for index, cut in cuts
        if cut and cut.prompt and cut.responses[0] and len(cut.prompt) < max_length
    ]


def prompt_ids(row: Row, tokenizer: Any) -> list[int]:
    """What generation starts from: the prompt as training tokenises it, before any split."""
    return _sequences([row], (), tokenizer, ["the prompt"])[0][0]


def _reason(row: Row, cut: Cut | None, max_length: int, drop_split: bool) -> str | None:
    if row["chosen"] == row["rejected"]:
        return "identical"
    if cut is None or not cut.prompt:
        return "empty"
    if cut.split and drop_split:
        return "split"
    if len(cut.prompt) >= max_length:
        return "long"
    if not all(cut.responses):
        return "empty"
    return "identical" if cut.responses[0] == cut.responses[1] else None


def _cuts(
    rows: Sequence[Row],
    sides: tuple[str, ...],
    tokenizer: Any,
    max_length: int,
    names: Sequence[str],
) -> list[Cut | None]:
    usable = [index for index, row in enumerate(rows) if _has_text(row, sides, tokenizer)]
    cuts: list[Cut | None] = [None] * len(rows)
    usable_names = [names[index] for index in usable]
    sequences = _sequences([rows[index] for index in usable], sides, tokenizer, usable_names)
    for index, (prompt, *fulls) in zip(usable, sequences):
        cuts[index] = _cut(prompt, fulls, max_length)
    return cuts


def _has_text(row: Row, sides: tuple[str, ...], tokenizer: Any) -> bool:
    if isinstance(row["prompt"], list):
        return bool(row["prompt"]) and all(
            any(turn.get("content") or turn.get("tool_calls") for turn in row[side])
            for side in sides
        )
    return all(row[side].removesuffix(tokenizer.eos_token or "") for side in sides)


def _cut(prompt: list[int], fulls: list[list[int]], max_length: int) -> Cut:
    n = min(common_prefix(prompt, full) for full in fulls)
    room = max(max_length - n, 0)
    responses = tuple(full[n : n + room] for full in fulls)
    return Cut(prompt[:n], responses, n < len(prompt), any(len(f) > n + room for f in fulls))


def common_prefix(ids: Sequence[int], others: Sequence[int]) -> int:
    """How many leading tokens two sequences share."""
    shortest = min(len(ids), len(others))
    if ids[:shortest] == others[:shortest]:
        return shortest
    return next(n for n in range(shortest) if ids[n] != others[n])


def _sequences(
    rows: Sequence[Row], sides: tuple[str, ...], tokenizer: Any, names: Sequence[str]
) -> list[list[list[int]]]:
    """Per row the tokens of the prompt and of prompt + each side: [N][1 + sides][tokens]."""
    chats = [isinstance(row["prompt"], list) for row in rows]
    if not all(chats) and sides and tokenizer.eos_token is None:
        name = tokenizer.name_or_path or "the tokenizer"
        raise UserError(f"{name}: no EOS token, so an answer has no end: set tokenizer.eos_token")
    texts = [
        _chat_texts(row, sides, tokenizer, name) if chat else _plain_texts(row, sides, tokenizer)
        for row, chat, name in zip(rows, chats, names)
    ]
    sequences: list[list[list[int]]] = [[] for _ in rows]
    for kind in set(chats):
        places = [index for index, chat in enumerate(chats) if chat is kind]
        # a template writes its own special tokens
        flat = _tokens([text for p in places for text in texts[p]], tokenizer, special=not kind)
        width = 1 + len(sides)
        for number, place in enumerate(places):
            own = flat[number * width : (number + 1) * width]
            # the prompt has a BOS of its own before which the tokenizer or template put another
            doubled = own[0][:2] == [tokenizer.bos_token_id] * 2
            sequences[place] = [ids[doubled:] for ids in own]
    return sequences


def _plain_texts(row: Row, sides: tuple[str, ...], tokenizer: Any) -> list[str]:
    eos = tokenizer.eos_token
    ended = [row[side] if row[side].endswith(eos) else row[side] + eos for side in sides]
    return [row["prompt"], *(row["prompt"] + text for text in ended)]


def _chat_texts(row: Row, sides: tuple[str, ...], tokenizer: Any, name: str) -> list[str]:
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path or 'the tokenizer'}: no chat template, and {name} holds "
            "messages: use a tokenizer that has one, or give prompt, chosen and rejected as text"
        )
    extra = {"tools": row.get("tools"), **row.get("chat_template_kwargs", {})}
    chats = [row["prompt"], *(row["prompt"] + row[side] for side in sides)]
    try:
        return [
            tokenizer.apply_chat_template(
                chat, **(extra | {"tokenize": False, "add_generation_prompt": not place})
            )
            for place, chat in enumerate(chats)
        ]
    except TemplateError as error:
        raise UserError(
            f"{name}: the chat template refuses it ({error}): mend the turns"
        ) from None


def _tokens(texts: list[str], tokenizer: Any, *, special: bool) -> list[list[int]]:
    def call(batch: list[str]) -> list[list[int]]:
        # verbose: the warning about the model's own length says nothing about max_length
        kwargs = {"add_special_tokens": special, "return_attention_mask": False}
        return tokenizer(batch, **kwargs, verbose=False)["input_ids"]

    # text ends with the EOS that it was given: one that the tokenizer adds is taken off again
    adds_eos = special and call(["a"])[0][-1:] == [tokenizer.eos_token_id]
    return [ids[: len(ids) - adds_eos] for ids in call(texts)]
