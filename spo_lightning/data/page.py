"""What a summary says, as plain text for a terminal: answers first, then what they rest on."""

import textwrap
from collections.abc import Iterator, Sequence

from spo_lightning.data.pieces import SCORED, Piece
from spo_lightning.data.spread import Spread
from spo_lightning.data.summary import FIELDS, Example, Reason, Summary, shortened

WIDTH, TOLD, TEXT = 96, 1200, 40  # letters of a line, of a part of the pair, of a field
AS_IT_STANDS = textwrap.TextWrapper(  # every letter, a space at the end of a line too
    WIDTH, expand_tabs=False, replace_whitespace=False, drop_whitespace=False
)
QUANTILES = ("lowest", "median", "p90", "p99", "highest")


def page(found: Summary) -> str:
    """The text that the inspect command prints, at most 100 letters wide."""
    parts = [_answer(found), _counts(found), _dropped(found.dropped), _checks(found)]
    if found.pair is None:
        parts.append("no pair is left to show")
    else:
        parts += [_lengths(found), _subsets(found), _pair(found)]
    return "\n\n".join(filter(None, parts)) + "\n"


def _answer(found: Summary) -> str:
    named = ", ".join(f"{name} ({told})" if told else name for name, told in found.columns.items())
    source = ", ".join(f"{name} {count:,}" for name, count in found.source.items() if count)
    lines = [found.name, *found.notes, f"source: {source}" if source else "", f"columns: {named}"]
    return "\n".join(_wrapped(line, "  ") for line in lines if line)


def _counts(found: Summary) -> str:
    heads = list(found.counts["dropped"])
    lines = [f"{'':<62}" + "".join(f"{head:>12}" for head in heads)]
    for key, some in found.counts.items():
        name = shortened(key.replace("dropped: ", "  "), 61)
        cells = (f"{some[head]:>12,}" if head in some else " " * 12 for head in heads)
        lines.append(f"{name:<62}{''.join(cells)}".rstrip())
    return "\n".join(lines)


def _dropped(reasons: Sequence[Reason]) -> str:
    lines = ["dropped, for example"] if reasons else []
    for reason in reasons:
        lines += [f"  {reason.why}", *map(_example, reason.examples)]
    return "\n".join(lines)


def _checks(found: Summary) -> str:
    lines = ["checks"]
    for check in found.checks:
        lines += [f"  {check.what}: {check.count:,}", *map(_example, check.examples)]
    return "\n".join(lines)


def _example(one: Example) -> str:
    texts = (shortened(text, TEXT).replace("\n", "⏎") for text in one.fields.values())
    fields = (f'{name} "{text}"' for name, text in zip(one.fields, texts))
    return _wrapped(f"    {one.where}: {', '.join(fields)}", "      ")


def _lengths(found: Summary) -> str:
    lines = [_row("tokens", QUANTILES)]
    lines += [_row(name, _cells(some)) for name, some in found.lengths.items()]
    if found.margins is not None:
        lines.append(_row(f"margin of {found.margins.count:,} rows", _cells(found.margins)))
    pairs = found.lengths["prompt"].count
    cut, lost, tokens = found.cut
    lines.append(
        f"  max_length={found.max_length} cuts {cut:,} of {pairs:,} {found.noun}s "
        f"({cut / pairs:.1%}) and {lost:,} of {tokens:,} tokens ({lost / tokens:.1%})"
    )
    shares = {name: f"{count:,} ({count / pairs:.1%})" for name, count in found.longer.items()}
    if shares:
        lines.append(
            f"  the longer answer is the chosen one in {shares['chosen']}, the rejected one in "
            f"{shares['rejected']}; equally long: {shares['as long']}"
        )
    return "\n".join(_wrapped(line, "    ") for line in lines)


def _cells(some: Spread) -> list[str]:
    return [f"{getattr(some, name):,.6g}" for name in QUANTILES]


def _row(name: str, cells: Sequence[str]) -> str:
    indent = "" if name == "tokens" else "  "
    return f"{indent + name:<28}" + "".join(f"{cell:>12}" for cell in cells)


def _subsets(found: Summary) -> str:
    totals = found.counts["rows"]
    lines = [f"{'subset':<62}" + "".join(f"{side:>12}" for side in totals)]
    for name, counts in found.subsets.items():
        cells = (counts.get(side, 0) / max(total, 1) for side, total in totals.items())
        lines.append(f"  {shortened(name, 59):<60}" + "".join(f"{cell:>12.1%}" for cell in cells))
    return "\n".join(lines) if found.subsets else ""


def _pair(found: Summary) -> str:
    """Tokens that are scored stand in ⟦ ⟧."""
    pair = found.pair
    assert pair is not None
    where = f"{pair.side}, row {pair.row + 1}"
    lines = [f"one {found.noun} ({where}); what is scored stands in ⟦ ⟧, ⏎ is a line break"]
    for name, count in zip(FIELDS, pair.tokens):
        if not count:  # a text has no rejected answer, a labelled row one of the two
            continue
        text = "".join(_marked(getattr(pair, name)))
        if len(text) > TOLD:
            text = f"[...]{text[-TOLD:]}" if name == "prompt" else f"{text[:TOLD]}[...]"
        lines += ["", f"{name} ({count} tokens)"]
        for line in text.replace("\n", "⏎\n").split("\n"):
            lines += [f"  {part}" for part in AS_IT_STANDS.wrap(line)]
    return "\n".join(lines)


def _marked(pieces: Sequence[Piece]) -> Iterator[str]:
    before = False
    for piece in pieces:
        here = piece.use == SCORED
        yield ("⟦" if here else "⟧" if before else "") * (here != before) + piece.text
        before = here
    yield "⟧" * before


def _wrapped(line: str, indent: str) -> str:
    """Broken between words."""
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False))
