"""A configuration in, the whole preflight out: prepared as a run is, looked at, and judged."""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from spo_lightning.config.build import built
from spo_lightning.data.batch import draws
from spo_lightning.data.chat import shown
from spo_lightning.data.rows import Row
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation import ches
from spo_lightning.models.device import device_of, set_threads
from spo_lightning.models.sources import check_sources
from spo_lightning.preflight import judgement
from spo_lightning.preflight.asked import telling
from spo_lightning.preflight.geometry import geometry, slopes
from spo_lightning.preflight.pilot import Pilots
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.run.job import objective, refuse_rows, refuse_to_compare
from spo_lightning.run.record import Begun, Referenced, walk
from spo_lightning.run.training import BEFORE_TRAINING, DATA
from spo_lightning.solvers.none import NoLower
from spo_lightning.training.feed import outer_steps
from spo_lightning.training.microbatch import trainable
from spo_lightning.world import World


@dataclass(frozen=True)
class Preflight:
    """What preflight.json holds."""

    advice: str
    run: dict[str, Any]  # what of the configuration tells whether a run is the one meant
    steps: int  # of the run
    pilot_steps: int
    pilots: list[dict[str, float]]  # what each of them did to the held-out pairs
    lr: float
    geometry: dict[str, float]  # means over ``sample``
    ranking: float | None  # Spearman's, of score and measured change of the held-out pairs
    sides: dict[str, dict[str, float]]  # of seen and held: what the pilots did
    foreseen: dict[str, Any]
    weights: list[dict[str, float]]  # of the solver, and what a pilot with it did held-out
    seconds: dict[str, float]  # of every stage, and of the run's steps
    mib: float  # in use at the peak of the pilot's steps
    sample: list[dict[str, Any]]  # training pairs with their geometry
    pairs: list[dict[str, Any]]  # held-out, with their texts


def look(cfg: DictConfig) -> Preflight:
    """Everything, with the weights as they were at the end."""
    check_sources(cfg.model)
    set_threads(cfg.hardware)
    quiet()
    stages = Stages(lambda *_: None, Stop(), "Run the same command again.")
    with stages.stop.listening():
        return _looked(cfg, stages)


