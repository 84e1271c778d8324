"""A problem in, a run directory of designs out: everything in the order in which it happens.

``metrics.csv`` and ``checkpoints/``: the three nets' training. ``designs.csv``: what each method
proposes, with its objectives. ``guidance.csv``: the numbers of each guidance weight.
``metrics.json``: what is proposed without guidance (init) and with it (final), and beside it the
known designs' best, chance, and a search on a surrogate.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.design import guided, preference, surrogate
from spo_lightning.design.measures import measured
from spo_lightning.design.offline import Collecting, Offline
from spo_lightning.design.order import Order
from spo_lightning.design.problem import Array, Problem
from spo_lightning.records.disk import write_csv, write_text
from spo_lightning.studies import denoiser
from spo_lightning.studies.denoiser import Schedule, Timed
from spo_lightning.studies.fitting import Book, Learning, Loss, Numbers, fit, generator, seeded

log = logging.getLogger(__name__)

COLUMNS = tuple(
    f"{split}/{name}"
    for name in ("denoiser/loss", "classifier/loss", "classifier/accuracy", "surrogate/loss")
    for split in ("train", "eval")
)
BARE = 0.0  # the weight of no guidance


@dataclass(frozen=True)
class Guidance:
    """How designs are drawn."""

    weight: float  # of the run's numbers
    weights: Sequence[float]  # others to look at
    samples: int
    clamp_every: int

    @property
    def all(self) -> list[float]:
        return sorted({BARE, float(self.weight), *map(float, self.weights)})


@dataclass(frozen=True)
class Study:
    """Learns from known designs and proposes others."""

    seed: int
    reads: Sequence[str]  # keys of train.yaml that it heeds; config/studies.py asks
    problem: Problem
    data: Collecting
    schedule: Schedule
    denoiser: Learning
    classifier: Learning
    threshold: float
    surrogate: Learning
    generations: int
    guidance: Guidance
    reference: float
    report: Callable[[Path], Any]  # reads the files; called by the command after ``run``

    @property
    def total(self) -> int:
        """Steps of the three nets' training, and of drawing designs at each weight."""
        learned = (self.denoiser, self.classifier, self.surrogate)
        return sum(how.steps for how in learned) + self.schedule.times * len(self.guidance.all)

    def run(
        self,
        directory: Path,
        advance: Callable[..., Any],
        *,
        log_every: int,
        checkpoint_every: int,
    ) -> dict[str, Any]:
        """Write the files and return metrics.json. A directory with a checkpoint is gone on in."""
        known = self.data.of(self.problem, seeded(self.seed, "data"))
        log.info("%s", self.told(known))
        book = Book(directory, checkpoint_every, log_every, COLUMNS, advance)
        nets = self.trained(known, book)
        proposed = self.proposed(known, nets, advance)
        rows, guidance, found = [], [], {}
        for (method, weight), designs in proposed.items():
            objectives = self.problem.measured(designs)
            numbers = measured(known.scaled(objectives), self.reference)
            rows += listed(method, weight, designs, objectives)
            if method == "guided":
                guidance.append({"weight": weight} | numbers)
            else:
                found[method] = numbers
        write_csv(directory / "designs.csv", rows)
        write_csv(directory / "guidance.csv", guidance)
        numbers = self.numbers(found, guidance)
        write_text(directory / "metrics.json", json.dumps(numbers, indent=1) + "\n")
        log.info("\n%s\n", table(numbers["final"]))
        return numbers

    def told(self, known: Offline) -> str:
        count, of = len(known.designs), known.order.rank
        return (
            f"{self.problem.name}: {self.problem.width} variables, "
            f"{known.objectives.shape[1]} objectives; {count} known designs in {of.max() + 1} "
            f"fronts, {known.held_out} of them held out; the best {self.data.left_out:.0%} of "
            "what was measured are left out"
        )

    def trained(self, known: Offline, book: Book) -> dict[str, Timed]:
        """The denoiser, the classifier and the surrogate, of the designs that are not held out."""
        inputs, learns = known.designs.shape[1], len(known.designs) - known.held_out
        outputs = {"denoiser": inputs, "classifier": 1, "surrogate": known.objectives.shape[1]}
        nets = {
            name: getattr(self, name).net(inputs, size, seeded(self.seed, f"{name}, weights"))
            for name, size in outputs.items()
        }
        learned = self.losses(known, nets, slice(learns))
        held_out = self.losses(known, nets, slice(learns, None))
        for name, net in nets.items():
            fit(name, net, getattr(self, name), learned[name], held_out[name], self.seed, book)
        book.close()
        return {name: net.eval().requires_grad_(False) for name, net in nets.items()}

    def losses(self, known: Offline, nets: Mapping[str, Timed], rows: slice) -> dict[str, Loss]:
        """Of each net, over some of the designs: what a batch of draws comes to."""
        designs = torch.from_numpy(known.designs[rows]).float()
        objectives = torch.from_numpy(known.scaled(known.objectives[rows])).float()
        order = known.order.take(rows)

        def some(how: Learning, draws: torch.Generator) -> Tensor:
            return torch.randint(len(designs), (how.batch_size,), generator=draws)

        def denoising(draws: torch.Generator) -> Numbers:
            batch = designs[some(self.denoiser, draws)]
            return {"loss": denoiser.loss(nets["denoiser"], self.schedule, batch, draws)}

        def preferring(draws: torch.Generator) -> Numbers:
            pairs = preference.pairs(order, self.classifier.batch_size, self.threshold, draws)
            better, worse = (designs[places] for places in pairs)
            found = preference.loss(nets["classifier"], self.schedule, better, worse, draws)
            return dict(zip(("loss", "accuracy"), found))

        def predicting(draws: torch.Generator) -> Numbers:
            batch = some(self.surrogate, draws)
            told = surrogate.predicted(nets["surrogate"], designs[batch])
            return {"loss": F.mse_loss(told, objectives[batch])}

        return {"denoiser": denoising, "classifier": preferring, "surrogate": predicting}

    def proposed(
        self, known: Offline, nets: Mapping[str, Timed], advance: Callable[..., Any]
    ) -> dict[tuple[str, float], Array]:
        """By method and weight; the known designs' best are such proposals too."""
        count = self.guidance.samples
        best = known.designs[known.best(count)]
        dimensions = known.objectives.shape[1]
        asked = (nets["surrogate"], best, dimensions, count, self.generations)
        found: dict[tuple[str, float], Array] = {
            ("data", BARE): best,
            ("random", BARE): surrogate.at_random(
                self.problem.width, count, seeded(self.seed, "random")
            ),
            ("surrogate", BARE): surrogate.searched(*asked, seeded(self.seed, "surrogate search")),
        }
        for weight in self.guidance.all:
            drawn = guided.sampled(
                nets["denoiser"],
                nets["classifier"],
                self.schedule,
                torch.from_numpy(best[0]).float(),
                count=count,
                weight=weight,
                clamp_every=self.guidance.clamp_every,
                draws=generator(self.seed, "designs"),
                advance=lambda: advance(text="designs"),
            )
            found["guided", weight] = drawn.double().numpy()
        return found

    def numbers(
        self,
        found: Mapping[str, Mapping[str, float]],
        guidance: Sequence[Mapping[str, float]],
    ) -> dict[str, Any]:
        """metrics.json."""
        by_weight = {
            row["weight"]: {name: value for name, value in row.items() if name != "weight"}
            for row in guidance
        }
        others = {**found, "unguided": by_weight[BARE]}
        beside = {
            f"{name}/{method}": numbers[name]
            for name in by_weight[BARE]
            for method, numbers in others.items()
        }
        return {
            "init": by_weight[BARE],
            "final": {**by_weight[float(self.guidance.weight)], **beside},
            "steps": self.denoiser.steps + self.classifier.steps + self.surrogate.steps,
        }


def table(final: Mapping[str, float]) -> str:
    """What a terminal shows: a line for each method."""
    names = [name for name in final if "/" not in name]
    methods = {name.partition("/")[2] for name in final if "/" in name}
    rows = {"guided": [final[name] for name in names]}
    rows |= {method: [final[f"{name}/{method}"] for name in names] for method in sorted(methods)}
    lines = [f"{'proposed':<16}" + "".join(f"{name:>14}" for name in names)]
    lines.append("-" * len(lines[0]))
    return "\n".join(
        [
            *lines,
            *(f"{it:<16}" + "".join(f"{v:>14.4f}" for v in some) for it, some in rows.items()),
        ]
    )


def listed(method: str, weight: float, designs: Array, objectives: Array) -> list[dict[str, Any]]:
    """Rows of designs.csv."""
    front = Order.of(objectives).rank == 0
    rows = []
    for design, values, first in zip(designs.tolist(), objectives.tolist(), front.tolist()):
        row: dict[str, Any] = {"method": method, "weight": weight, "front": int(first)}
        row |= {f"f{n}": value for n, value in enumerate(values, 1)}
        rows.append(row | {f"x{n}": value for n, value in enumerate(design, 1)})
    return rows
