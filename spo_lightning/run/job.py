"""What a training run is asked for, checked before its stages, and what it leaves to be read."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built, one_line
from spo_lightning.errors import UserError
from spo_lightning.records import checkpoints, loggers
from spo_lightning.records.directory import RunDir, cut_after
from spo_lightning.records.progress import quiet
from spo_lightning.records.summary import run_table
from spo_lightning.world import World

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.data.rows import Task
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.held_out import HeldOut
    from spo_lightning.training.fit import GoesOn

log = logging.getLogger(__name__)


# keys of what compares two answers of a row
COMPARING = (
    *(f"diagnostics.{name}.every_n_steps" for name in ("evolution", "geometry", "ches")),
    *("data.drop_high_ches", "loss.wpo"),
)


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
        from spo_lightning.training.feed import outer_steps

        return outer_steps(self.cfg, len(train))

    def begin(self, before: "HeldOut", seconds: dict[str, float]) -> None:
        """metrics.json holds the start's numbers as soon as they are known."""
        first = {"init": before.told, "final": None, "choices": dict(self.choices)}
        self.numbers.update({**first, "steps": 0, "seconds": seconds})
        self.run.note_metrics(self.numbers)

    def end(
        self,
        after: "HeldOut",
        steps: int,
        samples: Sequence[Mapping[str, Any]],
        pairs: Sequence[Mapping[str, Any]],
    ) -> None:
        """What is left to be read: numbers, answers before and after, every pair's numbers, a
        table in the terminal."""
        self.numbers.update({"final": after.told, "steps": steps})
        self.run.note_metrics(self.numbers)
        self.run.note_rows("samples.jsonl", samples)
        if pairs:
            self.run.note_rows("pairs.jsonl", pairs)
        if self.run.writes:
            loggers.tell(self.run.path, self.numbers, samples)
        log.info("\n%s\n", run_table(self.numbers))
        log.info("Model: %s", self.run.model)
        log.info("Numbers and samples: %s", self.run.path)


def opened(cfg: "DictConfig", run: RunDir, choices: Mapping[str, str], world: World) -> Job:
    """Everything that can be refused before something slow is begun."""
    from spo_lightning.losses import asks
    from spo_lightning.models.device import set_threads
    from spo_lightning.models.sources import check_sources

    if not cfg.data.get("images"):  # a pipeline is a directory of several models
        check_sources(cfg.model)
    set_threads(cfg.hardware)
    quiet()
    loss, solver = objective(cfg)
    if "similarity" in cfg.loss:
        from spo_lightning.models.sentences import Sentences

        Sentences.of(cfg.loss, world.device)
    if asks(loss, "kl") and cfg.batch_size < 2:
        raise UserError(
            "batch_size=1: this loss reads each prompt with the answer of another row of the "
            "batch: raise it"
        )
    refuse_sync(cfg, loss)
    goes_on = _checkpoint(cfg, run, world)
    log.info("Run directory: %s", run.path)
    return Job(cfg, run, choices, loss, solver, goes_on, {})


def refuse_sync(cfg: "DictConfig", loss: Any) -> None:
    """A reference that moves, where none is read or none may."""
    from spo_lightning.losses import asks

    how, every = cfg.model.get("reference_sync"), cfg.model.get("sync", {}).get("every_n_steps")
    if how is None:
        return
    whole, key = asks(loss, "divergences"), f"model.reference_sync={how}"
    if cfg.model.reference is not None:
        raise UserError(f"{key} moves the policy's own start: leave model.reference out")
    if whole or not (asks(loss, "reference") or asks(loss, "beside")):
        why = "reads the reference's distributions" if whole else "reads no reference"
        raise UserError(f"{key}: this loss {why}: leave it out, or take another loss")
    if 0 <= cfg.max_steps <= every:
        raise UserError(
            f"model.sync.every_n_steps={every}: the run has {cfg.max_steps} outer steps, so its "
            "reference would never move: lower it"
        )


def refuse_to_compare(cfg: "DictConfig", task: "Task") -> None:
    """What reads a rejected answer, where rows have none."""
    from omegaconf import OmegaConf

    unpaired = cfg.loss.get("unpaired", False)
    if task.compares and not unpaired:
        return
    if cfg.loss.get("compares", True) and not unpaired:
        raise UserError(
            f"{cfg.data.path}: the layout {task.layout} has one answer a row, which compares "
            "nothing: name it as data.sft, and pairs as data.path; or train with loss=sft"
        )
    for key in COMPARING:
        value = OmegaConf.select(cfg, key)
        if value:
            rows = "this loss" if unpaired else cfg.data.path
            raise UserError(
                f"{key}={value} compares two answers, and {rows} has one a row: leave it out"
            )


