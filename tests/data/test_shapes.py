"""Rendered shapes: the verifier sees what was rendered, and the judge the frame alone."""

import numpy as np
import pytest

from spo_lightning.data.tasks.shapes import (
    NEAR,
    PROMPTS,
    WORDS,
    frame,
    nearest,
    render,
    renderings,
    right,
    seen,
    shapes,
)
from spo_lightning.errors import UserError

SMALL = dict(sft_rows=20, prompts=40, eval_prompts=14, framed=0.3, samples=4, seed=0)


def test_every_scene_is_told_apart_from_every_other():
    scenes, pixels = renderings()
    assert len({row.tobytes() for row in pixels}) == len(scenes)
    for scene in scenes[::37]:
        image = render(scene)
        assert nearest(image) == (scene, 0.0)
        assert right(scene.prompt, image) and frame(image) == scene.framed
        wrong = [other.prompt for other in PROMPTS if other.prompt != scene.prompt]
        assert not any(right(prompt, image) for prompt in wrong)


def test_noise_is_seen_through_and_nothing_is_nothing():
    scene = PROMPTS[5]._replace(framed=True)
    noise = np.random.default_rng(0).normal(0, NEAR / 2, (16, 16, 3))
    rough = np.clip(render(scene) + noise, 0, 255).astype(np.uint8)
    assert right(scene.prompt, rough) and seen(rough) == f"{scene.prompt}, framed"
    blank = np.zeros((16, 16, 3), np.uint8)
    assert not any(right(other.prompt, blank) for other in PROMPTS)
    assert seen(blank).startswith("nothing (")


def test_the_judge_counts_pixels_of_the_border():
    image = render(PROMPTS[0])
    image[0, :6] = 255
    assert frame(image) == pytest.approx(6 / 60)


def test_held_out_prompts_are_others():
    task = shapes(**SMALL)
    train, held = ({row.prompt for row in side} for side in (task.train, task.held_out))
    assert not train & held and len(train) == 36 and len(held) == 12
    assert len(task.train) == 40 and len(task.held_out) == 14 and len(task.texts) == 20
    assert all(right(row.prompt, row.chosen) for row in task.texts)
    words = {word for scene in PROMPTS for word in scene.prompt.replace(",", "").split()}
    assert words == {*WORDS}
    assert shapes(**SMALL).train == task.train
    assert shapes(**SMALL | {"seed": 1}).train != task.train


@pytest.mark.parametrize("word", [{"samples": 1}, {"framed": 1.0}, {"prompts": 0}])
def test_what_cannot_be_meant(word):
    with pytest.raises(UserError, match=f"data.{next(iter(word))}="):
        shapes(**SMALL | word)
