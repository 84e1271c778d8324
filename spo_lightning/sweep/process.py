"""A job's process: begun, listened to, told of a signal, and what it came to."""

import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from hydra.core.utils import JobReturn, JobStatus

from spo_lightning.errors import STOPPED, Interrupted, is_bug, verdict
from spo_lightning.records.directory import finished_numbers
from spo_lightning.records.progress import WARNINGS, stopped
from spo_lightning.sweep import jobs
from spo_lightning.sweep.jobs import Job

OUTPUT = "output.log"  # all that a job's process wrote, tracebacks included
LOOK_SECONDS = 0.5


@dataclass
class Running:
    job: Job
    process: Any
    heard: Connection
    began: float
    before: float  # seconds of earlier tries
    word: tuple[int, str | None, Any] | None = None  # exit code, its line, what the job returned


def begun(job: Job, parallel: int, work: Callable[[], JobReturn]) -> Running:
    """Fork a process that does the work, with its share of the cores where it is not alone."""
    heard, said = multiprocessing.Pipe(duplex=False)
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = max(1, cores // parallel) if parallel > 1 else None
    how = (said, job.path, os.getpid(), threads, work)
    process = multiprocessing.get_context("fork").Process(target=_run, args=how)
    job.state = jobs.RUNNING
    process.start()
    said.close()
    return Running(job, process, heard, time.monotonic(), job.seconds)


def told(number: int | None, running: Sequence[Running]) -> bool:
    """Pass the signal on to the jobs, once."""
    if number is None:
        return False
    for one in running:
        os.kill(one.process.pid, number)
    return True


def hear(running: Sequence[Running]) -> None:
    """Wait a moment for a word or an end."""
    wait([part for one in running for part in (one.process.sentinel, one.heard)], LOOK_SECONDS)
    for one in running:
        one.job.seconds = one.before + time.monotonic() - one.began
        _listen(one)
        if one.word is not None:  # it is about to end
            one.process.join()


def _listen(one: Running) -> None:
    if one.word is None and one.heard.poll():
        try:
            one.word = one.heard.recv()
        except EOFError:  # it ended without
            one.process.join()


def ended(one: Running) -> Any:
    """Note how the job ended; what it returned."""
    _listen(one)  # it may have spoken just before its end
    one.heard.close()
    code = one.process.exitcode
    if one.word is not None:
        code, said, value = one.word
        state = jobs.FINISHED if code == 0 else jobs.FAILED
        if code in STOPPED:  # how to go on is the sweep's to say
            state, said = jobs.INTERRUPTED, str(said).partition(". ")[0]
        one.job.ended(state, said, finished_numbers(one.job.path))
        return value
    if code < 0:
        said = f"killed by {signal.Signals(-code).name}"
        said += ", by hand or for its memory" if -code == signal.SIGKILL else ""
    else:
        said = f"ended with code {code} and no word: see {one.job.path / OUTPUT}"
    one.job.ended(jobs.DIED, said, None)
    return None


def _run(said: Connection, path: Path, parent: int, threads: int | None, work: Any) -> None:
    """The job's process."""
    os.setpgid(0, 0)  # Ctrl-C goes to the sweep, which passes it on once
    _end_with(parent)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, *WARNINGS):
        signal.signal(number, _quit)
    path.mkdir(parents=True, exist_ok=True)
    with (path / OUTPUT).open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    if threads:
        import torch

        torch.set_num_threads(threads)
    value, error = None, None
    try:
        done = work()
        if done.status == JobStatus.COMPLETED:
            value = done.return_value
        else:
            error = done._return_value
    except BaseException as caught:
        error = caught.__cause__ if isinstance(caught.__cause__, Interrupted) else caught
    code, line = (0, None) if error is None else verdict(error)
    if error is not None and is_bug(error):
        traceback.print_exception(error)
    if os.getppid() == parent:
        said.send((code, line, value if isinstance(value, (int, float)) else None))
    sys.exit(code)


def _quit(number: int, frame: Any) -> None:
    raise stopped(number)


def _end_with(parent: int) -> None:
    """Stop this process once the sweep's own is gone. (The kernel's own signal for it comes as
    often as the parent has threads, and the second one would quit without a checkpoint.)"""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
