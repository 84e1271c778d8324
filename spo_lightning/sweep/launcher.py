"""A sweeper's jobs in, a process each; how each ended out. ``hydra/launcher=process``.

The libraries are imported once, before the first job, and nothing is computed here: a process
that forks must have no thread pool. What ends a job (an error, a kill, memory) leaves the others.
"""

import logging
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, ClassVar

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn, JobStatus, configure_log, run_job, setup_globals
from omegaconf import open_dict

from spo_lightning.config.knobs import defaults_of
from spo_lightning.config.studies import goes_on
from spo_lightning.errors import UserError
from spo_lightning.records.directory import (
    commit,
    finished_numbers,
    remove_secrets,
    words_without_secrets,
)
from spo_lightning.records.lock import locked
from spo_lightning.records.progress import Stop
from spo_lightning.sweep import board, jobs, process
from spo_lightning.sweep.composing import Checking, is_numbered, of_the_task
from spo_lightning.sweep.jobs import Job, Sweep
from spo_lightning.sweep.objective import score
from spo_lightning.sweep.table import Table, name_of

log = logging.getLogger(__name__)

PATIENCE_SECONDS = 20.0  # with jobs of a sweep that was killed, which end after their step


class Processes:
    """The jobs of one sweep, in as many batches as its sweeper gives."""

    sweeps: ClassVar[list[Sweep]] = []  # of this process, for the command that ends it

    def __init__(
        self, parallel: int, resume: str | None, table: str | None, numbers: Sequence[str]
    ):
        if not isinstance(parallel, int) or parallel < 1:
            raise UserError(f"sweep.parallel={parallel}: it must be at least 1")
        self.parallel, self.resume = parallel, resume
        self.table = None if table is None else Table(Path(table), numbers)
        self.composed: dict[int, Any] = {}  # by number, where the sweep itself had to
        self.names: dict[int, str] = {}  # of the jobs' rows in the table
        self.sweep: Sweep | None = None

    def setup(self, hydra_context: Any, task_function: Any, config: Any) -> None:
        self.context, self.task, self.config = hydra_context, task_function, config
        self.checking = Checking(hydra_context.config_loader)
        hydra_context.config_loader = self.checking  # the sweeper begins after this
        self.numbered = is_numbered(config)
        # before a sweeper begins, which may keep a study beside it
        Path(config.hydra.sweep.dir).mkdir(parents=True, exist_ok=True)

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        setup_globals()
        configure_log(self.config.hydra.hydra_logging, self.config.hydra.verbose)
        if self.sweep is None:
            self.sweep = self._begun()
            remove_secrets(self.sweep.directory / "multirun.yaml")  # Hydra's
        given = dict(enumerate(map(list, job_overrides), initial_job_idx))
        mine = [self._job(number, words) for number, words in given.items()]
        self.sweep.jobs += mine
        self._refuse_shared()
        earlier = [job for job in mine if self._has_finished(job, given[job.number])]
        self.sweep.write()
        log.info(
            "%d job%s%s, %d at a time, in %s",
            len(mine),
            "" if len(mine) == 1 else "s",
            f", {len(earlier)} of them finished before" if earlier else "",
            self.parallel,
            self.sweep.directory,
        )
        returned = {job.number: self._valued(job) for job in earlier}
        returned |= self._all([job for job in mine if job.state == jobs.WAITING], given)
        return [
            JobReturn(words, status=JobStatus.COMPLETED, _return_value=returned.get(n))
            for n, words in given.items()
        ]

    def _begun(self) -> Sweep:
        directory = Path(self.config.hydra.sweep.dir).absolute()
        if self.resume is None and (directory / jobs.RECORD).exists():
            raise UserError(
                f"{directory} holds a sweep: go on with sweep.resume={directory}, or take another "
                "hydra.sweep.dir"
            )
        if self.resume and not self.config.hydra.sweeper._target_.endswith("BasicSweeper"):
            raise UserError(
                "sweep.resume goes on with a grid; a search goes on when its command is given "
                "again, with what its study has kept"
            )
        self.alone = alone(directory)
        self.earlier = jobs.read(directory)["jobs"] if self.resume else []
        words = [word for word in sys.argv[1:] if not word.startswith("sweep.resume=")]
        sweep = Sweep(directory, words, os.getcwd(), reported=self.config.report.enabled)
        self.sweeps.append(sweep)
        return sweep

    def _job(self, number: int, words: list[str]) -> Job:
        if self.numbered:
            place = Path(self.config.hydra.sweep.dir).absolute() / str(number)
        else:
            place = self._named(self._kept(number, words))
        job = Job(number, words_without_secrets(of_the_task(words)), str(place))
        for old in self.earlier:
            if old.directory == job.directory:
                _refuse_another(job, old)
                job.seconds = old.seconds
        return job

    def _named(self, config: Any) -> Path:
        before = HydraConfig.instance().cfg
        HydraConfig.instance().set_config(config)  # for what the directory's name is made of
        try:
            return Path(config.hydra.sweep.dir).absolute() / str(config.hydra.sweep.subdir)
        finally:
            HydraConfig.instance().cfg = before

    def _kept(self, number: int, words: list[str]) -> Any:
        """Composed once, by whoever asks first: the sweep, or else the job's own process."""
        if number not in self.composed:
            self.composed[number] = self._composed(number, words)
        return self.composed[number]

    def _compose_ahead(self, job: Job, given: dict[int, list[str]]) -> None:
        """While others run, so that the next job need not begin with it."""
        with suppress(Exception):  # it comes again in the job, whose it is
            self._kept(job.number, given[job.number])

    def _composed(self, number: int, words: list[str]) -> Any:
        """A job's configuration, as Hydra's own launchers make it."""
        config = self.checking.loader.load_sweep_config(self.config, words)
        with open_dict(config):
            config.hydra.job.id = str(number)
            config.hydra.job.num = number
            config.report.enabled = False  # one page for all
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

    def _has_finished(self, job: Job, words: list[str]) -> bool:
        """Whether an earlier try of this sweep did the job, or the table has its row."""
        numbers = finished_numbers(job.path) if self.resume else None
        if self.table is not None:
            self.names[job.number] = name_of(self._kept(job.number, words))
            known = self.table.numbers(self.names[job.number])
            if known is None and numbers is not None:  # killed between its end and its row
                job.ended(jobs.FINISHED, None, numbers)
                self.table.add(self.names[job.number], job, commit())
            numbers = numbers or known
        if numbers is None:
            return False
        job.ended(jobs.FINISHED, None, numbers)
        return True

    def _valued(self, job: Job) -> float | None:
        """What a job that is not run again returns to its sweeper."""
        rule = self.config.sweep.objective
        return None if rule is None else score(job.numbers, **rule)

    def _all(self, waiting: Sequence[Job], given: dict[int, list[str]]) -> dict[int, Any]:
        """Run them; what each returned, by number. Raises once stopped by a signal."""
        assert self.sweep is not None
        left, running, returned = deque(waiting), [], {}
        stop = Stop()
        if left:
            _import_libraries()
        told = False  # the signal, to the jobs that run
        with stop.listening(), board.shown(self.sweep, self.parallel) as look:
            while running or (left and stop.signal is None):
                while left and len(running) < self.parallel and stop.signal is None:
                    job = left.popleft()
                    work = self._work(job, given[job.number])
                    running.append(process.begun(job, self.parallel, work))
                if left and len(running) == self.parallel:
                    self._compose_ahead(left[0], given)
                told = told or process.told(stop.signal, running)
                process.hear(running)
                for one in [one for one in running if one.process.exitcode is not None]:
                    running.remove(one)
                    returned[one.job.number] = process.ended(one)
                    self._noted(one.job)
                look()
        if stop.signal is not None:
            self.sweep.write()
            again = f"python -m spo_lightning.train sweep.resume={self.sweep.directory}"
            if self.config.sweep.objective is not None:
                again = "the same command: the search goes on with what its study has kept"
            raise stop.raised(f"Go on with: {again}")
        return returned

    def _noted(self, job: Job) -> None:
        assert self.sweep is not None
        self.sweep.write()
        if self.table is not None and job.state == jobs.FINISHED:
            self.table.add(self.names[job.number], job, commit())

    def _work(self, job: Job, words: list[str]) -> Any:
        """What the job's own process does."""
        # of all jobs with the same options, before the fork
        defaults_of(self.config.hydra.job.config_name, self.checking.options(words))

        def work() -> JobReturn:
            config = self._kept(job.number, words)
            begun = self.resume and (job.path / "config.yaml").exists()
            if begun and goes_on(config):
                config = self._composed(job.number, [*words, "ckpt_path=last"])
            return run_job(
                hydra_context=self.context,
                task_function=self.task,
                config=config,
                job_dir_key="hydra.sweep.dir",
                job_subdir_key="hydra.sweep.subdir",
            )

        return work


