"""A loss in, whom it pushes at which margin out: two curves, as a small picture.

Policy and reference differ by half the margin on either side; both answers have ``LENGTH`` tokens.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning.losses import Moments, evaluate
from spo_lightning.models.scorer import PairLogps

LENGTH, NATS, RANGE, POINTS = 20, 2.0, 40.0, 81  # tokens, nats per token, nats of margin
WIDTH, HEIGHT, EDGE = 240, 110, 6
DONE = 0.01  # of the largest push: where it counts as over
CHOSEN, REJECTED = "#2563eb", "#dc2626"


class Pushes(NamedTuple):
    """What a step does to the two log-probabilities, over the margin [P]."""

    margin: Tensor
    chosen: Tensor  # -d loss / d log pi(y_w): above 0 it rises
    rejected: Tensor

    @property
    def largest(self) -> float:
        return max(self.chosen.abs().max().item(), self.rejected.abs().max().item())

    @property
    def over_from(self) -> float | None:
        """The margin from which on nobody is pushed any more; None: not in the range."""
        pushed = torch.maximum(self.chosen.abs(), self.rejected.abs()) > DONE * self.largest
        last = int(pushed.nonzero().max())
        return None if last == len(self.margin) - 1 else self.margin[last + 1].item()


def pushes(loss: partial) -> Pushes:
    margin = torch.linspace(-RANGE, RANGE, POINTS, dtype=torch.float64)
    found = []
    for h in margin:  # each alone, as some losses look at the whole batch
        moved = torch.stack([h / 2, -h / 2]).requires_grad_()
        start = torch.full((2 * LENGTH,), -NATS, dtype=torch.float64)
        side = torch.arange(2 * LENGTH) >= LENGTH
        pair, ones = torch.zeros_like(side).long(), torch.ones(1, dtype=torch.float64)
        given: Any = {"margins": ones, "divergences": torch.zeros_like(start)}
        given |= {"rows": pair[:1], "sentences": pair, "reference_sides": ones}
        policy = PairLogps(start + (moved / LENGTH)[side.long()], pair, side, 1, **given)
        reference = PairLogps(start, pair, side, 1)
        beside = reference, Moments(0.0, 1.0)
        value = evaluate(loss, policy, *beside, kl=torch.zeros(())).sum()
        found.append(-torch.autograd.grad(value, moved)[0])
    chosen, rejected = torch.stack(found).unbind(1)
    return Pushes(margin, chosen, rejected)


def svg(name: str, seen: Pushes) -> str:
    """The two curves, scaled to the larger of them; zero is the grey line."""
    middle, room = HEIGHT / 2, HEIGHT / 2 - EDGE

    def curve(values: Tensor, colour: str, dashes: str) -> str:
        across = EDGE + (WIDTH - 2 * EDGE) * (seen.margin + RANGE) / (2 * RANGE)
        down = middle - room * values / seen.largest
        points = " ".join(f"{x:.0f},{y + 0.0:.1f}" for x, y in zip(across.tolist(), down.tolist()))
        style = f'fill="none" stroke="{colour}" stroke-width="2" stroke-dasharray="{dashes}"'
        return f'<polyline {style} points="{points}"/>'

    def line(*at: float) -> str:
        ends = " ".join(f'{key}="{v:g}"' for key, v in zip(("x1", "y1", "x2", "y2"), at))
        return f'<line {ends} stroke="#9ca3af"/>'

    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            f'width="{WIDTH}" height="{HEIGHT}" role="img">',
            f"<title>{name}: push on the chosen answer (blue) and the rejected (dashed)</title>",
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            line(EDGE, middle, WIDTH - EDGE, middle),
            line(WIDTH / 2, EDGE, WIDTH / 2, HEIGHT - EDGE),
            curve(seen.chosen, CHOSEN, "none"),
            curve(seen.rejected, REJECTED, "6 3"),
            "</svg>\n",
        ]
    )
