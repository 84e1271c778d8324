"""Directories in; report.html, table.md and figures/ out."""

from collections.abc import Sequence
from pathlib import Path

from spo_lightning.errors import UserError
from spo_lightning.records.directory import private, write_text
from spo_lightning.records.summary import run_table
from spo_lightning.report import design, mixture, run_page, steps, sweep_page
from spo_lightning.report.charts import Chart, still
from spo_lightning.report.page import Section, page
from spo_lightning.report.reading import Run, runs_of
from spo_lightning.report.settings import Sweep, markdown

PAGE, TABLE, FIGURES = "report.html", "table.md", "figures"


def found(directories: Sequence[Path]) -> list[Run]:
    """The runs of a report. Raises ``UserError`` where there is none."""
    runs = runs_of(directories)
    if not runs:
        where = ", ".join(map(str, directories))
        marks = "status.json, metrics.json or metrics.csv"
        raise UserError(f"no run ({marks}) and no eval.json in {where}")
    return runs


def content(directories: Sequence[Path], runs: Sequence[Run]) -> tuple[str, list[Section]]:
    """The page's title and sections."""
    if len(runs) == 1:
        return f"Run {runs[0].name}", run_page.sections(runs[0])
    title = " and ".join(directory.absolute().name for directory in directories)
    return title, sweep_page.sections(runs)


def build(
    directories: Sequence[Path], room: Path | None = None, *, stills: bool = True
) -> list[Path]:
    """Write the report of the directories into ``room`` (the one directory); what was written."""
    runs = found(directories)
    title, sections = content(directories, runs)
    room = room or directories[0]
    room.mkdir(parents=True, exist_ok=True)
    written = [room / PAGE]
    write_text(written[0], page(title, sections))
    done = [run for run in runs if run.finished]
    if done:
        numbers = {"init": done[0].init, "final": done[0].final}
        sweep = Sweep(done)
        several = markdown(sweep)
        several += "".join(it.markdown(sweep.settings) for it in (design, mixture))
        text = run_table(numbers) if len(done) == 1 else several
        written.append(room / TABLE)
        write_text(written[-1], private(text))
    if stills:
        written.append(room / FIGURES)
        written[-1].mkdir(exist_ok=True)
        for chart in (block for section in sections for block in section.blocks):
            if isinstance(chart, Chart):
                still(chart, written[-1])
        written += steps.report(done, room)
    return written


def attempted(directory: Path) -> str:
    """One line: where the page of a finished run or sweep is, or why there is none. What was
    computed stands whether or not its page can be made."""
    try:
        return f"Report: {build([directory], stills=False)[0]}"
    except Exception as error:
        return f"No report: {type(error).__name__}: {str(error).splitlines()[0]}"
