"""Train one run: ``python -m spo_lightning.train [group=option] [key=value]``; ``-m`` for several.

``train(cfg, run_dir)`` does the same from a notebook or a test and returns the numbers.
"""

import inspect
import logging
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs
from spo_lightning.config.build import built, one_line
from spo_lightning.errors import verdict
from spo_lightning.records import loggers

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.evaluation.held_out import HeldOut

log = logging.getLogger(__name__)


def main() -> None:
    command.run("train", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> Any:
    """One job of the command: refuse bad input, then train; what a search maximises, or all."""
    from omegaconf import OmegaConf

    from spo_lightning.records import directory as rundir
    from spo_lightning.report.build import attempted

    knobs.check(cfg, line)
    choices = line.choices
    if cfg.ckpt_path is not None:
        cfg, choices = rundir.resumed(cfg, run_dir, line.touched, line.choices)
    numbers = train(cfg, run_dir, choices)
    # a run that goes on may be older than its report
    if OmegaConf.select(cfg, "report.enabled", default=True) and cfg.study is None:
        log.info("%s", attempted(Path(run_dir)))
    if cfg.sweep.objective is None:
        return numbers
    from spo_lightning.sweep.objective import score

    return score(numbers, **cfg.sweep.objective)


def train(
    cfg: "DictConfig", run_dir: Path, choices: "dict[str, str] | Any" = None
) -> dict[str, Any]:
    """Run everything and return what metrics.json holds."""
    from spo_lightning.records.directory import RunDir
    from spo_lightning.records.lock import held
    from spo_lightning.records.progress import Stages, Stop

    run, stop = RunDir(Path(run_dir).absolute()), Stop()
    how = f"Go on with: python -m spo_lightning.train ckpt_path=last hydra.run.dir={run_dir}"
    if cfg.get("study") is not None:
        how = "A study starts from its beginning"
    stages = Stages(run.note, stop, how)
    with held(run.path):
        if cfg.ckpt_path is None:
            run.refuse_used()
        run.start(cfg, choices or {}, cfg.max_steps)
        return _written(cfg, run, stages, choices or {})


def _written(cfg: "DictConfig", run: Any, stages: Any, choices: dict[str, str]) -> dict[str, Any]:
    """The run's work in its directory; how it ended is noted there."""
    before = stages.stop.install()
    try:
        if cfg.get("study") is not None:
            numbers = studied(cfg, run, stages)
        else:
            numbers = Run(cfg, run, stages, choices).go()
    except BaseException as error:
        code, message = verdict(error)
        stopped = code in (130, 143)
        run.note_end("interrupted" if stopped else "failed", message)
        if code == 2:
            run.withdraw()
        loggers.close(run.path, code)
        if run.last.exists() and not stopped and (code != 2 or run.stage == "training"):
            log.error("The last good checkpoint is %s. %s", run.last, stages.how_to_go_on)
        raise
    finally:
        import signal

        for number, handler in before.items():
            signal.signal(number, handler)
    run.note_status(state="finished", stage="done")
    loggers.close(run.path, 0)
    return numbers


def studied(cfg: "DictConfig", run: Any, stages: Any) -> dict[str, Any]:
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


class Run:
    """The stages of one run, in order."""

    def __init__(self, cfg: Any, run: Any, stages: Any, choices: dict[str, str]):
        self.cfg, self.run, self.stages, self.choices = cfg, run, stages, choices
        self.seconds: dict[str, float] = {}

    def go(self) -> dict[str, Any]:
        from spo_lightning.data.load import load
        from spo_lightning.report.table import run_table

        cfg = self.cfg
        self.stages.note("data", 0, 1)
        task = load(cfg.data)  # bad rows end the run before anything heavy is imported
        from spo_lightning.records import progress
        from spo_lightning.run import prepare as room

        room.check_checkpoints(cfg.model)
        room.set_threads(cfg.hardware)
        self.device = room.device_of(cfg.hardware)
        progress.quiet()
        loss, solver = self.objective()
        resume = self.checkpoint()
        self.precision = room.precision_of(cfg.hardware, self.device)
        log.info("Run directory: %s", self.run.path)
        with self.timed("prepare"):
            self.given = room.prepare(cfg, task, self.device, self.precision, self.stages)
        if resume is not None:
            self.check_architecture()
        with self.timed("init"):
            before = self.held_out("init")
        numbers: dict[str, Any] = {
            "init": before.numbers,
            "final": None,
            "choices": dict(self.choices),
            "steps": 0,
            "seconds": self.seconds,
        }
        self.run.note_metrics(numbers)
        steps = self.steps()
        if steps:
            with self.timed("training"):
                steps = self.fit(loss, solver, steps, resume)
        with self.timed("final"):
            after = self.held_out("final")
        self.save()
        numbers |= {"final": after.numbers, "steps": steps}
        self.run.note_metrics(numbers)
        samples = self.samples(before, after)
        self.run.note_samples(samples)
        loggers.tell(self.run.path, numbers, samples)
        log.info("\n%s\n", run_table(numbers))
        log.info("Model: %s", self.run.model)
        log.info("Numbers and samples: %s", self.run.path)
        return numbers

    def objective(self) -> tuple[Any, Any]:
        """The loss and the solver, built before anything slow so that bad knobs end at once.
        The optimizer too, of one parameter that nobody trains."""
        import torch
        from omegaconf import OmegaConf

        from spo_lightning.errors import UserError
        from spo_lightning.training.fit import optimizer_of

        # is it installed?
        built({"_target_": self.cfg.optimizer._target_, "_partial_": True})
        try:
            optimizer_of(self.cfg)([torch.nn.Parameter(torch.zeros(1))])
        except Exception as error:
            said = one_line(error).rstrip(".")
            raise UserError(f"optimizer: {said}; see conf/optimizer for its keys") from error
        try:
            node: Any = OmegaConf.to_container(self.cfg.loss, resolve=True)
            node.pop("unit")
            loss, solver = built(node), built(self.cfg.solver)
            # a partial takes any keyword until it is called, and that is after the warm start
            inspect.signature(loss.func).bind_partial(**loss.keywords)
            return loss, solver
        except TypeError as error:
            raise UserError(f"loss: {error}; see conf/loss for its keys") from error

    def checkpoint(self) -> Path | None:
        """The file to go on from; rows of metrics.csv later than it are cut."""
        from spo_lightning.errors import UserError
        from spo_lightning.records import checkpoints
        from spo_lightning.records.directory import cut_after

        where = self.cfg.ckpt_path
        if where is None:
            return None
        if where == "last":
            newest = checkpoints.newest(self.run.last, self.run.best)
            if newest is None:
                log.info("No checkpoint yet in %s: starting from the beginning", self.run.path)
                (self.run.path / "metrics.csv").unlink(missing_ok=True)
                return None
            path, found = newest
        else:
            path = Path(where)
            if not path.exists():
                raise UserError(f"ckpt_path={where}: no such file")
            found = checkpoints.read(path)
        done = found["spo_lightning"]["outer_step"]
        self.found, self.done = found, done
        cut_after(self.run.path / "metrics.csv", done)
        log.info("Going on from outer step %d of %s", done, path)
        return path

    def steps(self) -> int:
        if self.cfg.max_steps >= 0:
            return self.cfg.max_steps
        return math.ceil(self.cfg.epochs * len(self.given.train) / self.cfg.batch_size)

    def fit(self, loss: Any, solver: Any, steps: int, resume: Path | None) -> int:
        """Preference training under Lightning. The outer steps taken, of ``steps`` at most."""
        from spo_lightning.training.fit import fit

        done = 0 if resume is None else self.done
        if done < steps:
            steps = fit(
                self.cfg,
                self.given,
                self.run,
                self.stages,
                loss,
                solver,
                steps,
                resume,
                self.precision,
            )
        elif resume is not None:
            self.given.scorer.load_state_dict(
                {n.removeprefix("scorer."): v for n, v in self.found["state_dict"].items()},
                strict=False,
            )
        self.given.policy.module.to(self.device)
        return steps

    def check_architecture(self) -> None:
        from spo_lightning.errors import UserError

        mine = {
            f"scorer.{n}": p.shape
            for n, p in self.given.scorer.named_parameters()
            if p.requires_grad
        }
        theirs = {name: value.shape for name, value in self.found["state_dict"].items()}
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                raise UserError(
                    f"ckpt_path={self.cfg.ckpt_path} belongs to another architecture: {name} is "
                    f"{theirs.get(name)} there and {mine.get(name)} here"
                )

    def held_out(self, stage: str) -> "HeldOut":
        """The held-out numbers of the policy as it is; ``init`` also draws the rivals' samples."""
        from spo_lightning.evaluation import held_out as evals
        from spo_lightning.sampling.pairing import decoding

        cfg, given, how = self.cfg, self.given, decoding(self.cfg, seed=self.cfg.seed)
        self.stages.note(stage, 0, 1)
        if stage == "init":
            self.rivals = None
            if given.task.judge is not None:
                self.rivals = evals.samples(
                    given.policy, given.held_rows, given.task, how, evals.RIVALS, self.stages
                )
        return evals.held_out(
            given.policy,
            given.scorer,
            given.task,
            given.held_rows,
            given.held,
            beta=cfg.loss.beta,
            how=how,
            rivals=self.rivals,
            precision=self.precision,
            stages=self.stages,
        )

    def samples(self, before: "HeldOut", after: "HeldOut") -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        from spo_lightning.evaluation.held_out import shown

        given = self.given
        pair_of = {place: index for index, place in enumerate(given.place)}
        rows = []
        for place, row in enumerate(given.held_rows):
            pair = pair_of.get(place)
            moved = (None, None)  # no pair of this row was scored
            if pair is not None and after.scores is not None:
                moved = after.scores.chosen_delta[pair], after.scores.rejected_delta[pair]
            # a sampled pair has its answers in a row of its own
            whole = row if pair is None else given.task.held_out[given.held.pairs[pair].row]
            texts = {name: whole.get(name) for name in ("chosen", "rejected")}
            texts["reference"] = row.get("answer", row.get("chosen"))
            texts = {name: text and shown(text) for name, text in texts.items()}
            rows.append(
                {
                    "prompt": shown(row["prompt"]),
                    "reference": texts["reference"],
                    "before": before.answers.texts[place],
                    "after": after.answers.texts[place],
                    "before_ok": before.answers.right[place],
                    "after_ok": after.answers.right[place],
                    "chosen_delta": moved[0],
                    "rejected_delta": moved[1],
                    "chosen": texts["chosen"],
                    "rejected": texts["rejected"],
                }
            )
        return rows

    def save(self) -> None:
        from spo_lightning.records.disk import writing_folder
        from spo_lightning.report.table import model_card

        card = model_card(self.choices, self.cfg)
        with writing_folder(self.run.model):
            self.given.policy.save(self.run.model, merge=self.cfg.model.lora.merge, card=card)

    def timed(self, stage: str) -> Any:
        from contextlib import contextmanager

        @contextmanager
        def clock() -> Any:
            began = time.monotonic()
            yield
            self.seconds[stage] = round(time.monotonic() - began, 3)

        return clock()


if __name__ == "__main__":
    main()
