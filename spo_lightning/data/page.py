"""What the data becomes, as one page of plain text: counts, lengths, one rendered pair."""

import textwrap
from collections.abc import Sequence
from typing import Any

from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import COUNTS, Encoded
from spo_lightning.data.rows import Task

WIDTH, BAR, BINS, SHOWN = 96, 50, 8, 1200


def page(encoded_train: Encoded, encoded_held_out: Encoded, tokenizer: Any, task: Task) -> str:
    """The text that the inspect command prints."""
    sides = {"train": encoded_train, "held-out": encoded_held_out}
    shown = next((pair for side in sides.values() for pair in side.pairs), None)
    source = "".join(f"{name}: {count}\n" for name, count in task.counts.items())
    parts = [
        f"source\n{textwrap.indent(source or 'no counts', '  ')}".rstrip(),
        _counts({name: side.counts for name, side in sides.items()}, task),
        *_histograms([pair for side in sides.values() for pair in side.pairs]),
        "no pair is left to show" if shown is None else _rendered(shown, tokenizer),
    ]
    return "\n\n".join(parts) + "\n"


def _counts(sides: dict[str, dict[str, int]], task: Task) -> str:
    lines = [f"{'pairs':<20}" + "".join(f"{name:>12}" for name in sides)]
    totals = [
        sum(n for key, n in counts.items() if key == "kept" or key.startswith("dropped/"))
        for counts in sides.values()
    ]
    lines.append(f"{'  rows':<20}" + "".join(f"{total:>12,}" for total in totals))
    for key in COUNTS:
        cells = "".join(f"{counts.get(key, 0):>12,}" for counts in sides.values())
        lines.append(f"  {key:<18}{cells}")
    lines.append(f"{'SFT rows':<20}{len(task.sft):>12,}")
    if task.lower:
        lines.append(f"{'lower-level rows':<20}{len(task.lower):>12,}")
    return "\n".join(lines)


def _histograms(pairs: Sequence[Pair]) -> list[str]:
    if not pairs:
        return []
    return [
        _histogram("prompt", [len(pair.prompt) for pair in pairs]),
        _histogram("chosen", [len(pair.chosen) for pair in pairs]),
        _histogram("rejected", [len(pair.rejected) for pair in pairs]),
    ]


def _histogram(name: str, lengths: Sequence[int]) -> str:
    low, high = min(lengths), max(lengths)
    step = (high - low) // BINS + 1
    bins = [0] * ((high - low) // step + 1)
    for length in lengths:
        bins[(length - low) // step] += 1
    middle = sorted(lengths)[len(lengths) // 2]
    lines = [f"tokens of {name}: {low} to {high}, median {middle}"]
    for number, count in enumerate(bins):
        start = low + number * step
        bar = "#" * -(-count * BAR // max(bins))
        lines.append(f"  {start:>6} - {start + step - 1:<6} {bar:<{BAR}} {count:>9,}")
    return "\n".join(lines)


def _rendered(pair: Pair, tokenizer: Any) -> str:
    prompt = _decoded(pair.prompt, tokenizer)
    lines = [f"one pair (row {pair.row}); what is scored stands in ⟦ ⟧, ⏎ is a line break"]
    for name, response in (("chosen", pair.chosen), ("rejected", pair.rejected)):
        whole = _decoded((*pair.prompt, *response), tokenizer)
        # pieces decoded alone lose their leading space, so the response is cut from the whole
        alone = _decoded(response, tokenizer)
        scored = whole[len(prompt) :] if whole.startswith(prompt) else alone
        text = f"{_shortened(prompt, keep_end=True)}⟦{_shortened(scored, keep_end=False)}⟧"
        tokens = f"{len(pair.prompt)} + {len(response)} tokens"
        lines += ["", f"{name} ({tokens})", textwrap.indent(_wrapped(text), "  ")]
    return "\n".join(lines)


def _decoded(ids: Sequence[int], tokenizer: Any) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _shortened(text: str, *, keep_end: bool) -> str:
    if len(text) <= SHOWN:
        return text
    return "[...]" + text[-SHOWN:] if keep_end else text[:SHOWN] + "[...]"


def _wrapped(text: str) -> str:
    lines = text.replace("\n", "⏎\n").split("\n")
    return "\n".join(
        line[n : n + WIDTH] for line in lines for n in range(0, len(line) or 1, WIDTH)
    )