def _looked(cfg: DictConfig, stages: Stages) -> Preflight:
    loss, solver = objective(cfg)
    at, total = prepared(cfg, loss, stages)
    seconds, began = dict(at.seconds), time.monotonic()
    steps = min(cfg.preflight.pilot_steps, total)
    epoch = math.ceil(len(at.train) / cfg.batch_size)
    # each on other pairs than the others, and none past the run's end
    count = max(1, min(cfg.preflight.pilots, math.ceil(total / steps), epoch // steps))
    sample, seen, held = sampled(cfg, at, steps)
    shape, along = geometry_of(cfg, at, loss, sample)
    with at.stages.stage("score", len(held)) as advance:
        here = {name: p.detach() for name, p in trainable(at.scorer).items()}
        down = -cfg.optimizer.lr
        scores = [down * slope for slope in slopes(at.scorer, held, here, along, advance)]
    del here, along
    alike = ches_of(cfg, at, held)
    seconds["geometry"], began = time.monotonic() - began, time.monotonic()
    pilots = Pilots(cfg, at, loss, {"seen": seen, "held": held}, total, steps, count)
    found = pilots.split(solver, "pilot")
    seconds["pilot"], began = time.monotonic() - began, time.monotonic()
    sides = {side: judgement.parts(found, side) for side in pilots.sides}
    whole = found.changes["held"]
    tried = weights(pilots, whole - found.every[0])
    if tried and type(solver) is NoLower:
        tried = [{"weight": 0.0} | judgement.told(whole), *tried]
    seconds |= {"weights": time.monotonic() - began, "run": found.seconds * total}
    measured = whole[:, 0].tolist()
    alone, first = found.every[0][:, 0].tolist(), found.first["held"]
    ahead = judgement.foreseen(first, measured, alone, count, steps, min(total, epoch))
    tried = [  # the first pilots' difference, which goes on as the run does
        w | {"foreseen": ahead["mean"] + ahead["pilots"] * (w["mean"] - sides["held"]["mean"])}
        for w in tried
    ]
    numbers = {"score": scores, "ches": alike, "first": first, "measured": measured}
    told = rows(held, at.task.held_out, numbers | {"alone": alone})
    return Preflight(
        advice=judgement.advice(sides, ahead, tried, cfg.optimizer.lr, total),
        run=telling(cast("dict[str, Any]", OmegaConf.to_container(cfg, resolve=True))),
        steps=total,
        pilot_steps=steps,
        pilots=[{"pilot": n} | judgement.told(one) for n, one in enumerate(found.every, 1)],
        lr=cfg.optimizer.lr,
        geometry=judgement.means(shape),
        ranking=judgement.spearman(scores, measured),
        sides=sides,
        foreseen=ahead,
        weights=tried,
        seconds=seconds,
        mib=found.mib,
        sample=[{"row": pair.row + 1} | one for pair, one in zip(sample.pairs, shape)],
        pairs=told,
    )


def prepared(cfg: DictConfig, loss: Any, stages: Stages) -> tuple[Referenced, int]:
    """The run up to its reference, of the pairs that are looked at; the steps of the run."""
    asked = cfg.preflight
    held = min(asked.max_pairs, cfg.eval.max_rows or asked.max_pairs)
    piloted = asked.pilots * asked.pilot_steps
    if cfg.max_steps >= 0:
        piloted = min(piloted, cfg.max_steps + asked.pilot_steps)
    drawn = max(piloted, math.ceil(asked.max_pairs / cfg.batch_size))
    short: Any = OmegaConf.merge(cfg, {"max_steps": drawn, "eval": {"max_rows": held}})
    at = walk([DATA], Begun(short, World(place=lambda: device_of(cfg.hardware)), stages, {}))
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


def sampled(cfg: DictConfig, at: Referenced, steps: int) -> tuple[Pairs, Pairs, Pairs]:
    """Training pairs, first drawn first; those that the first pilot sees; held-out pairs."""
    most, orders = cfg.preflight.max_pairs, draws(len(at.train), cfg.batch_size, cfg.seed, 0)
    reach = max(steps, math.ceil(most / cfg.batch_size))
    drawn = list(dict.fromkeys(row for _ in range(reach) for row in next(orders)))[:most]
    sample = at.train.take(drawn)
    seen = sample.take(range(min(len(drawn), steps * cfg.batch_size)))
    return sample, seen, at.held.take(range(min(most, len(at.held))))


def geometry_of(
    cfg: DictConfig, at: Referenced, loss: Any, sample: Pairs
) -> tuple[list[dict[str, float]], Any]:
    """Of every training pair, and the step that their mean preference gradient would take."""
    with at.stages.stage("gradients", len(sample)) as advance:
        found = geometry(at.scorer, sample, loss, cfg.batch_size, advance)
    alike = ches_of(cfg, at, sample)
    return [pair | {"ches": one} for pair, one in zip(found.pairs, alike)], found.along


def ches_of(cfg: DictConfig, at: Referenced, pairs: Pairs) -> list[float]:
    """Length-normalised."""
    how: dict[str, Any] = {"batch_size": cfg.eval.batch_size, "precision": at.precision}
    return ches.scores(at.scorer, pairs, **how)[:, 1].tolist()


def weights(pilots: Pilots, later: Tensor) -> list[dict[str, float]]:
    """A pilot each of the penalty at a weight: the run's own, or the one of ``preflight``.

    ``later``: by how much all of the run's own pilots differ from its first, on whose pairs
    these are taken.
    """
    cfg = pilots.cfg
    node = cfg.solver if "weight" in cfg.solver and "phi" in cfg.solver else cfg.preflight.solver
    settings: Any = OmegaConf.to_container(node, resolve=True)
    found = []
    for weight in cfg.preflight.weights:
        done = pilots.take(built(settings | {"weight": weight}), f"weight {weight:g}")
        found.append({"weight": weight} | judgement.told(done.changes["held"] + later))
    return found


def rows(
    pairs: Pairs, texts: list[Row], numbers: Mapping[str, list[float]]
) -> list[dict[str, Any]]:
    found = []
    for place, pair in enumerate(pairs.pairs):
        row = texts[pair.row]
        said = {name: shown(row[name]) for name in ("prompt", "chosen", "rejected")}
        found.append({"row": pair.row + 1, **{n: v[place] for n, v in numbers.items()}, **said})
    return found
