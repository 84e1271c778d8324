"""A pipeline of diffusers in, or a small one built from config; latents and images out.

What differs between pipelines is how an image becomes latents (``Folded``, ``Encoded``) and how a
prompt becomes what the denoiser is told (``Words``, ``Texts``, ``Classes``).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from spo_lightning.data.pictures import Image
from spo_lightning.errors import UserError

Told = Mapping[str, Tensor]  # the denoiser's arguments besides image and time, of one prompt
WORDS = "words.json"  # what a pipeline that was built here has beside its denoiser and scheduler


class Codec(Protocol):
    """Images in [-1, 1], [N, 3, H, W], to latents and back."""

    @property
    def side(self) -> int:
        """Pixels of an image."""
        ...

    def encode(self, pixels: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Folded:
    """No autoencoder: a square of ``patch`` pixels becomes channels, exactly, which is cheaper."""

    patch: int
    side: int

    def encode(self, pixels: Tensor) -> Tensor:
        return F.pixel_unshuffle(pixels, self.patch)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.patch)


@dataclass(frozen=True)
class Encoded:
    """A pipeline's autoencoder; the mean of its posterior, so that an image has one latent."""

    vae: Any
    side: int

    @torch.no_grad()
    def encode(self, pixels: Tensor) -> Tensor:
        found = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist.mode()
        return (found - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        scaled = latents / self.vae.config.scaling_factor + self._shift
        return self.vae.decode(scaled.to(self.vae.dtype)).sample

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0


def said(prompt: str) -> list[str]:
    """The words of a prompt of a task that is made of few."""
    return prompt.replace(",", " ").split()


@dataclass(frozen=True)
class Words:
    """A word is a one-hot vector, which the denoiser's own cross-attention learns to embed."""

    words: Sequence[str]
    longest: int

    def __call__(self, prompt: str) -> Told:
        spoken = said(prompt)
        for word in spoken:
            if word not in self.words:
                raise UserError(f"prompt {prompt!r}: the model knows no {word!r}: it was built "
                                f"for {', '.join(self.words)}")  # fmt: skip
        if len(spoken) > self.longest:
            raise UserError(f"prompt {prompt!r}: the model reads {self.longest} words at most")
        told = torch.zeros(self.longest, len(self.words))
        for at, word in enumerate(spoken):
            told[at, self.words.index(word)] = 1.0
        return {"encoder_hidden_states": told}


@dataclass(frozen=True)
class Texts:
    """A pipeline's tokenizer and text encoder, as Stable Diffusion 1 and 2 have them."""

    tokenizer: Any
    encoder: Any

    @torch.no_grad()
    def __call__(self, prompt: str) -> Told:
        length = self.tokenizer.model_max_length
        how = {"padding": "max_length", "max_length": length, "truncation": True}
        ids = self.tokenizer(prompt, return_tensors="pt", **how).input_ids
        return {"encoder_hidden_states": self.encoder(ids.to(self.encoder.device))[0][0].cpu()}


@dataclass(frozen=True)
class Classes:
    """A pipeline's class names, or their numbers; "" is no class."""

    labels: Mapping[str, int]
    none: int

    def __call__(self, prompt: str) -> Told:
        if prompt and prompt not in self.labels and not prompt.isdigit():
            raise UserError(f"prompt {prompt!r} is none of the classes that the model draws")
        number = int(prompt) if prompt.isdigit() else self.labels.get(prompt, self.none)
        return {"class_labels": torch.tensor(number)}


@dataclass(frozen=True)
class Pipeline:
    """``denoiser`` trains; the rest stays as it is."""

    denoiser: Any
    scheduler: Any
    codec: Codec
    told: Callable[[str], Told]
    built: bool

    def latents(self, images: Sequence[Image]) -> Tensor:
        """[N, C, h, w] on the CPU; every image is brought to the pipeline's size."""
        side, found = self.codec.side, []
        for image in images:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1
            if pixels.shape[2:] != (side, side):
                how = {"mode": "bilinear", "antialias": True, "align_corners": False}
                pixels = F.interpolate(pixels, (side, side), **how)
            found.append(self.codec.encode(pixels).float().cpu())
        return torch.cat(found)

    def images(self, latents: Tensor) -> list[Image]:
        pixels = ((self.codec.decode(latents).float().clamp(-1, 1) + 1) * 127.5).round()
        return [*pixels.permute(0, 2, 3, 1).to("cpu", torch.uint8).numpy()]

    @torch.no_grad()
    def drawn(
        self,
        prompts: Sequence[str],
        *,
        seed: int,
        steps: int,
        guidance: float,
        size: int,
        advance: Callable[[int], None],
        precision: Callable[[], Any] = nullcontext,
    ) -> list[Image]:
        """An image of every prompt: the probability flow from noise that is the seed's and the
        place's own, so a prompt's image does not depend on the batch of ``size`` it is drawn in.
        ``guidance``: classifier-free (Ho and Salimans 2022, 2207.12598), 1 is none.
        """
        config, device, found = self.denoiser.config, self.denoiser.device, []
        shape = (config.in_channels, config.sample_size, config.sample_size)
        told = {prompt: self.told(prompt) for prompt in {*prompts}}
        empty = self.told("") if guidance != 1 else {}
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            mixed = (torch.Generator().manual_seed(seed * 1_000_003 + start + at)
                     for at in range(len(some)))  # fmt: skip
            latents = torch.stack([torch.randn(shape, generator=one) for one in mixed]).to(device)
            given = {
                name: torch.stack([told[prompt][name] for prompt in some]).to(device)
                for name in told[some[0]]
            }
            bare = {name: torch.stack([it] * len(some)).to(device) for name, it in empty.items()}
            sampler = _sampler(self.scheduler)
            sampler.set_timesteps(steps, device=device)
            for time in sampler.timesteps:
                with precision():
                    said = self._said(latents, time, given)
                    if bare:
                        without = self._said(latents, time, bare)
                        said = without + guidance * (said - without)
                latents = sampler.step(said.float(), time, latents).prev_sample
            found += self.images(latents)
            advance(len(some))
        return found

    def _said(self, latents: Tensor, time: Tensor, told: Told) -> Tensor:
        times = time.expand(len(latents))
        return self.denoiser(latents, times, **told).sample[:, : latents.shape[1]]

    def save(self, directory: Path) -> None:
        """The denoiser and its scheduler as diffusers has them; of a pipeline that was built here
        all that there is."""
        part = "unet" if "UNet" in type(self.denoiser).__name__ else "transformer"
        self.denoiser.save_pretrained(directory / part)
        self.scheduler.save_pretrained(directory / "scheduler")
        if isinstance(self.told, Words) and isinstance(self.codec, Folded):
            own = {"words": [*self.told.words], "longest": self.told.longest}
            own |= {"patch": self.codec.patch}
            (directory / WORDS).write_text(json.dumps(own), encoding="utf-8")


def _sampler(scheduler: Any) -> Any:
    """Deterministic, of the same schedule."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if "FlowMatch" in type(scheduler).__name__:
        return type(scheduler).from_config(scheduler.config)
    # DDIM clips what it takes for the image unless it is told not to, which latents do not bear
    clip = {"clip_sample": False, "set_alpha_to_one": False}
    return DDIMScheduler.from_config(scheduler.config, **clip)
