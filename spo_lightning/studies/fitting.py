"""Nets and their losses in, trained nets out; what is kept of a run so that it can go on.

The nets of a run are trained one after the other. Each has its own draws, so that what it learns
depends on no other, and a run that goes on finds each of them where the checkpoint has it.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spo_lightning.errors import Diverged, Interrupted
from spo_lightning.records import checkpoints
from spo_lightning.records.directory import MetricsCsv, cut_after
from spo_lightning.studies.denoiser import Timed

Numbers = Mapping[str, Tensor]
Loss = Callable[[torch.Generator], Numbers]
OFTEN = 20  # looks at held-out rows in a net's training
CLIPPED = 1.0  # the gradient's norm, as published


def seeded(seed: int, name: str) -> int:
    """A seed of its own for each part of a run."""
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=4)
    return int.from_bytes(digest.digest(), "big")


def generator(seed: int, name: str) -> torch.Generator:
    return torch.Generator().manual_seed(seeded(seed, name))


@dataclass(frozen=True)
class Learning:
    """A net's shape and how it is trained."""

    width: int
    depth: int
    steps: int
    batch_size: int
    lr: float
    weight_decay: float

    def net(self, inputs: int, outputs: int, seed: int) -> Timed:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Timed(inputs, outputs, self.width, self.depth)


class Book:
    """Where a run has got to: the rows of metrics.csv and checkpoints/last.ckpt."""

    def __init__(
        self, directory: Path, every: int, log_every: int, columns: Sequence[str], advance: Any
    ):
        self.last = directory / "checkpoints" / "last.ckpt"
        self.every, self.log_every, self.advance = every, log_every, advance
        found = checkpoints.newest(self.last, self.last.with_name("best.ckpt"))
        held = {"spo_lightning": {"outer_step": 0}, "nets": {}} if found is None else found[1]
        self.step, self.nets = held["spo_lightning"]["outer_step"], dict(held["nets"])
        table = directory / "metrics.csv"
        cut_after(table, self.step)
        self.metrics = MetricsCsv(table, ["step", *columns])
        if self.step:
            advance(self.step, check=False)

    def went(self, name: str, state: Callable[[], dict[str, Any]], ended: bool) -> None:
        """After a step of the net: keep its state where it is due, or where a signal came."""
        self.step += 1
        if ended or (self.every and self.step % self.every == 0):
            self._keep(name, state())
        try:
            self.advance(text=name)
        except Interrupted:
            self._keep(name, state())
            raise

    def log(self, row: Mapping[str, Tensor]) -> None:
        """Of the step that is being taken."""
        self.metrics.write({"step": self.step + 1} | {k: v.item() for k, v in row.items()})

    def close(self) -> None:
        """The training has ended: the checkpoint before the last one has no use any more."""
        checkpoints.remove(checkpoints.former(self.last))

    def _keep(self, name: str, state: dict[str, Any]) -> None:
        self.nets[name] = state
        tree = {"spo_lightning": {"outer_step": self.step}, "nets": self.nets}
        checkpoints.put(
            self.last,
            lambda beside: checkpoints.write(tree, beside),
            keep_former=True,
            first=True,
        )


def fit(
    name: str,
    net: nn.Module,
    how: Learning,
    loss: Loss,
    held_out: Loss,
    seed: int,
    book: Book,
) -> None:
    """Train the net in place, from where the book has it. A loss is of a batch that its draws
    pick; its number ``loss`` is what is minimised. ``held_out`` draws alike at each look."""
    draws = generator(seed, name)
    optimizer = torch.optim.AdamW(
        net.parameters(), lr=how.lr, weight_decay=how.weight_decay, fused=True
    )
    done = 0
    if name in book.nets:
        held = book.nets[name]
        net.load_state_dict(held["net"])
        optimizer.load_state_dict(held["optimizer"])
        draws.set_state(held["draws"])
        done = held["step"]

    def state() -> dict[str, Any]:
        parts = {"net": net.state_dict(), "optimizer": optimizer.state_dict()}
        return parts | {"draws": draws.get_state(), "step": done}

    look = max(1, how.steps // OFTEN)
    while done < how.steps:
        numbers = loss(draws)
        if not torch.isfinite(numbers["loss"]):
            raise Diverged(
                f"{name}, step {done + 1}: the loss is not finite; lower study.{name}.lr"
            )
        optimizer.zero_grad()
        numbers["loss"].backward()
        nn.utils.clip_grad_norm_(net.parameters(), CLIPPED)
        row = {}
        if done == 0 or (done + 1) % book.log_every == 0:
            row = {f"train/{name}/{key}": value.detach() for key, value in numbers.items()}
        optimizer.step()
        done += 1
        if done % look == 0:
            with torch.no_grad():
                looked = held_out(generator(seed, f"{name}, held out"))
                row |= {f"eval/{name}/{key}": value for key, value in looked.items()}
        if row:
            book.log(row)
        book.went(name, state, done == how.steps)
