r"""A noise schedule in; what stands in the place of an image's log-probability out.

For an image $x$ with noise $\epsilon$ at time $t$, $x_t = a_t x + s_t \epsilon$, the denoiser
predicts a target $v$ of the scheduler's own: the noise, the velocity, the image, or the flow. The
surrogate of $\log \pi(x)$ is

$$ l = -T w(t)\, \mathrm{mean}\,(v - v_\theta(x_t, t))^2 $$

whose difference against the reference at the same $t$ and $\epsilon$ is Diffusion-DPO's (Wallace
et al. 2023, 2311.12908, eq. 14): with $d = |\epsilon - \epsilon_\theta|^2 - |\epsilon -
\epsilon_{ref}|^2$ the margin is $l_w - l_l$ less the reference's, $-T w (d_w - d_l)$. Its
published code has the mean over elements and ``0.5 * beta_dpo`` where this has ``beta * T w``.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning.errors import UserError


class Target(NamedTuple):
    """What a denoiser is asked for. ``a`` and ``s``: the shares of image and noise."""

    of: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # image, noise, a, s
    each: Callable[[Tensor, Tensor], Tensor]  # its squared error, where the image's is 1; of a, s


# by the scheduler's prediction_type
TARGETS = {
    "epsilon": Target(lambda x, e, a, s: e, lambda a, s: (a / s).square()),
    "v_prediction": Target(lambda x, e, a, s: a * e - s * x, lambda a, s: 1 / s.square()),
    "sample": Target(lambda x, e, a, s: x, lambda a, s: torch.ones_like(a)),
}
FLOW = Target(lambda x, e, a, s: e - x, lambda a, s: 1 / s.square())


@dataclass(frozen=True)
class Schedule:
    """The noise schedule that a denoiser was trained with, in P places from little noise to much,
    or the other way round."""

    image: Tensor  # [P] a
    noise: Tensor  # [P] s
    times: Tensor  # [P] what the denoiser is told
    target: Target

    @classmethod
    def of(cls, scheduler: Any) -> "Schedule":
        """Of a diffusers scheduler as it comes from its config."""
        if hasattr(scheduler, "alphas_cumprod"):
            kind = scheduler.config.prediction_type
            if kind not in TARGETS:
                known = ", ".join(TARGETS)
                raise UserError(f"the scheduler predicts {kind}; known are {known} and flows")
            share = scheduler.alphas_cumprod.double()
            times = torch.arange(len(share))
            return cls(share.sqrt().float(), (1 - share).sqrt().float(), times, TARGETS[kind])
        if "FlowMatch" in type(scheduler).__name__:
            sigmas = scheduler.sigmas[: len(scheduler.timesteps)].float()
            return cls(1 - sigmas, sigmas, scheduler.timesteps.clone(), FLOW)
        raise UserError(
            f"{type(scheduler).__name__} has neither alphas_cumprod nor a flow: save the pipeline "
            "with the scheduler it was trained with"
        )

    def __len__(self) -> int:
        return len(self.times)

    def at(self, places: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """a and s of [N] places, to multiply [N, ...] with."""
        shape = (-1, *[1] * (like.dim() - 1))
        both = (it.to(like)[places].view(shape) for it in (self.image, self.noise))
        return next(both), next(both)

    def noised(self, latents: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """[N, ...] x_t."""
        a, s = self.at(places, latents)
        return a * latents + s * noise

    def asked(self, latents: Tensor, noise: Tensor, places: Tensor) -> Tensor:
        """[N, ...] the target."""
        return self.target.of(latents, noise, *self.at(places, latents))


def constant(schedule: Schedule) -> Tensor:
    """[P] every time counts the same: Diffusion-DPO's published code."""
    return torch.ones_like(schedule.image)


def min_snr(schedule: Schedule, *, gamma: float) -> Tensor:
    """[P] as errors of the image count at most ``gamma`` of their signal-to-noise ratio. Hang et
    al. 2023 (2303.09556): w = min(SNR, gamma) / SNR of noise, / (SNR + 1) of a velocity."""
    ratio = (schedule.image / schedule.noise).square()
    return ratio.clamp(max=gamma) / schedule.target.each(schedule.image, schedule.noise).clamp(
        min=1e-12
    )


def bound(schedule: Schedule) -> Tensor:
    r"""[P] as the variational bound counts them: errors of the noise by how fast $\lambda =
    \log a^2/s^2$ falls there. With ``scale`` half the number of elements l is then in nats, less
    what no denoiser changes. Kingma et al. 2021 (2107.00630), eq. 17: half the integral of
    $|\lambda'(t)| \lVert\epsilon - \epsilon_\theta\rVert^2$."""
    ratio = (schedule.image.double() / schedule.noise.double()).square()
    (falls,) = torch.gradient(ratio.log())
    each = schedule.target.each(schedule.image, schedule.noise).double()
    return (len(schedule) * falls.abs() * ratio / each.clamp(min=1e-12)).float()
