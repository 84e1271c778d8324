"""Pairs of images as latents in, batches of them with drawn times and noise out.

Letters for shapes: B pairs, S images of the batch, pair by pair, chosen before rejected, K draws
of a pair, ``...`` a latent's own [C, H, W].
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

HELD_OUT = -1  # the outer step of draws that are the same at every look


@dataclass(frozen=True)
class ImagePair:
    """A prompt and two images, by the names of their latents; "" where a row has but one."""

    prompt: str
    chosen: str
    rejected: str
    row: int  # its place in the source, for messages and draws

    @property
    def images(self) -> Iterator[tuple[bool, str]]:
        """Whether it is the rejected one, and its name."""
        sides = ((False, self.chosen), (True, self.rejected))
        return ((side, name) for side, name in sides if name)

    def __len__(self) -> int:
        return len([*self.images])


@dataclass(frozen=True)
class ImageBatch:
    """B pairs for the scorer. A pair's draws are those of both its images."""

    latents: Tensor  # [S, ...]
    conditions: Mapping[str, Tensor]  # what the denoiser is told of the prompt, [S, ...] each
    pair: Tensor  # [S]
    rejected: Tensor  # [S] bool: the side
    rows: Tensor  # [B] ImagePair.row
    times: Tensor | None = None  # [B, K] places in the noise schedule; None: not drawn yet
    noise: Tensor | None = None  # [B, K, ...]
    reference: Tensor | None = None  # [S] under the reference, at the same draws
    moved: None = None  # a reference of images stays where it is,
    lower: None = None  # and G is of the chosen images

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> int:
        """Images, which are counted where others count tokens."""
        return len(self.pair)

    @property
    def read(self) -> int:
        return len(self.pair)

    @cached_property
    def with_chosen(self) -> Tensor | None:
        """[N] the pairs that have a chosen image; None: all of them."""
        found = self.pair[~self.rejected]
        return None if len(found) == len(self) else found

    @cached_property
    def chosen_only(self) -> "ImageBatch":
        """The same rows without their rejected images."""
        kept = ~self.rejected
        some = {name: getattr(self, name) for name in ("latents", "pair", "rejected", "reference")}
        some = {name: None if it is None else it[kept] for name, it in some.items()}
        told = {name: it[kept] for name, it in self.conditions.items()}
        return replace(self, conditions=told, **some)

    def to(self, device: torch.device | str) -> "ImageBatch":
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        there = {name: it.to(device) for name, it in values.items() if isinstance(it, Tensor)}
        told = {name: it.to(device) for name, it in self.conditions.items()}
        return replace(self, conditions=told, **there)


class Draws(NamedTuple):
    """Times and noise, a function of seed, outer step and row and of nothing else: however a step
    is dealt into microbatches, and wherever a run goes on, they are the same."""

    seed: int
    count: int  # K
    places: int  # of the noise schedule

    def of(self, batch: ImageBatch, step: int) -> ImageBatch:
        """The batch with its draws. The k-th time of K falls into the k-th K-th of the schedule,
        which leaves the mean as it is and takes out most of its variance."""
        shape = (self.count, *batch.latents.shape[1:])
        times, noise = [], []
        for row in batch.rows.tolist():
            name = hashlib.blake2b(f"{self.seed}/{step}/{row}".encode(), digest_size=7)
            mixed = torch.Generator().manual_seed(int.from_bytes(name.digest(), "big"))
            within = torch.rand(self.count, generator=mixed, dtype=torch.float64)
            strata = (torch.arange(self.count) + within) / self.count
            times.append((strata * self.places).long().clamp(max=self.places - 1))
            noise.append(torch.randn(shape, generator=mixed))
        device, dtype = batch.latents.device, batch.latents.dtype
        return replace(
            batch,
            times=torch.stack(times).to(device),
            noise=torch.stack(noise).to(device, dtype),
        )


@dataclass(frozen=True)
class ImagePairs:
    """Pairs with the latents and the conditions that they name; what ``Pairs`` is of tokens.

    ``draws``: of held-out pairs, at which ``references`` were computed; training draws anew in
    every outer step.
    """

    pairs: Sequence[ImagePair]
    latents: Mapping[str, Tensor]
    conditions: Mapping[str, Mapping[str, Tensor]]  # by prompt
    draws: Draws | None = None
    references: Sequence[Tensor] | None = None  # [images of the row] each
    groups: Sequence[Sequence[str]] = ()
    orders: bool = False

    def __len__(self) -> int:
        return len(self.pairs)

    def take(self, indices: Sequence[int]) -> "ImagePairs":
        scored = self.references
        return replace(
            self,
            pairs=[self.pairs[i] for i in indices],
            references=None if scored is None else [scored[i] for i in indices],
        )

    def batch(self, indices: Sequence[int]) -> ImageBatch:
        pairs = [self.pairs[i] for i in indices]
        images = [(at, *it) for at, pair in enumerate(pairs) for it in pair.images]
        told: dict[str, Any] = {}
        for name in self.conditions[pairs[0].prompt]:
            told[name] = torch.stack(
                [self.conditions[pairs[at].prompt][name] for at, *_ in images]
            )
        scored = self.references
        batch = ImageBatch(
            latents=torch.stack([self.latents[name] for *_, name in images]),
            conditions=told,
            pair=torch.tensor([at for at, *_ in images]),
            rejected=torch.tensor([bool(side) for _, side, _ in images]),
            rows=torch.tensor([pair.row for pair in pairs]),
            reference=None if scored is None else torch.cat([scored[i] for i in indices]),
        )
        return batch if self.draws is None else self.draws.of(batch, HELD_OUT)

    def batches(self, size: int) -> list[list[int]]:
        return [list(range(s, min(s + size, len(self)))) for s in range(0, len(self), size)]


def mismatched(pairs: Sequence[ImagePair], first_row: int) -> list[ImagePair]:
    """Every prompt with an image of the row before it, the first with one of the last; none where
    there is but one. ``first_row``: numbers rows so that their draws are their own."""
    images = [(pair, name) for pair in pairs for _, name in pair.images]
    shifted = [name for _, name in [*images[-1:], *images[:-1]]]
    found = [
        ImagePair(pair.prompt, name, "", first_row + at)
        for at, ((pair, _), name) in enumerate(zip(images, shifted))
    ]
    return found if len(found) > 1 else []
