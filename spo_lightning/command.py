"""One wrapper around every command: finds the configuration, runs the work, sets the exit code.

0 done; 1 failure; 2 the user's error, Hydra's refusals included; 3 a sweep with failed jobs;
130 Ctrl-C; 143 SIGTERM, SIGUSR1 or SIGUSR2.
"""

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.config.build import one_line
from spo_lightning.errors import PIPE, STOPPED, UserError, is_bug, verdict
from spo_lightning.records import terminal

HERE = Path(__file__).resolve().parent
# the wheel's copy first: beside an installed package a stranger's conf may lie
CONF = str(next(p for p in (HERE / "conf", HERE.parent / "conf") if p.is_dir()))

NAMED = re.compile(r"data\.(\S+\.)?eval_path\.[^=]+=")

log = logging.getLogger(__name__)


def run(config_name: str, work: Callable[..., Any], *, together: bool = False) -> None:
    """Compose ``config_name`` with the command line, do the work once or per job, and exit.

    ``together``: of several processes that torchrun or srun began, all do the work of the first,
    which alone reads the command line; otherwise the others have nothing to do.
    """
    from spo_lightning.run import processes

    if processes.follows():
        sys.exit(processes.follow() if together else 0)
    _prepare()
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from spo_lightning.config import knobs
    from spo_lightning.records import directory as rundir

    failures: list[BaseException] = []
    failed_jobs: list[str] = []  # of a sweep, one line each
    mine = os.getpid()

    @hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)
    def job(cfg: Any) -> Any:
        settings = HydraConfig.get()
        rundir.remove_secrets(Path(settings.sweep.dir) / "multirun.yaml")  # Hydra's, of a sweep
        try:
            return work(cfg, Path(settings.runtime.output_dir), knobs.given())
        except BaseException as error:  # one job's end must not end the sweep
            code, message = verdict(error)
            words: Any = OmegaConf.to_container(settings.overrides.task)  # one may hold a ${...}
            said = " ".join(rundir.words_without_secrets(words))
            number = settings.job.num if settings.mode == RunMode.MULTIRUN else 0
            told = f"job {number} ({said}) failed: {message}"
            if os.getpid() != mine:  # a launcher's process, which hands the error on
                log.error("%s", message)
                error.add_note(told)
                raise
            failures.append(error)
            if code in STOPPED:
                raise KeyboardInterrupt from error  # also the end of a sweep
            if settings.mode == RunMode.MULTIRUN:
                log.error("%s", message, exc_info=error if is_bug(error) else None)
                failed_jobs.append(told)
            return None

    _whole(job, failures, failed_jobs)
    finish(failures, failed_jobs)


def _prepare() -> None:
    """What Hydra must find before it begins."""
    terminal.guard()
    logging.raiseExceptions = False  # train.log on a full disk loses its lines, not the run
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra exits 1 over several lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|peft|transformers|wandb)")
    from omegaconf import OmegaConf

    from spo_lightning.sweep import PLUGINS

    OmegaConf.register_new_resolver(
        "run_id", lambda: os.urandom(2).hex(), use_cache=True, replace=True
    )
    sys.path.append(PLUGINS)  # with our launcher


def begun_with(several: bool) -> list[str]:
    """The words that ``resume=DIR`` finds again; ``several``: of one job of -m, which is gone on
    with alone."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    own: Any = OmegaConf.to_container(HydraConfig.get().overrides.task)
    return [word for word in (own if several else sys.argv[1:]) if not word.startswith("resume=")]


def named(words: Sequence[str]) -> list[str]:
    """The words as Hydra wants those whose key ends in a name of the user's: with a sign."""
    return [f"++{word}" if NAMED.match(word) else word for word in words]


def _whole(job: Callable[[], Any], failures: list[BaseException], failed_jobs: list[str]) -> None:
    """The command, whatever ends it; a sweep's table."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from spo_lightning.sweep import again
    from spo_lightning.sweep.launcher import Processes

    try:
        sys.argv[1:] = named(again.words(sys.argv[1:]))
        job()
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(UserError(one_line(error)))
    except OSError as error:  # of Hydra's own work: the jobs' are caught above
        failures.append(UserError(f"cannot write the run directory: {error}"))
    except KeyboardInterrupt as error:
        failures.append(error.__cause__ or error)
    except Exception as error:  # of a launcher, or of a job in one of its processes
        failures.append(error)
        failed_jobs += getattr(error, "__notes__", [])
    for sweep in (sweep for sweep in Processes.sweeps if sweep.jobs):
        print(f"\n{sweep.table()}\n\nRuns: {sweep.directory}")
        failed_jobs += [
            f"job {one.number} ({sweep.varying(one)}) {one.state}: {one.error}"
            for one in sweep.failed
        ]
        if sweep.reported and any(job.path.exists() for job in sweep.jobs):
            from spo_lightning.report.build import attempted

            print(attempted(sweep.directory))


def finish(failures: Sequence[BaseException], failed_jobs: Sequence[str]) -> None:
    """Exit as section 8 of the design says; a bug shows its traceback."""
    error = next((e for e in failures if verdict(e)[0] in STOPPED), next(iter(failures), None))
    code, message = verdict(error) if error is not None else (0, "")
    for line in failed_jobs:
        print(line, file=sys.stderr)
    if failed_jobs and code not in STOPPED:
        sys.exit(3)
    if error is None:
        return
    if is_bug(error):
        traceback.print_exception(error)
    if code != PIPE:
        print(f"error: {message}" if code in (1, 2) else message, file=sys.stderr)
    sys.exit(code)
