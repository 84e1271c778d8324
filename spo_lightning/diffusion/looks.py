"""Images that a policy drew in, how good they are and a grid to look at out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from spo_lightning.data.pictures import Image, PictureRow, Pictures
from spo_lightning.records.disk import writing

SHOWN, CELL, GAP = 64, 64, 2  # images of a grid; pixels of one at least, and between two
HEAD = 16  # pixels of a title
Judge = Callable[[Sequence[str], Sequence[Image]], list[float]]  # of prompts and images of them


@dataclass(frozen=True)
class Drawn:
    """One image of every held-out prompt. What the data cannot judge is left out."""

    images: Sequence[Image]
    seen: Sequence[str]
    right: Sequence[bool | None]
    liked: Sequence[float]

    @property
    def items(self) -> dict[str, list[float]]:
        """What each prompt adds to a number."""
        found = {"exact_match": [float(it) for it in self.right if it is not None]}
        return found | {"judge/score": [*self.liked]}


def judged(
    task: Pictures, judge: Judge | None, rows: Sequence[PictureRow], images: Sequence[Image]
) -> Drawn:
    seen = [task.seen(image) if task.seen else "" for image in images]
    right = [task.right(row.prompt, it) if task.right else None for row, it in zip(rows, images)]
    liked = judge([row.prompt for row in rows], images) if judge else []
    return Drawn(images, seen, right, liked)


def numbers(now: Drawn, start: Drawn) -> dict[str, float]:
    """Capability, and how often the judge prefers an image to the start's of the same prompt and
    the same noise; a tie is half."""
    found = {name: float(np.mean(it)) for name, it in now.items.items() if it}
    if now.liked:
        wins = [(a > b) + (a == b) / 2 for a, b in zip(now.liked, start.liked)]
        found["win_rate"] = float(np.mean(wins))
    return found


def picked(
    rows: Sequence[PictureRow], judge: Judge, images: Sequence[Image], samples: int
) -> list[PictureRow]:
    """Of every prompt's ``samples`` images the one that the judge likes best against the one it
    likes least, right or wrong; a prompt whose images it likes all the same has no pair."""
    liked = judge([row.prompt for row in rows for _ in range(samples)], images)
    found = []
    for at, row in enumerate(rows):
        first = at * samples
        some = liked[first : first + samples]
        best, worst = int(np.argmax(some)), int(np.argmin(some))
        if some[best] > some[worst]:
            found.append(PictureRow(row.prompt, images[first + best], images[first + worst]))
    return found


def grid(path: Path, panels: dict[str, Sequence[Image]]) -> None:
    """The panels side by side as a PNG, each with its title: an image of a place in one is of the
    same place's prompt in the others."""
    from PIL import Image as Pictured
    from PIL import ImageDraw

    shown = {title: [*images[:SHOWN]] for title, images in panels.items()}
    side = max(1, int(np.ceil(np.sqrt(max(map(len, shown.values()))))))
    first = next(image for images in shown.values() for image in images)
    cell = max(CELL, first.shape[0])
    step, width = cell + GAP, side * (cell + GAP)
    page = Pictured.new("RGB", (len(shown) * (width + HEAD) - HEAD, HEAD + width), "white")
    pen = ImageDraw.Draw(page)
    for number, (title, images) in enumerate(shown.items()):
        left = number * (width + HEAD)
        pen.text((left + 2, 2), title, fill="black")
        for at, image in enumerate(images):
            down, across = divmod(at, side)
            tile: Any = Pictured.fromarray(np.ascontiguousarray(image)).resize((cell, cell), 0)
            page.paste(tile, (left + across * step, HEAD + down * step))
    with writing(path):
        page.save(path)
