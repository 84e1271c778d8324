"""A training run in one process: its stages in order, its directory, and how it ends."""

import logging
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built
from spo_lightning.config.studies import goes_on
from spo_lightning.errors import STOPPED, Lost, UserError, verdict
from spo_lightning.records import loggers
from spo_lightning.records.directory import RunDir
from spo_lightning.records.lock import held
from spo_lightning.records.progress import Stages, Stop
from spo_lightning.run import images
from spo_lightning.run.job import Job, opened, refuse_processes, refuse_rows, refuse_to_compare
from spo_lightning.run.judging import refuse_to_judge
from spo_lightning.run.record import Begun, Read, Referenced, Stage, walk
from spo_lightning.run.stages import (
    data,
    final,
    init,
    pairs,
    policy,
    reference,
    report,
    save,
    tokens,
    training,
    warm_start,
)
from spo_lightning.world import World

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.data.rows import Task

log = logging.getLogger(__name__)

ROWS, SHARED, KEPT = "a pass over the rows", "once for all runs", "what was kept stays"
DATA = Stage("data", data, ROWS, "reads again")
BEFORE_TRAINING = [
    Stage("policy", policy, "a model's load", "loads again"),
    Stage("warm start", warm_start, f"sft.max_steps of SFT, {SHARED}", "begins again"),
    Stage("pairs", pairs, f"data.samples answers a prompt, {SHARED}", "draws again"),
    Stage("tokens", tokens, f"{ROWS}, {SHARED}", KEPT),
    Stage("reference", reference, f"a forward of every pair, {SHARED}", KEPT),
]


def after_data(job: Job) -> list[Stage]:
    """All others: name, work, what it costs, how a run goes on that was killed in it."""
    look, again = "forwards and answers", "measures again"
    return [
        *BEFORE_TRAINING,
        Stage("held-out: init", partial(init, job), look, again),
        Stage("training", partial(training, job), "max_steps", "from its last checkpoint"),
        Stage("held-out: final", final, look, again),
        Stage("save", partial(save, job), "a model's write", "writes again"),
        Stage("report", partial(report, job), "nothing", "writes again"),
    ]


def train(
    cfg: "DictConfig",
    run_dir: Path,
    choices: Mapping[str, str],
    world: World,
    how: str | None = None,
) -> dict[str, Any]:
    """What one process of a run does, from its first file to its last; what metrics.json holds.

    ``how``: what a user who stops it is told to go on with, where that is no command of ours.
    """
    run = RunDir(run_dir, writes=world.first)
    own = f"Go on with: python -m spo_lightning.train ckpt_path=last hydra.run.dir={run_dir}"
    how = how or own
    if not goes_on(cfg):
        how = "A study starts from its beginning"
    stages = Stages(run.note, Stop(), how, world)
    with held(run.path) if world.first else nullcontext():
        if cfg.ckpt_path is None:
            from spo_lightning.evaluation.each_pair import free_for_pairs

            run.refuse_used()
            theirs = run.path / "pairs.jsonl"
            if cfg.eval.get("pairs") != "off" and not free_for_pairs(theirs):
                raise UserError(
                    f"{theirs} is a file of yours, and the run writes one of that name: take "
                    "another hydra.run.dir, or eval.pairs=off"
                )
        run.start(cfg, choices, cfg.max_steps)
        return _written(cfg, run, choices, stages)


def _written(
    cfg: "DictConfig", run: RunDir, choices: Mapping[str, str], stages: Stages
) -> dict[str, Any]:
    """The run's work in its directory; how it ended is noted there."""
    study, stop = cfg.get("study") is not None, stages.stop
    with stop.listening():
        try:
            numbers = _study(cfg, run, stages) if study else _run(cfg, run, choices, stages)
        except BaseException as error:
            ended = stages.world.reason(error)
            if isinstance(ended, Lost) and stop.signal is not None:  # the others heard it first
                ended = stop.raised(stages.how_to_go_on)
            _note(run, ended, stages.how_to_go_on)
            if ended is error:
                raise
            raise ended from error
    run.note_status(state="finished", stage="done")
    loggers.close(run.path, 0)
    return numbers


def _note(run: RunDir, error: BaseException, how: str) -> None:
    """What the directory and the loggers keep of a run that ends of an error."""
    code, message = verdict(error)
    stopped = code in STOPPED
    run.note_end("interrupted" if stopped else "failed", message)
    if code == 2:
        run.withdraw()
    loggers.close(run.path, code)
    if run.last.exists() and not stopped and (code != 2 or run.stage in ("training", "judging")):
        log.error("The last good checkpoint is %s. %s", run.last, how)


def _study(cfg: "DictConfig", run: RunDir, stages: Stages) -> dict[str, Any]:
    """An experiment without a language model: its numbers, then what its report makes of them."""
    if cfg.ckpt_path not in (None, "last"):
        raise UserError(
            f"ckpt_path={cfg.ckpt_path}: this experiment goes on in its own directory: "
            "ckpt_path=last with that hydra.run.dir"
        )
    study, pace = built(cfg.study), {}
    if goes_on(cfg):
        pace = {"log_every": cfg.log.every_n_steps}
        pace["checkpoint_every"] = cfg.checkpoint.every_n_steps
    log.info("Run directory: %s", run.path)
    run.note_status(max_steps=study.total)
    with stages.stage("training", study.total) as advance:
        numbers = study.run(run.path, advance, **pace)
    stages.note("report", 0, 1)
    for path in study.report(run.path):
        log.info("Written: %s", path)
    if not any(run.checkpoints.iterdir()):
        run.checkpoints.rmdir()
    return numbers


def _run(
    cfg: "DictConfig", run: RunDir, choices: Mapping[str, str], stages: Stages
) -> dict[str, Any]:
    refuse_processes(cfg, stages.world)
    if cfg.data.get("images"):
        return _of_images(cfg, run, choices, stages)
    at = walk([DATA], Begun(cfg, stages.world, stages, {}))
    refuse_to_compare(cfg, at.task)
    refuse_to_judge(cfg, at.task)
    if at.task.layout is not None and "layout" in cfg.data:
        run.keep("data.layout", at.task.layout)  # a run that goes on reads its rows the same way
    job = opened(cfg, run, choices, stages.world)
    refuse_rows(job.loss, at.task)
    walk(after_data(job), at)
    return job.numbers


def _of_images(
    cfg: "DictConfig", run: RunDir, choices: Mapping[str, str], stages: Stages
) -> dict[str, Any]:
    """The same of a policy that draws."""
    at = walk([images.DATA], Begun(cfg, stages.world, stages, {}))
    job = opened(cfg, run, choices, stages.world)
    images.refuse(job.loss)
    walk(images.after_data(job), at)
    return job.numbers


def prepared(cfg: "DictConfig", task: "Task", stages: Stages, world: World) -> "Referenced":
    """What training works on, of rows that are there already: for who only times it."""
    return walk(BEFORE_TRAINING, Read(cfg, world, stages, {}, task))
