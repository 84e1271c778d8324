"""An optimizer's step in float32 in, bfloat16 weights that follow it out.

Between 1 and 2 the neighbours in bfloat16 are 0.8% apart, and an update below half of that leaves
a weight where it was: at the rates that fit a pretrained model nearly all of them are. So the step
is taken on float32 copies, and the weights are these, rounded (``optimizer.bf16``):

- stochastic: up or down by chance, so that the mean is exact; a copy lives for its step;
- master: to the nearest; the copies stay, 4 bytes a weight, and what they gather shows in a weight
  once it is half a step;
- plain: there are no copies, and a line says what is lost.

torchao has the first for Adam alone, with moments in bfloat16 and noise that no checkpoint holds.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from spo_lightning.errors import UserError

log = logging.getLogger(__name__)

Make = Callable[[list[nn.Parameter]], Optimizer]

# weights whose copies are alive at once: on a CPU few, so that the allocator hands the same pages
# out again (fresh ones took longer than the step); a GPU's kernels want many
BLOCK = {"cpu": 2**22, "cuda": 2**27}
DRAWN = 2**22  # weights whose noise is alive at once


def learning(make: Make, how: str, seed: int) -> Make:
    """What makes an optimizer, and lets those of its parameters learn that are in bfloat16."""

    def made(parameters: list[nn.Parameter]) -> Optimizer:
        if all(p.dtype != torch.bfloat16 for p in parameters):
            return make(parameters)
        return HOW[how](parameters, make, seed)

    return made


class Widened(Optimizer):
    """The optimizer that ``make`` makes of float32 copies, block by block.

    It has its moments in float32. ``keep``: the copies stay; else the weights are what remains.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], make: Make, *, seed: int, keep: bool):
        # a parameter in float32 is its own copy: float() gives the same memory
        self.wide = [nn.Parameter(p.detach().float()) for p in parameters]
        self.inner = make(self.wide)
        super().__init__(parameters, self.inner.defaults)
        self.seed, self.keep, self.steps = seed, keep, 0
        self.blocks = _blocks(list(zip(parameters, self.wide)))
        if not keep:
            for copy in self.wide:
                copy.data = copy.new_empty(0)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None if closure is None else closure()
        self._pass_on()
        self.steps += 1
        device = self.wide[0].device
        # by step, not one stream: a checkpoint holds the count, whatever device goes on with it
        chance = torch.Generator(device).manual_seed((self.seed * 2**20 + self.steps) % 2**63)
        for block in self.blocks:
            for p, copy in block:
                if not self.keep:
                    copy.data = p.float().contiguous()
                copy.grad = None if p.grad is None else p.grad.float()
            self.inner.step()  # leaves alone what has no gradient, as all other blocks
            for p, copy in block:
                copy.grad = None
                whole = self.keep or p.dtype != torch.bfloat16
                p.copy_(copy if whole else dithered(copy.data, chance))
                if not self.keep:
                    copy.data = copy.new_empty(0)
        return loss

    def _pass_on(self) -> None:
        """What a schedule has set here, to the inner optimizer."""
        for mine, its in zip(self.param_groups, self.inner.param_groups):
            its.update({key: value for key, value in mine.items() if key != "params"})

    def state_dict(self) -> dict[str, Any]:
        self._pass_on()
        kept = [copy.detach() for copy in self.wide] if self.keep else []
        return {"inner": self.inner.state_dict(), "steps": self.steps, "wide": kept}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict["inner"])
        for mine, its in zip(self.param_groups, self.inner.param_groups):
            mine.update({key: value for key, value in its.items() if key != "params"})
        self.steps = state_dict["steps"]
        if self.keep:
            for copy, kept in zip(self.wide, state_dict["wide"], strict=True):
                copy.data.copy_(kept)


def _blocks(pairs: list[tuple[nn.Parameter, nn.Parameter]]) -> list[list[tuple]]:
    """In order, each of at most ``BLOCK`` weights, or of one tensor that has more."""
    blocks: list[list[tuple]] = []
    size, most = 0, BLOCK.get(pairs[0][0].device.type, BLOCK["cpu"])
    for p, copy in pairs:
        if not blocks or size + p.numel() > most:
            blocks.append([])
            size = 0
        blocks[-1].append((p, copy))
        size += p.numel()
    return blocks


def dithered(wide: Tensor, chance: torch.Generator) -> Tensor:
    """Float32, contiguous, rounded in place to one of its two neighbours in bfloat16.

    To the 16 bits that bfloat16 drops as many random ones are added, and what carries, counts: the
    nearer neighbour is the likelier, the mean is the value, and a value that bfloat16 has stays.
    """
    for bits in wide.view(-1).view(torch.int32).split(DRAWN):
        half = -(-len(bits) // 2)
        # a draw of 64 bits is the noise of four weights: drawing is the slower part
        drawn = torch.empty(-(-half // 2), dtype=torch.int64, device=wide.device)
        noise = drawn.random_(-(2**63), None, generator=chance).view(torch.int32)[:half]
        bits[:half] += noise & 0xFFFF
        bits[half:] += (noise >> 16)[: len(bits) - half] & 0xFFFF
        bits &= -0x10000
    return wide


def plain(parameters: list[nn.Parameter], make: Make, seed: int) -> Optimizer:
    """The optimizer as it is, which says after its first step how much of it was lost."""
    optimizer = make(parameters)
    before: list[Tensor] = []

    def keep(*_: Any) -> None:
        before.extend(p.detach().clone() for p in parameters)
        first.remove()

    def tell(*_: Any) -> None:
        wanted = lost = 0
        for p, old in zip(parameters, before):
            if p.dtype == torch.bfloat16 and p.grad is not None:
                asked = p.grad != 0
                wanted += int(asked.sum())
                lost += int((asked & (p == old)).sum())
        before.clear()
        after.remove()
        log.warning(
            "optimizer.bf16=plain: updates below half a step of bfloat16 are rounded away, %.0f%% "
            "of all in the first step; stochastic or master loses none",
            100 * lost / max(1, wanted),
        )

    first = optimizer.register_step_pre_hook(keep)
    after = optimizer.register_step_post_hook(tell)
    return optimizer


def stochastic(parameters: list[nn.Parameter], make: Make, seed: int) -> Optimizer:
    return Widened(parameters, make, seed=seed, keep=False)


def master(parameters: list[nn.Parameter], make: Make, seed: int) -> Optimizer:
    return Widened(parameters, make, seed=seed, keep=True)


HOW: dict[str, Callable[[list[nn.Parameter], Make, int], Optimizer]] = {
    "stochastic": stochastic,
    "master": master,
    "plain": plain,
}


def refuse_rounding(parameters: Sequence[Tensor]) -> None:
    """A solver's own steps on weights in bfloat16: they are short, and most would round away."""
    if any(p.dtype == torch.bfloat16 for p in parameters):
        raise UserError(
            "this solver takes steps of its own on the weights, and bfloat16 would round them "
            "away: set model.dtype=float32 (and hardware.precision=bf16-mixed)"
        )
