"""A configuration in, the whole preflight out: prepared as a run is, looked at, and judged."""

import logging
import time
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.bench.measuring import MIB, highest_resident
from spo_lightning.config.build import built
from spo_lightning.data.batch import draws
from spo_lightning.data.chat import shown
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation import ches
from spo_lightning.models.device import device_of, set_threads
from spo_lightning.models.sources import check_sources
from spo_lightning.preflight import judgement
from spo_lightning.preflight.geometry import geometry, slopes
from spo_lightning.preflight.pilot import pilot
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.run.job import objective, refuse_rows, refuse_to_compare
from spo_lightning.run.record import Begun, Referenced, walk
from spo_lightning.run.training import BEFORE_TRAINING, DATA
from spo_lightning.training.feed import outer_steps
from spo_lightning.training.microbatch import trainable
from spo_lightning.world import World

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Preflight:
    """What preflight.json holds."""

    advice: str
    steps: int  # of the run
    pilot_steps: int
    lr: float
    geometry: dict[str, float]  # means over the seen pairs of the sample
    ranking: float | None  # Spearman's, of score and measured change of the held-out pairs
    sides: dict[str, dict[str, float]]  # of seen and held: what the pilot did
    foreseen: dict[str, Any]
    weights: list[dict[str, float]]  # held-out mean change of each pilot
    seconds: dict[str, float]
    memory_mib: float  # of this process at its peak; a run keeps no more
    pairs: list[dict[str, Any]]  # held-out, most at risk first, with their texts


def look(cfg: DictConfig) -> Preflight:
    """Everything, with the weights as they were at the end."""
    check_sources(cfg.model)
    set_threads(cfg.hardware)
    quiet()
    chosen = objective(cfg)
    at, steps = prepared(cfg, chosen[0])
    sample = dict(zip(("seen", "held"), sampled(cfg, at)))
    seconds, began = dict(at.seconds), time.monotonic()
    with at.stages.stage("gradients", len(sample["seen"])) as advance:
        shape = geometry(at.scorer, sample["seen"], chosen[0], cfg.batch_size, advance)
    here = {name: p.detach() for name, p in trainable(at.scorer).items()}
    scores = [-slope for slope in slopes(at.scorer, sample["held"], here, shape.along)]
    del here
    how: dict[str, Any] = {"batch_size": cfg.eval.batch_size, "precision": at.precision}
    alike = ches.scores(at.scorer, sample["held"], **how)[:, 1].tolist()
    seconds["gradients"], began = time.monotonic() - began, time.monotonic()
    with at.stages.stage("pilot", 1) as advance:
        found = pilot(cfg, at, chosen, sample, steps, split=True)
        advance(1)
    seconds["pilot"], began = time.monotonic() - began, time.monotonic()
    tried = weights(cfg, at, chosen[0], sample, steps)
    seconds |= {"weights": time.monotonic() - began, "run": found.step_seconds * steps}
    sides = {side: judgement.told(found, side) for side in sample}
    epoch = max(1, len(at.train) // cfg.batch_size)
    foreseen = judgement.foreseen(found, cfg.preflight.pilot_steps, min(steps, epoch))
    measured = found.measured["held"]
    return Preflight(
        judgement.advice(sides, foreseen, tried, cfg.optimizer.lr),
        *(steps, cfg.preflight.pilot_steps, cfg.optimizer.lr),
        judgement.geometry_of(shape.pairs),
        judgement.spearman(scores, measured),
        *(sides, foreseen, tried, seconds, highest_resident() / MIB),
        at_risk(at, sample["held"], {"score": scores, "ches": alike, "measured": measured}),
    )


def prepared(cfg: DictConfig, loss: Any) -> tuple[Referenced, int]:
    """The run up to its reference, of the pairs that the pilot reads; the steps of the run."""
    asked = cfg.preflight
    rows = min(asked.max_pairs, cfg.eval.max_rows or asked.max_pairs)
    short: Any = OmegaConf.merge(cfg, {"max_steps": asked.pilot_steps, "eval": {"max_rows": rows}})
    stages = Stages(lambda *_: None, Stop(), "Run the same command again.")
    world = World(place=lambda: device_of(cfg.hardware))
    at = walk([DATA], Begun(short, world, stages, {}))
    refuse_to_compare(cfg, at.task)
    if not at.task.compares:
        raise UserError(f"{cfg.data.path}: one answer a row: the preflight needs pairs of two")
    refuse_rows(loss, at.task)
    at = walk(BEFORE_TRAINING, at)
    for side, pairs in (("train", at.train), ("held-out", at.held)):
        if len(pairs) < 2:
            raise UserError(
                f"{cfg.data.path or 'data'}: {len(pairs)} pair ({side}): the preflight compares "
                "seen with held-out pairs and needs 2 of each: add rows, or raise "
                "data.eval_fraction"
            )
    return at, outer_steps(cfg, len(at.train))


def sampled(cfg: DictConfig, at: Referenced) -> tuple[Pairs, Pairs]:
    """Pairs that the pilot's steps see, first drawn first, and held-out ones."""
    most, steps = cfg.preflight.max_pairs, cfg.preflight.pilot_steps
    orders = draws(len(at.train), cfg.batch_size, cfg.seed, 0)
    seen = list(dict.fromkeys(row for _ in range(steps) for row in next(orders)))
    return at.train.take(seen[:most]), at.held.take(range(min(most, len(at.held))))


def weights(
    cfg: DictConfig, at: Referenced, loss: Any, sample: dict[str, Pairs], steps: int
) -> list[dict[str, float]]:
    """A pilot each of the solver at a weight, from the smallest up until held-out answers hold."""
    own = "weight" in cfg.solver and "phi" in cfg.solver
    node = cfg.solver if own else cfg.preflight.solver
    found = []
    with at.stages.stage("weights", len(cfg.preflight.weights)) as advance:
        for weight in cfg.preflight.weights:
            settings: Any = OmegaConf.to_container(node, resolve=True)
            solver = built(settings | {"weight": weight})
            done = pilot(cfg, at, (loss, solver), sample, steps, split=False)
            found.append({"weight": weight} | judgement.moved(done.measured["held"]))
            advance(1)
    return found


def at_risk(at: Referenced, held: Pairs, numbers: dict[str, list[float]]) -> list[dict[str, Any]]:
    rows = []
    for place, pair in enumerate(held.pairs):
        row = at.task.held_out[pair.row]
        texts = {name: shown(row[name]) for name in ("prompt", "chosen", "rejected")}
        rows.append({"row": pair.row + 1, **{n: v[place] for n, v in numbers.items()}, **texts})
    return sorted(rows, key=lambda row: row["score"])
