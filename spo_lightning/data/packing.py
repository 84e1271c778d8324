"""The row without padding that a PairBatch becomes: every prompt once, then every response.

Letters as in ``batch``; U prompts, R responses, N tokens of the row. A response's last token is
left out: it predicts nothing that is scored, and nothing attends to it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask


@dataclass(frozen=True)
class Block:
    """Stretches of the row as the rows of a rectangle, and back."""

    there: Tensor  # [rows, width] place in the row; the padding points anywhere in it
    back: Tensor  # [tokens] place in the flattened rectangle
    length: Tensor  # [rows]

    @classmethod
    def of(cls, length: Tensor, start: int) -> "Block":
        """Stretches of these lengths, one after the other from place ``start`` of the row."""
        columns = torch.arange(max(1, int(length.max())), device=length.device)
        inside = columns < length[:, None]
        ends = length.cumsum(0)
        there = (ends - length)[:, None] + columns
        return cls(
            there=start + there.clamp(max=max(0, int(ends[-1]) - 1)),
            back=inside.flatten().nonzero().squeeze(1),
            length=length,
        )


@dataclass(frozen=True)
class Stretches:
    """The row as what a kernel of variable lengths takes: every stretch with the tokens it may
    attend to, its prompt's and its own; the last of these is its own last."""

    keys: Tensor  # [K] place in the row
    ends: Tensor  # [U + R + 1] int32: where stretches end, from 0 on
    key_ends: Tensor  # the same of their keys
    longest: int  # tokens of a stretch, at most
    most_keys: int

    @classmethod
    def of(cls, prompts: Block, responses: Block, prompt_of: Tensor) -> "Stretches":
        own = torch.cat([prompts.length, responses.length])
        given = torch.cat([torch.zeros_like(prompts.length), prompts.length[prompt_of]])
        width = own + given
        starts = own.cumsum(0) - own
        before = torch.cat([starts[: len(prompts.length)], starts[prompt_of]])
        # a key's place among its stretch's keys, then in the row: in the prompt, or past it
        place = torch.arange(int(width.sum())) - (width.cumsum(0) - width).repeat_interleave(width)
        inside = place < given.repeat_interleave(width)
        shift = torch.where(
            inside, before.repeat_interleave(width), (starts - given).repeat_interleave(width)
        )
        ends, key_ends = (F.pad(n.cumsum(0), (1, 0)).int() for n in (own, width))
        return cls(place + shift, ends, key_ends, int(own.max()), int(width.max()))


@dataclass(frozen=True)
class Tree:
    """Who attends to whom in the row: a prompt to itself, a response to its prompt and itself."""

    prompts: Block
    responses: Block
    prompt_of: Tensor  # [R] which of the U prompts
    stretches: Stretches | None = None  # where a GPU will read it

    @cached_property
    def longest(self) -> int:
        """Tokens at most that attend to one another."""
        return self.prompts.there.shape[1] + self.responses.there.shape[1]

    @cached_property
    def lengths(self) -> list[int]:
        """Tokens of every stretch of the row: the prompts, then the responses."""
        return [*self.prompts.length.tolist(), *self.responses.length.tolist()]

    @cached_property
    def prompt_before(self) -> list[int | None]:
        """Which prompt a stretch goes on from; none for a prompt."""
        return [*[None] * len(self.prompts.length), *self.prompt_of.tolist()]

    @cached_property
    def keys(self) -> Tensor:
        """[R, longest] places of what a response may attend to: its prompt's, then its own."""
        return torch.cat([self.prompts.there[self.prompt_of], self.responses.there], dim=1)

    @cached_property
    def _back(self) -> Tensor:
        """[R, width, longest] how many tokens back a key is; below 0 where it is none."""
        prompt, own = (_steps(block.there) for block in (self.prompts, self.responses))
        given = self.prompts.length[self.prompt_of][:, None, None]
        before = (given + own[:, None] - prompt).masked_fill(prompt >= given, -1)
        return torch.cat([before, (own[:, None] - own).expand(len(given), -1, -1)], dim=2)

    @cached_property
    def seen(self) -> Tensor:
        """[R, 1, width, longest] True where a response may attend."""
        return (self._back >= 0)[:, None]

    @cached_property
    def _blocks(self) -> dict[int | None, BlockMask]:
        return {}

    def blocks(self, window: int | None) -> BlockMask:
        """FlexAttention's mask of the row, made once per batch, not once per layer."""
        if window not in self._blocks:
            self._blocks[window] = self._block_mask(window)
        return self._blocks[window]

    def _block_mask(self, window: int | None) -> BlockMask:
        length = torch.cat([self.prompts.length, self.responses.length])
        width = len(self.prompts.back) + len(self.responses.back)
        stretch = torch.arange(len(length), device=length.device)
        given = torch.cat([stretch[: len(self.prompts.length)], self.prompt_of])
        # where a stretch begins, in the row and in its text
        start = length.cumsum(0) - length
        begins = torch.where(given == stretch, 0, self.prompts.length[given])
        stretch, given, shift = (
            values.repeat_interleave(length, output_size=width)
            for values in (stretch, given, begins - start)
        )
        depth = torch.arange(len(stretch), device=length.device) + shift

        def seen(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            mine = (stretch[query] == stretch[key]) | (given[query] == stretch[key])
            # prompts stand before responses, so that later in the row is never seen
            found = mine & (key <= query)
            return found if window is None else found & (depth[query] - depth[key] < window)

        compiled = length.device.type == "cuda"
        return create_block_mask(
            seen, None, None, width, width, device=str(length.device), _compile=compiled
        )

    def seen_within(self, window: int) -> tuple[Tensor, Tensor]:
        """The masks of prompts, [width, width], and of responses where only so many tokens up to
        one's own are seen."""
        prompt = _steps(self.prompts.there)
        back = prompt[:, None] - prompt
        return (back >= 0) & (back < window), self.seen & (self._back < window)[:, None]


def _steps(rectangle: Tensor) -> Tensor:
    return torch.arange(rectangle.shape[1], device=rectangle.device)


@dataclass(frozen=True)
class Packed:
    """The row, and where its scored tokens are predicted."""

    input_ids: Tensor  # [1, N]
    position_ids: Tensor  # [1, N]
    predictor: Tensor  # [S] place in the row
    tree: Tree
