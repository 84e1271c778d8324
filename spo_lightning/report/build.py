"""Directories in; report.html, table.md and figures/ out."""

from collections.abc import Sequence
from pathlib import Path

from spo_lightning.errors import UserError
from spo_lightning.records.directory import private, write_text
from spo_lightning.records.summary import run_table
from spo_lightning.report import run_page, sweep_page
from spo_lightning.report.charts import Chart, Drawing, Heat, Histogram, still
from spo_lightning.report.page import Section, page
from spo_lightning.report.reading import runs_of
from spo_lightning.report.settings import SHOWN
from spo_lightning.report.table import finished, sweep_table

PAGE, TABLE, FIGURES = "report.html", "table.md", "figures"


def sections(directories: Sequence[Path]) -> tuple[str, list[Section]]:
    """The page's title and content. Raises ``UserError`` where there is no run."""
    runs = runs_of(directories)
    if not runs:
        where = ", ".join(map(str, directories))
        raise UserError(f"no run (status.json, metrics.json or metrics.csv) in {where}")
    if len(runs) == 1:
        return f"Run {runs[0].name}", run_page.sections(runs[0])
    return title(directories), sweep_page.sections([run.read() for run in runs])


def title(directories: Sequence[Path]) -> str:
    return " and ".join(directory.absolute().name for directory in directories)


def build(
    directories: Sequence[Path], room: Path | None = None, *, stills: bool = True
) -> list[Path]:
    """Write the report of the directories into ``room`` (the one directory); what was written."""
    named, content = sections(directories)
    room = room or directories[0]
    room.mkdir(parents=True, exist_ok=True)
    written = [room / PAGE]
    write_text(written[0], page(named, content))
    text = markdown(directories)
    if text:
        written.append(room / TABLE)
        write_text(written[-1], private(text))
    if stills:
        folder = room / FIGURES
        folder.mkdir(exist_ok=True)
        for chart in drawings(content):
            still(chart, folder)
        written.append(folder)
    return written


def attempted(directory: Path) -> str:
    """One line: where the page of a finished run or sweep is, or why there is none. What was
    computed stands whether or not its page can be made."""
    try:
        return f"Report: {build([directory], stills=False)[0]}"
    except Exception as error:
        return f"No report: {type(error).__name__}: {str(error).splitlines()[0]}"


def drawings(content: Sequence[Section]) -> list[Drawing]:
    kinds = (Chart, Heat, Histogram)
    return [block for section in content for block in section.blocks if isinstance(block, kinds)]


def markdown(directories: Sequence[Path]) -> str | None:
    """The table of one run, or of a sweep; None before any has its numbers."""
    runs = finished(directories)
    if not runs:
        return None
    if len(runs) == 1:
        return run_table(runs[0][1])
    return sweep_table(directories, SHOWN)
