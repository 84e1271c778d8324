"""Tiny denoisers of two architectures, and random pairs of images for them."""

import pytest
import torch

from spo_lightning.diffusion.batch import Draws, ImagePair, ImagePairs
from spo_lightning.diffusion.objective import Schedule, constant
from spo_lightning.diffusion.scorer import ImageScorer

diffusers = pytest.importorskip("diffusers")
SIZE, CHANNELS, PLACES = 8, 3, 20
PROMPTS = ("one", "two", "three")


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=SIZE,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        layers_per_block=1,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=4,
        attention_head_dim=4,
    )


def dit():
    """It says variances too, which the surrogate leaves out."""
    made = diffusers.DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=4,
        in_channels=CHANNELS,
        out_channels=2 * CHANNELS,
        num_layers=1,
        sample_size=SIZE,
        patch_size=4,
        num_embeds_ada_norm=len(PROMPTS),
    )
    torch.nn.init.normal_(made.proj_out_2.weight, std=0.3)
    return made


CONDITIONS = {
    unet: lambda n: {"encoder_hidden_states": torch.randn(2, 4).double()},
    dit: lambda n: {"class_labels": torch.tensor(n)},
}


def scheduler(kind):
    if kind == "flow":
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=PLACES, shift=2.0)
    return diffusers.DDPMScheduler(num_train_timesteps=PLACES, prediction_type=kind)


def scorer(make=unet, kind="epsilon", *, scale=30.0, weight=constant, seed=0):
    """In float64, so that a wrong sign or place shows and rounding does not."""
    torch.manual_seed(seed)
    schedule = Schedule.of(scheduler(kind))
    denoiser = make().double().eval()
    return ImageScorer(denoiser, schedule, scale=scale, weights=weight(schedule).double())


def pairs(make=unet, count=3, *, draws=2, sides=2, seed=0):
    torch.manual_seed(seed)
    names = [f"{at}/{side}" for at in range(count) for side in range(2)]
    return ImagePairs(
        [
            ImagePair(PROMPTS[at % 3], f"{at}/0", f"{at}/1" if sides == 2 else "", at)
            for at in range(count)
        ],
        {name: torch.randn(CHANNELS, SIZE, SIZE).double() for name in names},
        {prompt: CONDITIONS[make](n) for n, prompt in enumerate(PROMPTS)},
        Draws(0, draws, PLACES),
    )
