"""Shows a sweep while it runs: a live table, or where there is no terminal a line per job."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from spo_lightning.sweep.jobs import RUNNING, SHOWN, WAITING, Job, Sweep

log = logging.getLogger(__name__)

ROWS = 12  # jobs that have ended or wait, at most, beside those that run


def left(jobs: Sequence[Job], parallel: int) -> float | None:
    """Seconds until all have ended, as if each took as long as those that have; None: unknown."""
    took = [job.seconds for job in jobs if job.state not in (WAITING, RUNNING) and job.seconds]
    if not took or len(took) == len(jobs):
        return None
    each = sum(took) / len(took)
    rest = sum(
        each if job.state == WAITING else max(0.1 * each, each - job.seconds)
        for job in jobs
        if job.state in (WAITING, RUNNING)
    )
    return rest / parallel


def span(seconds: float | None) -> str:
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def line(sweep: Sweep, job: Job) -> str:
    """How a job ended."""
    done = sum(other.state not in (WAITING, RUNNING) for other in sweep.jobs)
    final = job.numbers.get("final") or {}
    numbers = " ".join(f"{name} {final[name]:.4f}" for name in SHOWN if name in final)
    said = job.error or numbers
    words = sweep.varying(job)
    return f"job {job.number} ({words}) {job.state} in {span(job.seconds)}, {done} of " + (
        f"{len(sweep.jobs)} ended: {said}" if said else f"{len(sweep.jobs)} ended"
    )


@contextmanager
def shown(sweep: Sweep, parallel: int) -> Iterator[Callable[[], None]]:
    """Call what it gives often; it looks at the jobs and shows what is new."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    told = {job.number for job in sweep.jobs if job.state not in (WAITING, RUNNING)}
    if not console.is_terminal:

        def look() -> None:
            for job in sweep.jobs:
                if job.state not in (WAITING, RUNNING) and job.number not in told:
                    told.add(job.number)
                    log.info(line(sweep, job))

        yield look
        return
    # no thread beside those that fork, and stdout as it is for what is forked
    how = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    with Live(console=console, **how) as live:  # type: ignore[arg-type]
        yield lambda: live.update(_table(sweep, parallel), refresh=True)


def _table(sweep: Sweep, parallel: int) -> Any:
    from rich.markup import escape
    from rich.table import Table

    waiting = [job for job in sweep.jobs if job.state == WAITING]
    running = [job for job in sweep.jobs if job.state == RUNNING]
    ended = [job for job in sweep.jobs if job.state not in (WAITING, RUNNING)]
    rest = span(left(sweep.jobs, parallel))
    table = Table(
        title=f"{len(ended)} of {len(sweep.jobs)} jobs ended"
        + (f", about {rest} left" if rest else "")
        + f", {span(time.time() - sweep.started)} so far"
    )
    for name in ("job", "words", "state", "done", "time", ""):
        table.add_column(name)
    for job in (*ended[-ROWS:], *running, *waiting[: max(0, ROWS - len(ended))]):
        state, done = job.state, ""
        if job in running:
            state, share = job.progress()
            done = f"{share:.0%}"
        final = job.numbers.get("final") or {}
        said = job.error or " ".join(f"{n} {final[n]:.3f}" for n in SHOWN[:2] if n in final)
        clock = span(job.seconds) if job.state != WAITING else ""
        table.add_row(
            str(job.number), escape(sweep.varying(job)), state, done, clock, escape(said)
        )
    return table