def refuse_rows(loss: Any, task: "Task") -> None:
    """Rows without the score differences that the loss reads, where its ``margin`` is not off; and
    training rows none of which says whose an answer is, where it reads that."""
    from spo_lightning.data.encode import margin_of
    from spo_lightning.losses import asks

    if asks(loss, "reference_sides") and not any("reference_side" in row for row in task.train):
        raise UserError(
            "no training row says which answer is the reference's own, which this loss turns away "
            "from: let loop=xpo make the pairs, or add reference_side, chosen or rejected"
        )
    chosen = loss.keywords.get("margin")
    if not asks(loss, "margins") or chosen is False:
        return
    for side in ("train", "held_out"):
        for place, row in enumerate(getattr(task, side), 1):
            margin = margin_of(row)
            if margin is None or not (margin > 0 or chosen and margin == 0):
                found = "no score" if margin is None else f"a score difference of {margin:g}"
                raise UserError(
                    f"{side.replace('_', '-')}, row {place}: {found}, and this loss needs one "
                    "above 0: give margin, or score_chosen and score_rejected"
                )


def refuse_processes(cfg: "DictConfig", world: World) -> None:
    """What several processes cannot do, whoever began them."""
    if cfg.batch_size < world.size:
        raise UserError(
            f"batch_size={cfg.batch_size} gives no pair to some of the {world.size} processes: "
            "raise it"
        )
    if world.size > 1 and cfg.loss.get("whole_batch"):
        raise UserError(
            "this loss needs all pairs of an outer step in one process: begin one, or take another"
        )
    if cfg.hardware.get("sharding") is not None:
        refuse_spreading(world)
        if cfg.batch_size % world.size:
            raise UserError(
                f"batch_size={cfg.batch_size} gives the {world.size} processes unequal numbers of "
                "pairs, and with hardware=fsdp they compute together: make it a multiple"
            )


def refuse_spreading(world: World) -> None:
    """A model over processes, of which there is one."""
    if world.size == 1:
        raise UserError(
            "hardware=fsdp spreads a model over several processes, and here is one: set "
            "hardware.devices, or take hardware=auto"
        )


def objective(cfg: "DictConfig") -> tuple[Any, Any]:
    """The loss and the solver; the optimizer too, of one parameter that nobody trains."""
    import torch

    from spo_lightning.training.fit import optimizer_of

    built({"_target_": cfg.optimizer._target_, "_partial_": True})  # is it installed?
    try:
        optimizer_of(cfg)([torch.nn.Parameter(torch.zeros(1))])
    except Exception as error:
        said = one_line(error).rstrip(".")
        raise UserError(f"optimizer: {said}; see conf/optimizer for its keys") from error
    return loss_of(cfg), built(cfg.solver)


def loss_of(cfg: "DictConfig") -> Any:
    """The loss alone, with what stands around it."""
    from omegaconf import OmegaConf

    from spo_lightning.losses import assembled

    try:
        return assembled(built(OmegaConf.to_container(cfg.loss, resolve=True)))
    except (TypeError, ValueError) as error:
        raise UserError(f"loss: {error}; see conf/loss for its keys") from error


def _checkpoint(cfg: "DictConfig", run: RunDir, world: World) -> "GoesOn | None":
    """The file to go on from; rows of metrics.csv later than it are cut."""
    from spo_lightning.training.fit import GoesOn

    where = cfg.ckpt_path
    if where is None:
        return None
    found = None

    def chosen() -> Path | None:
        nonlocal found
        if where != "last":
            return Path(where)
        newest = checkpoints.newest(run.last, run.best)
        path, found = newest or (None, None)
        return path

    path = world.once(chosen)  # where one is not whole, another is given its name
    if path is None:
        log.info("No checkpoint yet in %s: starting from the beginning", run.path)
        if run.writes:
            (run.path / "metrics.csv").unlink(missing_ok=True)
        return None
    if not path.exists():
        raise UserError(f"ckpt_path={where}: no such file")
    found = found or checkpoints.read(path)
    done = found["spo_lightning"]["outer_step"]
    if run.writes:
        cut_after(run.path / "metrics.csv", done)
    log.info("Going on from outer step %d of %s", done, path)
    return GoesOn(path, done, found["state_dict"])
