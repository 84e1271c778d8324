"""A task's pictures in, how far drawn images are from them out.

The Fréchet distance of two Gaussians, |m - m'|^2 + tr(C + C' - 2 (C C')^1/2), as FID has it
(Heusel et al. 2017, 1706.08500), over features of a small classifier that is trained here on the
pictures' own words, and not of Inception: no number of another task compares with it.
"""

import logging
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spo_lightning.data.pictures import Image, Pictures
from spo_lightning.diffusion.pipeline import said

log = logging.getLogger(__name__)

EPOCHS, SIZE, LR = 12, 128, 3e-3  # passes over the pictures, of a batch, of AdamW
AT_ONCE = 512  # images that a forward reads
Distance = Callable[[Sequence[Image]], float]


class Classifier(nn.Module):
    """Which words a picture's prompt has; called, the 16 features of the layer before."""

    num_features = 16  # few, as a hundred images have to say how they covary

    def __init__(self, words: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU()),
            *(nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(512, 64), nn.ReLU()),
            *(nn.Linear(64, self.num_features), nn.BatchNorm1d(self.num_features, affine=False)),
        )
        self.head = nn.Linear(self.num_features, words)

    def forward(self, images: Tensor) -> Tensor:
        """[N, 3, H, W] of levels 0 to 255 to [N, 16]."""
        return self.body(images.float() / 127.5 - 1)


def distance_of(task: Pictures) -> Distance | None:
    """The distance of images from the task's pictures of its held-out prompts; None where it has
    no pictures. The same net for every run of a task, whatever its seed."""
    asked = {row.prompt for row in task.held_out}
    real = [row.chosen for row in task.texts if row.prompt in asked]
    if len(real) < 2:
        return None
    net = _trained(task)
    return lambda drawn: distance(net, real, drawn)


def distance(net: nn.Module, real: Sequence[Image], drawn: Sequence[Image]) -> float:
    """0 of images that are distributed alike under the net's features. Those of ``Classifier``
    have variance 1 over its task's pictures: 1 is one of their means moved by one deviation."""
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=net)
    for images, side in ((real, True), (drawn, False)):
        for start in range(0, len(images), AT_ONCE):
            with torch.no_grad():
                metric.update(_pixels(images[start : start + AT_ONCE]), real=side)
    return float(metric.compute())


def _trained(task: Pictures) -> Classifier:
    pixels = _pixels([row.chosen for row in task.texts])
    spoken = [set(said(row.prompt)) for row in task.texts]
    words = torch.tensor([[float(word in some) for word in task.words] for some in spoken])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = Classifier(len(task.words))
        optimizer = torch.optim.AdamW(net.parameters(), lr=LR)
        for _ in range(EPOCHS):
            for some in torch.randperm(len(pixels)).split(SIZE):
                optimizer.zero_grad()
                told = net.head(net(pixels[some]))
                F.binary_cross_entropy_with_logits(told, words[some]).backward()
                optimizer.step()
    with torch.no_grad():
        told = torch.cat([net.head(net(some)) for some in pixels.split(AT_ONCE)]) > 0
    right = (told == words.bool()).all(1).double().mean().item()
    log.info("Features: a classifier that has all words of %.0f%% of the pictures", 100 * right)
    return net.eval()


def _pixels(images: Sequence[Image]) -> Tensor:
    """[N, 3, H, W] uint8."""
    return torch.from_numpy(np.stack([*images])).permute(0, 3, 1, 2).contiguous()
