"""A training run from outside: what is checked before its stages, its directory, how it ends."""

import inspect
import logging
import math
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built, one_line
from spo_lightning.errors import STOPPED, Lost, UserError, verdict
from spo_lightning.records import loggers
from spo_lightning.records.directory import RunDir, cut_after
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.run.record import Begun, Read, Referenced, walk
from spo_lightning.world import World

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.data.rows import Task
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.held_out import HeldOut
    from spo_lightning.training.fit import GoesOn

log = logging.getLogger(__name__)


def train(
    cfg: "DictConfig", run_dir: Path, choices: Mapping[str, str], world: World
) -> dict[str, Any]:
    """What one process of a run does, from its first file to its last; what metrics.json holds."""
    run, stop = RunDir(run_dir, writes=world.first), Stop()
    how = f"Go on with: python -m spo_lightning.train ckpt_path=last hydra.run.dir={run_dir}"
    study = cfg.get("study") is not None
    if study:
        how = "A study starts from its beginning"
    if cfg.ckpt_path is None:
        run.refuse_used()
    run.start(cfg, choices, cfg.max_steps)
    stages = Stages(run.note, stop, how, world)
    before = stop.install()
    try:
        numbers = _study(cfg, run, stages) if study else _run(cfg, run, choices, stages)
    except BaseException as error:
        ended = world.reason(error)
        if isinstance(ended, Lost) and stop.signal is not None:  # the others heard it first
            ended = stop.raised(how)
        _note(run, ended, how)
        if ended is error:
            raise
        raise ended from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    run.note_status(state="finished", stage="done")
    loggers.close(run.path, 0)
    return numbers


def _note(run: RunDir, error: BaseException, how: str) -> None:
    """What the directory and the loggers keep of a run that ends of an error."""
    code, message = verdict(error)
    stopped = code in STOPPED
    run.note_status(state="interrupted" if stopped else "failed", error=message)
    if code == 2:
        run.withdraw()
    loggers.close(run.path, code)
    if run.last.exists() and not stopped and (code != 2 or run.stage == "training"):
        log.error("The last good checkpoint is %s. %s", run.last, how)


def _study(cfg: "DictConfig", run: RunDir, stages: Stages) -> dict[str, Any]:
    """An experiment without a language model: its numbers, then what its report makes of them."""
    study = built(cfg.study)
    log.info("Run directory: %s", run.path)
    run.note_status(max_steps=study.total)
    with stages.stage("training", study.total) as advance:
        numbers = study.run(run.path, advance)
    stages.note("report", 0, 1)
    for path in study.report(run.path):
        log.info("Written: %s", path)
    run.checkpoints.rmdir()  # a study has none
    return numbers


def _run(
    cfg: "DictConfig", run: RunDir, choices: Mapping[str, str], stages: Stages
) -> dict[str, Any]:
    from spo_lightning.run.stages import DATA, after_data

    at = walk([DATA], Begun(cfg, stages.world, stages, {}))
    job = opened(cfg, run, choices)
    walk(after_data(job), at)
    return job.numbers


def prepared(cfg: "DictConfig", task: "Task", stages: Stages, world: World) -> "Referenced":
    """What training works on, of rows that are there already: for who only times it."""
    from spo_lightning.run import stages as own

    record: Any = Read(cfg, world, stages, {}, task)
    for stage in (own.policy, own.warm_start, own.pairs, own.tokens, own.reference):
        record = stage(record)
    return record


@dataclass(frozen=True)
class Job:
    """A run whose settings have been checked."""

    cfg: "DictConfig"
    run: RunDir
    choices: Mapping[str, str]
    loss: Any
    solver: Any
    goes_on: "GoesOn | None"  # None: from the beginning
    numbers: dict[str, Any]  # what metrics.json holds

    def steps(self, train: "Pairs") -> int:
        """Outer steps of preference training."""
        if self.cfg.max_steps >= 0:
            return self.cfg.max_steps
        return math.ceil(self.cfg.epochs * len(train) / self.cfg.batch_size)

    def begin(self, before: "HeldOut", seconds: dict[str, float]) -> None:
        """metrics.json holds the start's numbers as soon as they are known."""
        first = {"init": before.numbers, "final": None, "choices": dict(self.choices)}
        self.numbers.update({**first, "steps": 0, "seconds": seconds})
        self.run.note_metrics(self.numbers)

    def end(self, after: "HeldOut", steps: int, samples: Sequence[Mapping[str, Any]]) -> None:
        """What is left to be read: numbers, answers before and after, a table in the terminal."""
        from spo_lightning.report.table import run_table

        self.numbers.update({"final": after.numbers, "steps": steps})
        self.run.note_metrics(self.numbers)
        self.run.note_samples(samples)
        if self.run.writes:
            loggers.tell(self.run.path, self.numbers, samples)
        log.info("\n%s\n", run_table(self.numbers))
        log.info("Model: %s", self.run.model)
        log.info("Numbers and samples: %s", self.run.path)


def opened(cfg: "DictConfig", run: RunDir, choices: Mapping[str, str]) -> Job:
    """Everything that can be refused before something slow is begun."""
    from spo_lightning.models.device import set_threads
    from spo_lightning.models.policy import source_of

    for where in (cfg.model.pretrained, cfg.model.reference):
        if where is not None:
            source_of(where)
    set_threads(cfg.hardware)
    quiet()
    loss, solver = objective(cfg)
    goes_on = _checkpoint(cfg, run)
    log.info("Run directory: %s", run.path)
    return Job(cfg, run, choices, loss, solver, goes_on, {})


def objective(cfg: "DictConfig") -> tuple[Any, Any]:
    """The loss and the solver; the optimizer too, of one parameter that nobody trains."""
    import torch
    from omegaconf import OmegaConf

    from spo_lightning.training.fit import optimizer_of

    built({"_target_": cfg.optimizer._target_, "_partial_": True})  # is it installed?
    try:
        optimizer_of(cfg)([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        said = one_line(error).rstrip(".")
        raise UserError(f"optimizer: {said}; see conf/optimizer for its keys") from error
    try:
        node: Any = OmegaConf.to_container(cfg.loss, resolve=True)
        node.pop("unit")
        loss, solver = built(node), built(cfg.solver)
        # a partial takes any keyword until it is called, and that is after the warm start
        inspect.signature(loss.func).bind_partial(**loss.keywords)
        return loss, solver
    except TypeError as error:
        raise UserError(f"loss: {error}; see conf/loss for its keys") from error


def _checkpoint(cfg: "DictConfig", run: RunDir) -> "GoesOn | None":
    """The file to go on from; rows of metrics.csv later than it are cut."""
    import torch

    from spo_lightning.training.fit import GoesOn

    where = cfg.ckpt_path
    if where is None:
        return None
    path = run.last if where == "last" else Path(where)
    if not path.exists():
        if where != "last":
            raise UserError(f"ckpt_path={where}: no such file")
        log.info("No checkpoint yet in %s: starting from the beginning", run.path)
        if run.writes:
            (run.path / "metrics.csv").unlink(missing_ok=True)
        return None
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        done = found["spo_lightning"]["outer_step"]
    except Exception as error:
        raise UserError(f"ckpt_path={path}: no checkpoint of ours ({error})") from error
    if run.writes:
        cut_after(run.path / "metrics.csv", done)
    log.info("Going on from outer step %d of %s", done, path)
    return GoesOn(path, done, found["state_dict"])
