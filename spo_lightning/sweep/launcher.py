"""A sweeper's jobs in, a process each; how each ended out. ``hydra/launcher=process``.

The libraries are imported once, before the first job, and nothing is computed here: a process
that forks must have no thread pool. What ends a job (an error, a kill, memory) leaves the others.
"""

import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from omegaconf import OmegaConf, open_dict

from spo_lightning.errors import STOPPED, Interrupted, UserError, is_bug, verdict
from spo_lightning.progress import Stop
from spo_lightning.rundir import commit, finished_numbers, words_without_secrets
from spo_lightning.sweep import board, jobs
from spo_lightning.sweep.jobs import Job, Sweep
from spo_lightning.sweep.table import Table, name_of

log = logging.getLogger(__name__)

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


class Processes:
    """The jobs of one sweep, in as many batches as its sweeper gives."""

    sweeps: ClassVar[list[Sweep]] = []  # of this process, for the command that ends it

    def __init__(self, parallel: int, resume: str | None, table: str | None):
        if not isinstance(parallel, int) or parallel < 1:
            raise UserError(f"sweep.parallel={parallel}: it must be at least 1")
        self.parallel, self.resume = parallel, resume
        self.table = None if table is None else Table(Path(table))
        self.names: dict[int, str] = {}  # of the jobs' rows in the table
        self.sweep: Sweep | None = None

    def setup(self, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config
        # before a sweeper begins, which may keep a study beside it
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.sweep is None:
            self.sweep = self._begun()
        composed = {}
        for number, words in enumerate(job_overrides, initial_job_idx):
            job, config = self._job(number, list(words))
            composed[number] = config
            self.sweep.jobs.append(job)
        mine = self.sweep.jobs[-len(job_overrides) :]
        self._refuse_shared()
        earlier = [job for job in mine if self._has_finished(job, composed[job.number])]
        self.sweep.write()
        log.info(
            "%d job%s%s, %d at a time, in %s",
            len(mine),
            "" if len(mine) == 1 else "s",
            f", {len(earlier)} of them finished before" if earlier else "",
            self.parallel,
            self.sweep.directory,
        )
        returned = self._all([job for job in mine if job.state == jobs.WAITING], composed)
        return [
            JobReturn(list(words), status=JobStatus.COMPLETED, _return_value=returned.get(n))
            for n, words in enumerate(job_overrides, initial_job_idx)
        ]

    def _begun(self) -> Sweep:
        directory = Path(self.config.hydra.sweep.dir).absolute()
        if self.resume is None and (directory / jobs.RECORD).exists():
            raise UserError(
                f"{directory} holds a sweep: go on with sweep.resume={directory}, or take another "
                "hydra.sweep.dir"
            )
        self.earlier = jobs.read(directory)["jobs"] if self.resume else []
        words = [word for word in sys.argv[1:] if not word.startswith("sweep.resume=")]
        sweep = Sweep(directory, words, os.getcwd())
        self.sweeps.append(sweep)
        return sweep

    def _job(self, number: int, words: list[str]) -> tuple[Job, Any]:
        """The job and its configuration, composed as Hydra's own launchers do."""
        config = self._composed(number, words)
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # for what the directory's name is made of
        try:
            place = Path(config.hydra.sweep.dir).absolute() / str(config.hydra.sweep.subdir)
            said = list(OmegaConf.to_container(config.hydra.overrides.task))  # type: ignore
        finally:
            HydraConfig.instance().cfg = before
        said = [word for word in said if not word.startswith("sweep.")]
        job = Job(number, words_without_secrets(said), str(place))
        for old in self.earlier:
            if (old.words, old.directory) == (job.words, job.directory):
                job.seconds = old.seconds
        if self.resume and (place / "config.yaml").exists():  # it began: it goes on
            config = self._composed(number, [*words, "ckpt_path=last"])
        return job, config

    def _composed(self, number: int, words: list[str]) -> Any:
        config = self.context.config_loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
        return config

    def _refuse_shared(self) -> None:
        """Two jobs must not write to one directory."""
        assert self.sweep is not None
        seen: dict[str, Job] = {}
        for job in self.sweep.jobs:
            other = seen.setdefault(job.directory, job)
            if other is not job:
                raise UserError(
                    f"jobs {other.number} and {job.number} ({self.sweep.varying(job)}) have one "
                    f"directory, {job.directory}: let hydra.sweep.subdir name what they differ in"
                )

    def _has_finished(self, job: Job, config: Any) -> bool:
        """Whether an earlier try of this sweep did the job, or the table has its row."""
        numbers = finished_numbers(job.path) if self.resume else None
        if self.table is not None:
            self.names[job.number] = name_of(config)
            numbers = numbers or self.table.numbers(self.names[job.number])
        if numbers is None:
            return False
        job.ended(jobs.FINISHED, None, numbers)
        return True

    def _all(self, waiting: Sequence[Job], composed: dict[int, Any]) -> dict[int, Any]:
        """Run them; what each returned, by number. Raises once stopped by a signal."""
        assert self.sweep is not None
        left, running, returned = deque(waiting), [], {}
        stop = Stop()
        if left:
            _import_libraries()
        handlers = stop.install()
        told = False  # the signal, to the jobs that run
        try:
            with board.shown(self.sweep, self.parallel) as look:
                while running or (left and stop.signal is None):
                    while left and len(running) < self.parallel and stop.signal is None:
                        job = left.popleft()
                        running.append(self._start(job, composed[job.number]))
                    told = told or _told(stop, running)
                    _hear(running)
                    for one in [one for one in running if one.process.exitcode is not None]:
                        running.remove(one)
                        returned[one.job.number] = _ended(one)
                        self._noted(one.job)
                    look()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        if stop.signal is not None:
            self.sweep.write()
            raise stop.raised(
                "Go on with: python -m spo_lightning.train sweep.resume="
                + str(self.sweep.directory)
            )
        return returned

    def _noted(self, job: Job) -> None:
        assert self.sweep is not None
        self.sweep.write()
        if self.table is not None and job.state == jobs.FINISHED:
            self.table.add(self.names[job.number], job, commit())

    def _start(self, job: Job, config: Any) -> Running:
        heard, said = multiprocessing.Pipe(duplex=False)
        fork = multiprocessing.get_context("fork")
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
        threads = max(1, cores // self.parallel) if self.parallel > 1 else None
        process = fork.Process(
            target=_run, args=(said, job.path, os.getpid(), threads, self._work(config))
        )
        job.state = jobs.RUNNING
        process.start()
        said.close()
        return Running(job, process, heard, time.monotonic(), job.seconds)

    def _work(self, config: Any) -> Any:
        return lambda: run_job(
            hydra_context=self.context,
            task_function=self.task,
            config=config,
            job_dir_key="hydra.sweep.dir",
            job_subdir_key="hydra.sweep.subdir",
        )


def _import_libraries() -> None:
    import datasets  # noqa: F401
    import lightning  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from spo_lightning import fit, prepare  # noqa: F401


def _told(stop: Stop, running: Sequence[Running]) -> bool:
    """Pass Ctrl-C on to the jobs, once; SIGTERM is passed on by ``Stop``."""
    if stop.signal != signal.SIGINT:
        return False
    for one in running:
        os.kill(one.process.pid, signal.SIGINT)
    return True


def _hear(running: Sequence[Running]) -> None:
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


def _ended(one: Running) -> Any:
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
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else _quit)
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
    raise Interrupted(128 + number, f"stopped by {signal.Signals(number).name}")


def _end_with(parent: int) -> None:
    """Stop this process once the sweep's own is gone. (The kernel's own signal for it comes as
    often as the parent has threads, and the second one would quit without a checkpoint.)"""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
