"""Held-out pairs and a denoiser in, what its likelihood and its surrogates say of them out."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning.diffusion.batch import HELD_OUT, Draws
from spo_lightning.diffusion.objective import Schedule, bound
from spo_lightning.diffusion.scorer import ImageScorer
from spo_lightning.mixture import measures
from spo_lightning.mixture.likelihood import Flow
from spo_lightning.mixture.training import Denoiser, batch_of

AT_ONCE = 64  # pairs whose draws are scored together


class Sides(NamedTuple):
    """Log-probabilities of pairs, [B, 2] each, chosen first; or their changes."""

    truth: Tensor
    surrogate: Tensor  # as trained on, many draws
    one: Tensor  # the same, one draw
    bound: Tensor  # the variational bound's weights, in nats

    def less(self, other: "Sides") -> "Sides":
        return Sides(*(mine - theirs for mine, theirs in zip(self, other)))


@dataclass(frozen=True)
class HeldOut:
    """Pairs, and how they are looked at: at draws that are the same at every look."""

    pairs: Tensor  # [B, 2, D]
    flow: Flow
    schedule: Schedule
    scale: float
    weights: Tensor
    draws: int
    seed: int

    @torch.no_grad()
    def under(self, denoiser: Denoiser) -> Sides:
        points = self.pairs.flatten(0, 1)
        found = [self.flow.log_density(denoiser.predict, points).view(-1, 2)]
        nats = 0.5 * points.shape[1], bound(self.schedule)
        own = self.scale, self.weights
        for (scale, weights), count in ((own, self.draws), (own, 1), (nats, self.draws)):
            scorer = ImageScorer(denoiser, self.schedule, scale=scale, weights=weights)
            spread, parts = Draws(self.seed, count, len(self.schedule)), []
            for first in range(0, len(self.pairs), AT_ONCE):
                some = self.pairs[first : first + AT_ONCE]
                batch = batch_of(some, torch.arange(first, first + len(some)))
                parts.append(scorer(spread.of(batch, HELD_OUT)).sums)
            found.append(torch.cat(parts))
        return Sides(*found)


def moment(moved: Sides) -> dict[str, float]:
    """A row of moments.csv of changes against the reference: surrogates beside truth."""
    margins = Sides(*(it[:, 0] - it[:, 1] for it in moved))
    found: dict[str, float] = {}
    for name in Sides._fields[1:]:
        said = getattr(margins, name)
        found[f"pearson/{name}"] = measures.pearson(said, margins.truth)
        found[f"spearman/{name}"] = measures.spearman(said, margins.truth)
        found[f"slope/{name}"] = measures.slope(said, margins.truth)
    for name in Sides._fields:
        chosen, margin = getattr(moved, name)[:, 0].double(), getattr(margins, name).double()
        found[f"margin/{name}"] = margin.mean().item()
        found[f"accuracy/{name}"] = (margin > 0).double().mean().item()
        found[f"displacement/{name}"] = chosen.mean().item()
        found[f"displaced/{name}"] = (chosen < 0).double().mean().item()
    return found


def pair_by_pair(moved: Mapping[str, Sides]) -> list[dict[str, Any]]:
    """Rows of pairs.csv, of each method's changes against the reference."""
    rows = []
    for title, sides in moved.items():
        for pair in range(len(sides.truth)):
            row: dict[str, Any] = {"method": title, "pair": pair}
            for name, values in sides._asdict().items():
                row |= dict(zip((f"{name}_chosen", f"{name}_rejected"), values[pair].tolist()))
            rows.append(row)
    return rows
