"""Sections in, one HTML file out that opens from disk and asks nothing of any network.

What a run holds is untrusted: it enters as escaped text, or as JSON that a script puts in place
as text.
"""

import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.directory import private
from spo_lightning.report.charts import Drawing, Heat, embedded, plotly

Cell = str | float | int | None
MEAN = re.compile(r"[+-]?[\d.]+ ± [\d.]+( \*)?")  # with its interval
CONTROL = {n: chr(0x2400 + n) for n in range(32) if n not in (9, 10)} | {127: "\u2421"}
# marks that turn the direction of all that follows; shown by their names
TURNING = {n: f"[U+{n:04X}]" for n in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Table:
    """Sorted by a click on a heading. ``key`` names it for those who read the page by program."""

    key: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    digits: int = 4


@dataclass(frozen=True)
class Samples:
    """Texts side by side, searched and filtered."""

    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Note:
    """A paragraph; ``alarm``: one to see first."""

    text: str
    alarm: bool = False


@dataclass(frozen=True)
class Folded:
    """Long text behind its title."""

    title: str
    text: str


Block = Table | Samples | Note | Folded | Drawing


@dataclass(frozen=True)
class Section:
    """``about``: what to read from it, in a sentence."""

    title: str
    blocks: Sequence[Block]
    about: str = ""


def page(title: str, sections: Sequence[Section], *, state: str | None = None) -> str:
    """The file. ``state``: of what it was made from, where a server has newer ones."""
    shown = [section for section in sections if section.blocks]
    drawings: dict[str, Any] = {}
    body = [f'<h1 dir="auto">{text(title)}</h1>', _contents(shown)]
    for number, section in enumerate(shown):
        body.append(f'<section id="s{number}"><h2>{text(section.title)}</h2>')
        if section.about:
            body.append(f'<p class="about">{text(section.about)}</p>')
        grid = [block for block in section.blocks if isinstance(block, Drawing)]
        body += [_block(block) for block in section.blocks if not isinstance(block, Drawing)]
        if grid:
            body.append('<div class="charts">' + "".join(map(_place, grid)) + "</div>")
            drawings |= {chart.key: _drawing(chart) for chart in grid}
        body.append("</section>")
    room = files("spo_lightning.report")
    return _PAGE.format(
        title=text(private(title)),
        style=room.joinpath("page.css").read_text(encoding="utf-8"),
        body=private("\n".join(body)),
        drawings=private(embedded(drawings)),
        state=embedded(state),
        plotly=_library() if drawings else "",
        script=room.joinpath("page.js").read_text(encoding="utf-8"),
    )


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; \
style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:; connect-src 'self'">
<link rel="icon" href="data:,"><title>{title}</title><style>{style}</style></head>
<body><main>{body}</main>
<script type="application/json" id="drawings">{drawings}</script>
<script>const STATE = {state};</script>
<script>{plotly}</script><script>{script}</script></body></html>
"""


def text(value: Any) -> str:
    """Escaped; what cannot be seen, or turns what follows, is shown by a sign."""
    return html.escape(visible(str(value)))


def visible(value: str) -> str:
    """The text without control characters and broken surrogates."""
    seen = value.translate(CONTROL).translate(TURNING)
    return seen.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _contents(sections: Sequence[Section]) -> str:
    links = (f'<a href="#s{n}">{text(s.title)}</a>' for n, s in enumerate(sections))
    return "<nav>" + " ".join(links) + "</nav>"


def _block(block: Any) -> str:
    if isinstance(block, Note):
        kind = ' class="alarm" role="alert"' if block.alarm else ""
        return f"<p{kind}>{text(block.text)}</p>"
    if isinstance(block, Folded):
        inside = f"<summary>{text(block.title)}</summary><pre>{text(block.text)}</pre>"
        return f"<details>{inside}</details>"
    if isinstance(block, Table):
        return _table(block)
    rows = [
        {k: visible(v) if isinstance(v, str) else v for k, v in row.items()} for row in block.rows
    ]
    return _SAMPLES.format(rows=embedded(rows))


_SAMPLES = """<div class="samples"><p class="tools">
<input type="search" placeholder="search the texts" aria-label="search the texts">
<select aria-label="which answers"><option value="">all answers</option>
<option value="right">right after</option><option value="wrong">wrong after</option>
<option value="lost">right before, wrong after</option>
<option value="won">wrong before, right after</option>
<option value="changed">text changed</option></select> <output></output></p>
<div class="scroll"><table><thead></thead><tbody></tbody></table></div>
<p class="tools"><button type="button">more</button></p>
<script type="application/json">{rows}</script></div>"""


def _table(block: Table) -> str:
    head = "".join(f'<th scope="col"><button>{text(name)}</button></th>' for name in block.head)
    rows = "".join(
        "<tr>" + "".join(_cell(cell, block.digits) for cell in row) + "</tr>" for row in block.rows
    )
    return (
        f'<div class="scroll"><table class="sortable" data-key="{text(block.key)}">'
        f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _cell(cell: Cell, digits: int) -> str:
    if cell is None:
        return "<td></td>"
    if isinstance(cell, float):
        return f'<td class="number" data-value="{cell!r}">{cell:.{digits}f}</td>'
    if isinstance(cell, int):
        return f'<td class="number" data-value="{cell}">{cell}</td>'
    whole = ' class="whole"' if MEAN.fullmatch(cell) else ""  # never broken over two lines
    return f'<td dir="auto"{whole}>{text(cell)}</td>'


def _place(chart: Drawing) -> str:
    title, key = text(chart.title), text(chart.key)
    place = f'<div class="chart" data-chart="{key}" role="img" aria-label="{title}"></div>'
    return f"<figure><figcaption>{title}</figcaption>{place}</figure>"


def _drawing(chart: Drawing) -> dict[str, Any]:
    return {
        **plotly(chart),
        "high": 120 + 30 * len(chart.rows) if isinstance(chart, Heat) else 340,
    }


def _library() -> str:
    """plotly's own script, found without importing plotly; a closing tag in it would end ours."""
    found = find_spec("plotly")
    if found is None or found.origin is None:
        raise UserError("the page's plots need plotly: pip install plotly")
    path = Path(found.origin).parent / "package_data/plotly.min.js"
    return path.read_text(encoding="utf-8").replace("</script", "<\\/script")
