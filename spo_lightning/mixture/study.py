"""A mixture and a preference in, a run directory out: everything in the order in which it happens.

``metrics.csv`` and ``checkpoints/``: the denoiser's training, then the methods', side by side on
the same pairs and draws. ``start.csv``: the denoiser beside the mixture's exact score, by noise.
``moments.csv``: surrogate and truth over held-out pairs, per method and moment. ``pairs.csv``: the
same pair by pair at the end. ``density.csv``: log-densities over the plane, of the reference, of
the best policy there is and of each method. ``metrics.json``: what all come to.
"""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.diffusion.batch import Draws, ImageBatch
from spo_lightning.diffusion.objective import TARGETS, Schedule
from spo_lightning.diffusion.scorer import ImageScorer
from spo_lightning.mixture import measures
from spo_lightning.mixture.held_out import HeldOut, Sides, moment, pair_by_pair
from spo_lightning.mixture.likelihood import Flow, shares
from spo_lightning.mixture.measures import Grid
from spo_lightning.mixture.training import Denoiser, Learner, Method, batch_of, told
from spo_lightning.mixture.truth import Mixture, Preference
from spo_lightning.records.disk import write_csv, write_text
from spo_lightning.studies.denoiser import Schedule as Noising
from spo_lightning.studies.fitting import Book, Learning, Numbers, fit, generator, seeded

log = logging.getLogger(__name__)

PHASE = "methods"  # what the checkpoint calls the second half
LEVELS = 12  # of noise at which the start is held against the exact score
NETS = ("denoiser", "annealing")  # phases of the start's training, at two step lengths


@dataclass(frozen=True)
class Measuring:
    """What is looked at, and how closely."""

    pairs: int  # held out
    draws: int  # of times and noise per held-out pair
    moments: Sequence[int]  # steps after which everything is measured; the last is the end

    def __post_init__(self):
        rising = list(self.moments)
        if not rising or rising != sorted({*rising}) or rising[0] < 1:
            raise ValueError(
                f"study.measuring.moments={rising} must be steps that rise, from 1 on"
            )
        for name in ("pairs", "draws"):
            if getattr(self, name) < 3:
                raise ValueError(
                    f"study.measuring.{name} must be at least 3, not {getattr(self, name)}"
                )


