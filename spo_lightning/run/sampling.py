"""The stages of sampling, top to bottom: prompts to answers, judged, to a file of pairs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.errors import UserError
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.run import stages as shared
from spo_lightning.run.judging import Unopened, called, check_judge, engine_of, judge_of
from spo_lightning.run.record import Begun, Opened, Read, Stage, grown, walk
from spo_lightning.sampling.record import record_of
from spo_lightning.world import World

if TYPE_CHECKING:
    from spo_lightning.models.generate import Engine
    from spo_lightning.sampling.record import Record


@dataclass(frozen=True)
class Answering(Opened):
    """Who answers: ``policy``, or in its place, and then there is none, an engine."""

    engine: "Engine | None"


@dataclass(frozen=True)
class Drawn(Answering):
    """Every prompt's answers and scores, in a file."""

    record: "Record"


@dataclass(frozen=True)
class Chosen(Drawn):
    """How many prompts, samples and pairs there are."""

    found: dict[str, int]


def sample(cfg: Any, world: World) -> dict[str, int]:
    """Draw answers, score them, write the pairs; counts of prompts, samples and pairs."""
    if world.first:
        refuse_output(cfg)
    for where in ("strategy", "judge"):
        called(cfg[where], where)
    engine_of(cfg)
    stages = Stages(lambda *_: None, Stop(), "Run the same command to go on.", world)
    stages.stop.install()
    return walk(STAGES, Begun(cfg, world, stages, {})).found


def refuse_output(cfg: Any) -> None:
    """Only pairs of an earlier try of this command are ever written over."""
    output = Path(cfg.output) if cfg.output else Path(".")
    if output.is_dir():
        raise UserError(f"output={cfg.output}: name a file, as in output=pairs.jsonl")
    if output.exists() and not record_of(output).exists():
        from spo_lightning.evaluation.each_pair import make_room

        if not make_room(output):
            told = f"output={output}: there is a file, and not of this command"
            raise UserError(f"{told}: name another")


def prompts(at: Read) -> Read:
    """The rows to be answered, each prompt once: of a file, or the data's own."""
    from spo_lightning.capability.prompted import prompted
    from spo_lightning.models.device import set_threads
    from spo_lightning.models.sources import check_sources
    from spo_lightning.sampling import draw

    set_threads(at.cfg.hardware)
    quiet()
    check_sources(at.cfg.model)
    policy = None if engine_of(at.cfg) is not None else Unopened()
    if not check_judge(at.cfg, at.task, policy):
        raise UserError("judge=task: this data has none: choose answer, function or likelihood")
    rows = prompted(at.cfg, draw.prompts(at.cfg, at.task))
    return grown(Read, at, task=replace(at.task, train=rows))


def answering(at: Read) -> Answering:
    """The model as it is built or loaded, or the endpoint that answers in its place."""
    from spo_lightning.models.device import precision_of

    engine = engine_of(at.cfg, at.world.size)
    if engine is None:
        return grown(Answering, shared.policy(at), engine=None)
    precision = precision_of(at.cfg.hardware, at.world.device)
    return grown(Answering, at, policy=None, precision=precision, engine=engine)


def warm_start(at: Answering) -> Answering:
    """A model that was built here learns the task's texts."""
    return at if at.engine is not None else grown(Answering, shared.warm_start(at))


def sampled(at: Answering) -> Drawn:
    """Every prompt's answers, judged."""
    from spo_lightning.sampling.draw import draw

    judge = judge_of(at, at.cfg.model, at.world.size)
    assert judge is not None
    by = (at.policy, at.engine)
    return grown(Drawn, at, record=draw(at.cfg, *by, at.task.train, judge, at.stages))


def chosen(at: Drawn) -> Chosen:
    """The pairs that the strategy chooses, as one file."""
    from spo_lightning.sampling.draw import written

    strategy = called(at.cfg.strategy, "strategy")
    count = len(at.task.train)
    found = at.world.once(lambda: written(at.cfg, at.record, count, strategy))
    return grown(Chosen, at, found=found)


STAGES = [
    Stage("data", shared.data, "a pass over the rows", "reads again"),
    Stage("prompts", prompts, "a pass over the rows", "reads again"),
    Stage("policy", answering, "a model's load", "loads again"),
    Stage("warm start", warm_start, "of a built model, once for all runs", "begins again"),
    Stage("sampling", sampled, "samples answers a prompt", "what was drawn stays"),
    Stage("pairs", chosen, "a pass over the answers", "writes again"),
]
