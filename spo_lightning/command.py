"""One wrapper around every command: finds the configuration, runs the work, sets the exit code.

0 done; 1 failure; 2 the user's error, Hydra's refusals included; 3 a sweep with failed jobs;
130 Ctrl-C; 143 SIGTERM.
"""

import logging
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.errors import Diverged, Interrupted, UserError

STOPPED = (130, 143)
HERE = Path(__file__).resolve().parent
# the wheel's copy first: beside an installed package a stranger's conf may lie
CONF = str(next(p for p in (HERE / "conf", HERE.parent / "conf") if p.is_dir()))

log = logging.getLogger(__name__)


def run(config_name: str, work: Callable[..., Any]) -> None:
    """Compose ``config_name`` with the command line, do the work once or per job, and exit."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra exits 1 over several lines
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"(lightning|torch|peft|wandb)")
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from spo_lightning import knobs, rundir

    OmegaConf.register_new_resolver(
        "run_id", lambda: os.urandom(2).hex(), use_cache=True, replace=True
    )
    failures: list[BaseException] = []
    failed_jobs: list[str] = []  # of a sweep, one line each

    @hydra.main(version_base="1.3", config_path=CONF, config_name=config_name)
    def job(cfg: Any) -> Any:
        settings = HydraConfig.get()
        rundir.remove_secrets(Path(settings.sweep.dir) / "multirun.yaml")  # Hydra's, of a sweep
        try:
            return work(cfg, Path(settings.runtime.output_dir), knobs.given())
        except BaseException as error:  # one job's end must not end the sweep
            failures.append(error)
            code, message = verdict(error)
            if code in STOPPED:
                raise KeyboardInterrupt from error  # also the end of a sweep
            if settings.mode != RunMode.RUN:
                log.error("%s", message, exc_info=error if _is_bug(error) else None)
                said = " ".join(rundir.without_secrets(list(settings.overrides.task)))
                failed_jobs.append(f"job {settings.job.num} ({said}) failed: {message}")
            return None

    try:
        job()
    except (HydraException, OmegaConfBaseException) as error:
        failures.append(UserError(one_line(error)))
    except OSError as error:  # of Hydra's own work: the jobs' are caught above
        failures.append(UserError(f"cannot write the run directory: {error}"))
    except KeyboardInterrupt as error:
        failures.append(error.__cause__ or error)
    finish(failures, failed_jobs)


def one_line(error: BaseException) -> str:
    """A Hydra refusal as one line: what it says first, then its cause."""
    lines = [part.strip() for part in str(error).splitlines() if part.strip()]
    noise = ("full_key:", "object_type=", "Set the env", "See https://hydra.cc")
    kept = [x for x in lines if not x.startswith(noise)]
    where = [x for x in lines if x.startswith("full_key:")]
    text = " ".join(kept[:6] + where)
    override = getattr(error, "override", None)  # of Hydra's parser, which names it in some cases
    if override and override not in text:
        text = f"{override}: {text}"
    cause = error.__cause__
    if cause is not None and str(cause) and str(cause).splitlines()[0] not in text:
        text += f": {one_line(cause)}"
    return text


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and its causes."""
    seen: BaseException | None = error
    while seen is not None:
        yield seen
        seen = seen.__cause__


def verdict(error: BaseException) -> tuple[int, str]:
    """Exit code and one line for what ended the work."""
    for cause in chain(error):
        if isinstance(cause, Interrupted):
            return cause.code, str(cause)
        if isinstance(cause, UserError):
            return 2, " ".join(str(cause).split())
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted"
    text = str(error).splitlines()[0] if str(error) else ""
    return 1, text if isinstance(error, Diverged) else f"{type(error).__name__}: {text}"


def _is_bug(error: BaseException) -> bool:
    return verdict(error)[0] == 1 and not isinstance(error, Diverged)


def finish(failures: Sequence[BaseException], failed_jobs: Sequence[str]) -> None:
    """Exit as section 8 of the design says; a bug shows its traceback."""
    if not failures:
        return
    error = next((e for e in failures if verdict(e)[0] in STOPPED), failures[0])
    code, message = verdict(error)
    for line in failed_jobs:
        print(line, file=sys.stderr)
    if failed_jobs and code not in STOPPED:
        sys.exit(3)
    if _is_bug(error):
        traceback.print_exception(error)
    print(f"error: {message}" if code in (1, 2) else message, file=sys.stderr)
    sys.exit(code)
