"""Sections in, one HTML file out that opens from disk and asks nothing of any network.

What a run holds is untrusted: it enters page.html as escaped text, or as JSON of plots.
"""

import json
import math
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.directory import private
from spo_lightning.report.charts import Chart

Cell = str | float | int | None
MEAN = re.compile(r"[+-]?[\d.]+ ± [\d.]+( \*)?")  # with its interval
CONTROL = {n: chr(0x2400 + n) for n in range(32) if n not in (9, 10)} | {127: "\u2421"}
# marks that turn the direction of all that follows; shown by their names
TURNING = {n: f"[U+{n:04X}]" for n in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


@dataclass(frozen=True)
class Text:
    """Pieces ``(text, classes, told)`` that stand in a row; ``told`` shows under the pointer.

    ``folded`` are more of them behind their number of letters: before the others, or after them.
    """

    pieces: Sequence[tuple[str, str, str]]
    folded: Sequence[tuple[str, str, str]] = ()
    ends: bool = False  # what is seen is the end

    @property
    def hidden(self) -> int:
        """Letters behind the fold."""
        return sum(len(text) for text, *_ in self.folded)


@dataclass(frozen=True)
class Table:
    """Sorted by a click on a heading. ``key`` names it for those who read the page by program."""

    key: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | Text]]
    digits: int = 4


@dataclass(frozen=True)
class Samples:
    """Texts side by side, searched and filtered: rows of samples.jsonl."""

    rows: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Browsed:
    """Rows of texts, searched and filtered by their ``marks``; ``menu``: what a mark is called."""

    key: str
    head: Sequence[str]
    rows: Sequence[Sequence[Cell | Text]]
    marks: Sequence[str]  # of each row, apart by spaces
    menu: Mapping[str, str]
    digits: int = 0


@dataclass(frozen=True)
class Lines:
    """A text of its own, as it is."""

    title: str
    text: Text


@dataclass(frozen=True)
class Picture:
    """A PNG, shown as it is. ``told`` says what is on it to those who do not see it."""

    told: str
    content: bytes

    @property
    def source(self) -> str:
        return f"data:image/png;base64,{b64encode(self.content).decode()}"


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


Block = Table | Samples | Browsed | Lines | Picture | Note | Folded | Chart


@dataclass(frozen=True)
class Section:
    """``about``: what to read from it, in a sentence."""

    title: str
    blocks: Sequence[Block]
    about: str = ""


def page(title: str, sections: Sequence[Section], *, state: str | None = None) -> str:
    """The file. ``state``: of what it was made from, where a server has newer ones."""
    shown = [section for section in sections if section.blocks]
    charts = [block for one in shown for block in one.blocks if isinstance(block, Chart)]
    drawings = {c.key: {"data": c.data, "layout": c.layout, "high": c.high} for c in charts}
    return _template().render(
        title=title,
        sections=shown,
        drawings=drawings,
        state=state,
        plotly=_library() if drawings else "",
    )


@cache
def _template() -> Any:
    """page.html, in which every text is made visible and escaped."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    texts = Environment(
        loader=PackageLoader("spo_lightning", "report"),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    texts.filters |= {
        "private": lambda text: Markup(private(str(text))),
        "json": lambda value: Markup(embedded(value)),
        "kind": lambda block: type(block).__name__,
        "whole": lambda text: bool(MEAN.fullmatch(text)),
    }
    room = files("spo_lightning.report")
    for name in ("css", "js"):
        texts.globals[name] = Markup(room.joinpath(f"page.{name}").read_text(encoding="utf-8"))
    return texts.get_template("page.html")


def visible(text: str) -> str:
    """The text without control characters and broken surrogates."""
    seen = text.translate(CONTROL).translate(TURNING)
    return seen.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def embedded(value: Any) -> str:
    """JSON that stands in a script element whatever texts it holds."""
    text = json.dumps(numbered(value), allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def numbered(value: Any) -> Any:
    """The same with what JSON has no word for, nan and infinities, as null; floats rounded."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {name: numbered(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [numbered(one) for one in value]
    return value


def _library() -> Any:
    """plotly's own script, found without importing plotly; a closing tag in it would end ours."""
    from markupsafe import Markup

    found = find_spec("plotly")
    if found is None or found.origin is None:
        raise UserError("the page's plots need plotly: pip install plotly")
    path = Path(found.origin).parent / "package_data/plotly.min.js"
    return Markup(path.read_text(encoding="utf-8").replace("</script", "<\\/script"))
