"""How far drawn images are from pictures: against the closed form, and by what is done to them."""

import random

import numpy as np
import pytest
import torch

from spo_lightning.data.pictures import PictureRow, Pictures
from spo_lightning.data.tasks.shapes import PROMPTS, render, shapes
from spo_lightning.diffusion.frechet import distance, distance_of


class Means(torch.nn.Module):
    """The mean of each colour: features whose moments can be chosen."""

    num_features = 3

    def forward(self, images):
        return images.double().mean((2, 3))


def plain(levels):
    """Images of one colour each, [N, 3] levels."""
    return [np.broadcast_to(row, (4, 4, 3)).astype(np.uint8) for row in levels]


def closed(one, other):
    """The same in numpy, with the square root taken by eigenvectors of a symmetric matrix."""
    means, spreads = zip(*((it.mean(0), np.cov(it.T)) for it in (one, other)))
    values, vectors = np.linalg.eigh(spreads[0])
    root = vectors @ np.diag(np.sqrt(np.maximum(values, 0))) @ vectors.T
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ spreads[1] @ root), 0)).sum()
    return np.square(means[0] - means[1]).sum() + sum(map(np.trace, spreads)) - 2 * cross


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("width", [3, 40])
def test_the_closed_form(seed, width):
    chance = np.random.default_rng(seed)
    one, other = chance.integers(0, width, (600, 3)) + 9, chance.integers(5, 3 * width, (90, 3))
    other[:, 1] += other[:, 0]
    found = distance(Means(), plain(one), plain(other))
    assert found == pytest.approx(closed(one, other), rel=1e-5)
    assert distance(Means(), plain(one), plain(one)) == pytest.approx(0, abs=1e-4)


@pytest.fixture(scope="module")
def task():
    return shapes(sft_rows=2000, prompts=36, eval_prompts=96, framed=0.3, samples=2, seed=0)


def rendered(task, seed, framed=0.3, noise=0.0):
    chance = random.Random(seed)
    by_prompt = {scene.prompt: scene for scene in PROMPTS}
    found = []
    for row in task.held_out:
        column, across, down = (chance.randrange(2) for _ in range(3))
        scene = by_prompt[row.prompt]._replace(column=column, across=across, down=down)
        image = render(scene._replace(framed=chance.random() < framed)).astype(float)
        image += np.random.default_rng(chance.randrange(2**31)).normal(0, noise, image.shape)
        found.append(image.clip(0, 255).astype(np.uint8))
    return found


def test_worse_images_are_farther(task):
    measured = distance_of(task)
    assert measured is not None
    same, framed, rough, lost = (
        [measured(rendered(task, seed, *how)) for seed in range(3)]
        for how in ((0.3, 0), (1.0, 0), (0.3, 30), (0.3, 90))
    )
    assert max(same) < min(framed) and 5 * max(framed) < min(rough)
    assert 5 * max(rough) < min(lost) and max(same) < 0.1
    assert measured([np.zeros((16, 16, 3), np.uint8)] * 96) > max(lost)


def test_it_is_the_same_for_every_run_and_draws_from_no_stream(task):
    images = rendered(task, 0, noise=9)
    found = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        measured = distance_of(task)
        assert measured is not None and torch.equal(before, torch.random.get_rng_state())
        found.add(measured(images))
    assert len(found) == 1


def test_a_task_without_pictures_has_none():
    row = PictureRow("one red ring, top")
    assert distance_of(Pictures(train=[row], held_out=[row])) is None