@dataclass(frozen=True)
class Study:
    """Learns the mixture, then what is preferred in it, by every method."""

    seed: int
    reads: Sequence[str]  # keys of train.yaml that it heeds; config/studies.py asks
    mixture: Mixture
    preference: Preference
    rows: int
    noise: Noising
    denoiser: Learning
    annealing: Mapping[str, Any]
    scale: float
    weights: Callable[[Schedule], Tensor]
    draws: int
    pairs: int
    batch_size: int
    lr: float
    beta: float
    methods: Mapping[str, Method]
    asked: Method
    flow_steps: int
    measuring: Measuring
    grid: Grid
    report: Callable[[Path], Any]  # reads the files; called by the command after ``run``

    def __post_init__(self):
        for name in ("rows", "draws", "pairs", "batch_size", "flow_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"study.{name} must be at least 1, not {getattr(self, name)}")
        if not (self.annealing["steps"] >= 1 and self.annealing["lr"] > 0):
            raise ValueError("study.annealing: steps must be at least 1 and lr above 0")
        for name in ("lr", "beta", "scale"):
            if not getattr(self, name) > 0:
                raise ValueError(f"study.{name} must be above 0, not {getattr(self, name)}")
        if len(self.mixture.centres[0]) != 2 or {len(c) for c in self.preference.centres} != {2}:
            raise ValueError("study.mixture and study.preference must have centres [x, y]")

    @property
    def steps(self) -> int:
        return self.measuring.moments[-1]

    @property
    def total(self) -> int:
        return self.denoiser.steps + self.annealing["steps"] + self.steps

    @cached_property
    def trained(self) -> dict[str, Method]:
        """By title: those of the yaml, and what loss= and solver= say if it is none of them."""
        known = any(self.asked.equals(method) for method in self.methods.values())
        return dict(self.methods) if known else {**self.methods, self.asked.title: self.asked}

    @cached_property
    def levels(self) -> Tensor:
        """[P] u, the log of noise over image, at each place of the schedule."""
        return 0.5 * ((1 - self.noise.kept) / self.noise.kept).log()

    @cached_property
    def schedule(self) -> Schedule:
        """Its places, and what the net is told of each."""
        kept = self.noise.kept
        image, noise = kept.sqrt().float(), (1 - kept).sqrt().float()
        return Schedule(image, noise, told(self.levels, self.flow).float(), TARGETS["epsilon"])

    @cached_property
    def flow(self) -> Flow:
        return Flow(self.levels[0].item(), self.levels[-1].item(), self.flow_steps)

    def run(
        self,
        directory: Path,
        advance: Callable[..., Any],
        *,
        log_every: int,
        checkpoint_every: int,
    ) -> dict[str, Any]:
        """Write the files and return metrics.json. A directory with a checkpoint is gone on in."""
        columns = [f"{split}/{name}/loss" for name in NETS for split in ("train", "eval")]
        columns += [f"train/loss/{title}" for title in self.trained]
        book = Book(directory, checkpoint_every, log_every, columns, advance)
        start = self.started(book)
        at, init = self.compared_with_truth(start)
        write_csv(directory / "start.csv", at)
        log.info(
            "The start is %.4f nats from the mixture (KL), its error of the exact score %.2f%%",
            init["start/kl"],
            100 * init["start/score"],
        )
        learners, moved, moments = self.learned(start, book)
        book.close()
        write_csv(directory / "moments.csv", moments)
        write_csv(directory / "pairs.csv", pair_by_pair(moved))
        density, numbers = self.over_the_plane(start, learners)
        write_csv(directory / "density.csv", density)
        last = {row["method"]: row for row in moments if row["step"] == self.steps}
        final = {
            f"{name}/{title}": value
            for title, row in last.items()
            for name, value in row.items()
            if name not in ("method", "step")
        }
        followed = [row["pearson/surrogate"] for row in last.values()]
        final = {"pearson": sum(followed) / len(followed), **final, **numbers}
        found = {"init": init, "final": final, "steps": book.step}
        write_text(directory / "metrics.json", json.dumps(found, indent=1) + "\n")
        log.info("\n%s\n", table(found["final"], [*self.trained]))
        return found

    # -- the start

    def started(self, book: Book) -> Denoiser:
        """A denoiser that has learned the mixture."""
        points = self.mixture.drawn(self.rows, generator(self.seed, "rows"))
        beside = self.mixture.drawn(self.rows, generator(self.seed, "rows, held out"))
        net = self.denoiser.net(2, 2, seeded(self.seed, "denoiser, weights"))

        def loss(some: Tensor, count: int, draws: torch.Generator) -> Numbers:
            batch = some[torch.randint(len(some), (count,), generator=draws)]
            places = torch.randint(len(self.schedule), (count,), generator=draws)
            noise = torch.randn(batch.shape, generator=draws)
            noisy = self.schedule.noised(batch, noise, places)
            return {"loss": F.mse_loss(net(noisy, self.schedule.times[places]), noise)}

        held_out = partial(loss, beside, len(beside))
        for name, how in zip(NETS, (self.denoiser, replace(self.denoiser, **self.annealing))):
            fit(name, net, how, partial(loss, points, how.batch_size), held_out, self.seed, book)
        return Denoiser(net, self.flow).eval().requires_grad_(False)

    @torch.no_grad()
    def compared_with_truth(self, start: Denoiser) -> tuple[list[dict], dict[str, float]]:
        """The start's error of the exact score by noise, and its density beside the mixture's."""
        draws = generator(self.seed, "start, measured")
        points = self.mixture.drawn(self.measuring.pairs * 2, draws)
        rows, off, of = [], 0.0, 0.0
        for n in range(LEVELS):
            u = self.flow.low + (self.flow.high - self.flow.low) * n / (LEVELS - 1)
            image, noise = shares(u)
            noisy = image * points + noise * torch.randn(points.shape, generator=draws)
            exact = self.mixture.noise(noisy, image, noise)
            error = (start.predict(noisy, u) - exact).square().mean().item()
            size = exact.square().mean().item()
            rows.append({"noise_over_image": math.exp(u), "error": error, "exact": size})
            off, of = off + error, of + size
        exact = self.mixture.log_density(points, 1.0, shares(self.flow.low)[1])
        away = (exact - self.flow.log_density(start.predict, points)).mean().item()
        return rows, {"start/kl": away, "start/score": off / of}

    # -- the methods

    def drawn_pairs(self, count: int, name: str) -> Tensor:
        """[count, 2, 2]"""
        draws = generator(self.seed, name)
        return self.preference.pairs(self.mixture.drawn(2 * count, draws), draws)

    def learned(
        self, start: Denoiser, book: Book
    ) -> tuple[dict[str, Learner], dict[str, Sides], list[dict[str, Any]]]:
        """The methods' learners, what became of the held-out pairs under each, every moment."""
        pairs = self.drawn_pairs(self.pairs, "pairs")
        surrogate = {"scale": self.scale, "weights": self.weights(self.schedule)}
        reference = ImageScorer(start, self.schedule, **surrogate)
        kept = book.nets.get(PHASE, {"step": 0, "moments": [], "learners": {}})
        done, moments = kept["step"], list(kept["moments"])
        learners = self.learners(start, surrogate, kept["learners"])
        sight = self.sight(**surrogate)
        before, moved = sight.under(start), {}

        def state() -> dict[str, Any]:
            each = {title: learner.state() for title, learner in learners.items()}
            return {"step": done, "moments": moments, "learners": each}

        def looked() -> dict[str, Sides]:
            return {t: sight.under(it.denoiser).less(before) for t, it in learners.items()}

        while done < self.steps:
            batch = self.batch(pairs, reference, done)
            losses = {
                f"train/loss/{title}": learner.step(batch, done)["loss"]
                for title, learner in learners.items()
            }
            done += 1
            if done == 1 or done % book.log_every == 0:
                book.log(losses)
            if done in self.measuring.moments:
                moved = looked()
                for title, sides in moved.items():
                    moments.append({"method": title, "step": done, **moment(sides)})
            book.went(PHASE, state, done == self.steps)
        # of a run that goes on after its last step nothing was looked at here
        return learners, moved or looked(), moments

    def learners(
        self, start: Denoiser, surrogate: Mapping[str, Any], kept: Mapping[str, Any]
    ) -> dict[str, Learner]:
        """At the start, or where they were kept."""
        found = {}
        for title, method in self.trained.items():
            found[title] = Learner(method, start, self.schedule, self.lr, **surrogate)
            if title in kept:
                found[title].load(kept[title])
        return found

    def sight(self, **surrogate: Any) -> HeldOut:
        """How held-out pairs are looked at."""
        seed, count = seeded(self.seed, "draws, held out"), self.measuring.draws
        pairs = self.drawn_pairs(self.measuring.pairs, "pairs, held out")
        return HeldOut(pairs, self.flow, self.schedule, **surrogate, draws=count, seed=seed)

    def batch(self, pairs: Tensor, reference: ImageScorer, step: int) -> ImageBatch:
        """An outer step's pairs with their draws and what the reference says at them."""
        draws = generator(self.seed, f"batch {step}")
        rows = torch.randint(len(pairs), (self.batch_size,), generator=draws)
        # what draws are named by: a row that comes twice has others at each of its places
        named = rows * self.batch_size + torch.arange(self.batch_size)
        spread = Draws(seeded(self.seed, "draws"), self.draws, len(self.schedule))
        batch = spread.of(batch_of(pairs[rows], named), step)
        with torch.no_grad():
            return replace(batch, reference=reference(batch).logps)

    # -- the plane

    def over_the_plane(
        self, start: Denoiser, learners: Mapping[str, Learner]
    ) -> tuple[list[dict[str, Any]], dict[str, float]]:
        """Rows of density.csv, and how far each method is from the best policy there is."""
        points = self.grid.points
        reference = self.flow.log_density(start.predict, points)
        # of all policies the one with the most reward less beta times KL from the reference
        best = measures.whole(reference + self.preference.reward(points) / self.beta)
        logs = {t: self.flow.log_density(it.predict, points) for t, it in learners.items()}
        everyone = {"reference": reference, **logs}
        centres = torch.tensor(self.mixture.centres)
        numbers: dict[str, float] = {}
        for title, values in everyone.items():
            numbers[f"kl_from_best/{title}"] = measures.kl(best, values)
            numbers[f"kl_to_best/{title}"] = measures.kl(values, best)
            numbers[f"mass/{title}"] = self.grid.mass(values)
        for title, values in {"best": best, **everyone}.items():
            parts = measures.by_centre(values, points, centres)
            numbers |= {f"mode{n}/{title}": share for n, share in enumerate(parts, 1)}
            reward = measures.whole(values).exp() @ self.preference.reward(points).double()
            numbers[f"reward/{title}"] = reward.item()
        # ``best`` is of cells; per area it is a density like the others
        area = 2 * torch.tensor(2 * self.grid.reach / self.grid.side).double().log()
        shown = {"reference": reference, "best": best - area, **logs}
        columns = {name: values.tolist() for name, values in shown.items()}
        rows = [
            {"x": x, "y": y, **{name: values[n] for name, values in columns.items()}}
            for n, (x, y) in enumerate(points.tolist())
        ]
        return rows, numbers


def table(final: Mapping[str, float], titles: Sequence[str]) -> str:
    """What a terminal shows: a line for each method."""
    names = ("pearson/surrogate", "spearman/surrogate", "pearson/bound", "displacement/truth")
    names = (*names, "displacement/surrogate", "kl_from_best", "kl_to_best", "reward")
    heads = [name.replace("displacement", "moved").replace("surrogate", "surr.") for name in names]
    lines = [f"{'method':<12}" + "".join(f"{head:>16}" for head in heads)]
    lines.append("-" * len(lines[0]))
    for title in titles:
        lines.append(f"{title:<12}" + "".join(f"{final[f'{n}/{title}']:>16.3f}" for n in names))
    return "\n".join(lines)
