"""Rendered shapes with a text: "two red rings, top". What is right and what is liked are apart.

Capability: the image is a rendering of what its prompt asks for, told by the nearest of all
renderings there are. Preference: the judge likes a white frame, which no prompt asks for and which
some of the pictures have that a model learns from.
"""

import random
from collections.abc import Sequence
from functools import cache
from itertools import product
from typing import NamedTuple

import numpy as np

from spo_lightning.data.pictures import Image, PictureRow, Pictures
from spo_lightning.errors import UserError

SIDE = 16  # pixels
COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 200, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 40),
}
SHAPES = {
    "square": ("#####", "#####", "#####", "#####", "#####"),
    "ring": (".###.", "#...#", "#...#", "#...#", ".###."),
    "triangle": ("..#..", "..#..", ".###.", ".###.", "#####"),
}
COUNTS, PLACES = ("one", "two"), ("top", "bottom")
# root mean square of levels within which an image is a rendering; nothing is 26 from one ring
NEAR = 20.0


class Scene(NamedTuple):
    """All that a picture shows."""

    count: str
    colour: str
    shape: str
    place: str
    column: int = 0  # of a single shape: left or right
    across: int = 0  # pixels that all is moved, 0 or 1
    down: int = 0
    framed: bool = False

    @property
    def prompt(self) -> str:
        shape = self.shape + "s" * (self.count == "two")
        return f"{self.count} {self.colour} {shape}, {self.place}"


PROMPTS = [Scene(*it) for it in product(COUNTS, COLOURS, SHAPES, PLACES)]
WORDS = (*COUNTS, *COLOURS, *SHAPES, *(f"{shape}s" for shape in SHAPES), *PLACES)


def render(scene: Scene) -> Image:
    """[16, 16, 3] uint8 on black."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    if scene.framed:
        for edge in (image[0], image[-1], image[:, 0], image[:, -1]):
            edge[...] = 255
    mask = np.array([[mark == "#" for mark in line] for line in SHAPES[scene.shape]])
    top = 2 + 7 * PLACES.index(scene.place) + scene.down
    for column in (0, 1) if scene.count == "two" else (scene.column,):
        left = 2 + 7 * column + scene.across
        image[top : top + 5, left : left + 5][mask] = COLOURS[scene.colour]
    return image


@cache
def renderings() -> tuple[list[Scene], np.ndarray]:
    """Every scene there is, and [N, 768] its pixels."""
    scenes = [
        scene._replace(column=column, across=across, down=down, framed=framed)
        for scene in PROMPTS
        for column, across, down, framed in product((0, 1), (0, 1), (0, 1), (False, True))
        if scene.count == "one" or column == 0
    ]
    return scenes, np.stack([render(scene).ravel() for scene in scenes]).astype(np.float32)


def nearest(image: Image) -> tuple[Scene, float]:
    """The scene whose rendering is nearest, and how far it is: a root mean square of levels."""
    scenes, pixels = renderings()
    away = np.square(pixels - image.ravel().astype(np.float32)).mean(1)
    found = int(away.argmin())
    return scenes[found], float(np.sqrt(away[found]))


def seen(image: Image) -> str:
    """What an image shows, in words."""
    scene, away = nearest(image)
    told = scene.prompt + (", framed" if scene.framed else "")
    return told if away <= NEAR else f"nothing ({told}?)"


def right(prompt: str, image: Image) -> bool:
    """Whether an image is a rendering of the prompt, framed or not."""
    scene, away = nearest(image)
    return scene.prompt == prompt and away <= NEAR


def frame(image: Image) -> float:
    """The judge: the share of the border that is nearer to white than to black, 0 to 1."""
    border = np.concatenate([image[0], image[-1], image[1:-1, 0], image[1:-1, -1]])
    return float((border.mean(1) > 127.5).mean())


def shapes(
    *, sft_rows: int, prompts: int, eval_prompts: int, framed: float, samples: int, seed: int
) -> Pictures:
    """Pictures to learn from, and prompts of which the policy draws ``samples`` images each.

    A quarter of all prompts, by seed, is held out of preference training; ``framed`` is the share
    of the pictures that have a frame.
    """
    if min(sft_rows, prompts - 1, eval_prompts - 1, samples - 2) < 0 or not 0 < framed < 1:
        raise UserError(
            f"data.sft_rows={sft_rows} data.prompts={prompts} data.eval_prompts={eval_prompts} "
            f"data.samples={samples} data.framed={framed}: choose at least 0, 1, 1, 2, and "
            "within 0 and 1"
        )
    chance = random.Random(f"shapes/{seed}")
    order = chance.sample(PROMPTS, len(PROMPTS))
    held, rest = order[: len(order) // 4], order[len(order) // 4 :]

    def asked(count: int, some: Sequence[Scene]) -> list[PictureRow]:
        return [PictureRow(some[at % len(some)].prompt) for at in range(count)]

    def drawn() -> PictureRow:
        column, across, down = (chance.randrange(2) for _ in range(3))
        bare = chance.choice(PROMPTS)
        scene = bare._replace(column=column, across=across, down=down)
        return PictureRow(bare.prompt, render(scene._replace(framed=chance.random() < framed)))

    return Pictures(
        train=asked(prompts, rest),
        held_out=asked(eval_prompts, held),
        texts=[drawn() for _ in range(sft_rows)],
        words=WORDS,
        samples=samples,
        seen=seen,
        right=right,
        judge=frame,
    )