def alone(directory: Path) -> IO[str]:
    """A file whose lock this process and its jobs hold until the last of them has ended.

    So a sweep that is gone on with waits for jobs whose own sweep was killed.
    """
    file = (directory / ".lock").open("w")
    patience = time.monotonic() + PATIENCE_SECONDS
    while True:
        if locked(file) is not False:  # or there are no locks
            return file
        if time.monotonic() > patience:
            raise UserError(f"{directory}: a sweep is running there: wait for it")
        time.sleep(0.2)


def _refuse_another(job: Job, old: Job) -> None:
    """A sweep goes on with the jobs it has: the numbers of one are not another's."""
    if old.meaning != job.meaning:
        said = " ".join(sorted({*job.meaning} ^ {*old.meaning}))
        raise UserError(
            f"sweep.resume: job {job.number} in {job.directory} is another one than it was "
            f"({said}): go on with the same words, or begin a new sweep"
        )


def _import_libraries() -> None:
    """What every job would import by itself, before the fork that hands it on."""
    import datasets  # noqa: F401
    import lightning  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401

    from spo_lightning.cache import reference  # noqa: F401
    from spo_lightning.data import load  # noqa: F401
    from spo_lightning.evaluation import text_metrics  # noqa: F401
    from spo_lightning.run import stages, training  # noqa: F401
    from spo_lightning.sampling import pairing  # noqa: F401
    from spo_lightning.training import fit  # noqa: F401
