"""Token pairs in, shared-prompt rows out.

Letters used for shapes everywhere: B pairs, T columns of a row, S scored tokens of the whole
batch, in the order pair by pair, chosen before rejected: those of the answers, less their context.
"""

import math
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from spo_lightning.data.packing import Block, Packed, Stretches, Tree
from spo_lightning.data.pair import Pair

PAD, PROMPT, CHOSEN, REJECTED = 0, 1, 2, 3


@dataclass(frozen=True)
class PairBatch:
    """B rows ``[prompt | chosen | rejected | padding]``; rejected restarts after the prompt.

    A scored token stands in column ``column[s]`` of row ``pair[s]`` and is predicted by the hidden
    state in column ``predictor[s]``: the column before it, or the prompt's last for a first token.
    On a GPU, ``home`` is the same on the CPU: what depends on lengths is worked out there, so that
    nobody waits for the GPU to say them.
    """

    input_ids: Tensor  # [B, T]
    position_ids: Tensor  # [B, T]
    segment: Tensor  # [B, T] PAD, PROMPT, CHOSEN or REJECTED
    pair: Tensor  # [S]
    rejected: Tensor  # [S] bool: the side
    column: Tensor  # [S]
    predictor: Tensor  # [S]
    lengths: Tensor  # [B, 3] tokens of prompt, chosen, rejected
    rows: Tensor  # [B] Pair.row
    prompt: Tensor  # [B] equal numbers: equal prompts
    reference: Tensor | None = None  # [S] log-probabilities under the reference
    moved: Tensor | None = None  # [S] the same where it has moved since the start
    margins: Tensor | None = None  # [B] Pair.margin, nan where it has none; None: no pair has one
    reference_sides: Tensor | None = None  # [B] Pair.reference_side, in the same way
    sentences: Tensor | None = None  # [S] which one of its answer's; a rejected answer is one
    similarities: Tensor | None = None  # [S] of that sentence; 0 of a rejected answer's
    lower: "PairBatch | None" = None  # the lower level's own rows, without rejected responses
    home: "PairBatch | None" = None

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    @property
    def targets(self) -> Tensor:
        """[S] the scored token ids."""
        return self.input_ids[self.pair, self.column]

    @property
    def scored(self) -> Tensor:
        """[B, 2] tokens of chosen and rejected that are scored."""
        slots = 2 * self.pair + self.rejected.long()
        return slots.bincount(minlength=2 * len(self)).view(-1, 2)

    @property
    def tokens(self) -> int:
        """Tokens that are not padding; a shared prompt counts once."""
        return int(self._home.lengths.sum())

    @property
    def read(self) -> int:
        """Tokens of the texts in it: of prompt + each response, and of the lower level's own."""
        below = 0 if self.lower is None else self.lower.tokens
        prompt, *responses = self._home.lengths.unbind(1)
        return below + sum(int(prompt[some > 0].sum() + some.sum()) for some in responses)

    @property
    def compared(self) -> bool:
        """Whether there are rejected responses."""
        return bool(self._home.lengths[:, 2].any())

    @cached_property
    def with_chosen(self) -> Tensor | None:
        """[N] the rows that have a chosen response; None: all of them."""
        there = self._home.lengths[:, 1] > 0
        return None if there.all() else there.nonzero()[:, 0].to(self.input_ids.device)

    @cached_property
    def packed(self) -> Packed:
        """One row without padding, in which equal prompts stand once."""
        return self._packed(share=True)

    @cached_property
    def packed_apart(self) -> Packed:
        """One row without padding, in which every response has a prompt of its own."""
        return self._packed(share=False)

    def to(self, device: torch.device | str) -> "PairBatch":
        home, there = self._home, torch.device(device)
        return home if there.type == "cpu" else replace(_moved(home, there), home=home)

    @property
    def _home(self) -> "PairBatch":
        return self if self.home is None else self.home

    def _packed(self, *, share: bool) -> Packed:
        if self.home is None:
            return pack(self, share=share)
        return _moved(pack(self.home, share=share, gpu=True), self.input_ids.device)

    @cached_property
    def chosen_only(self) -> "PairBatch":
        """The same rows without their rejected responses: what supervised fine-tuning sees."""
        if self.home is not None:
            return self.home.chosen_only.to(self.input_ids.device)
        width = int(self.lengths[:, :2].sum(1).max())
        gone = self.segment[:, :width] == REJECTED
        lengths = self.lengths.clone()
        lengths[:, 2] = 0
        return replace(
            self,
            input_ids=self.input_ids[:, :width],
            position_ids=self.position_ids[:, :width].masked_fill(gone, 0),
            segment=self.segment[:, :width].masked_fill(gone, PAD),
            lengths=lengths,
        ).of(~self.rejected)

    def of(self, kept: Tensor) -> "PairBatch":
        """The same rows, of whose scored tokens these alone are scored."""
        columns = ("pair", "rejected", "column", "predictor")
        columns += ("reference", "moved", "sentences", "similarities")
        found: dict[str, Any] = {name: getattr(self, name) for name in columns}
        return replace(self, **{n: None if it is None else it[kept] for n, it in found.items()})

    def split(self, rows: int) -> "list[PairBatch]":
        """Consecutive parts of at most ``rows`` rows."""
        if rows >= len(self):
            return [self]
        parts = (self._home._slice(start, start + rows) for start in range(0, len(self), rows))
        return [part.to(self.input_ids.device) for part in parts]

    def _slice(self, start: int, stop: int) -> "PairBatch":
        width = int(self.lengths[start:stop].sum(1).max())
        some = self.of((self.pair >= start) & (self.pair < stop))
        return replace(
            some,
            input_ids=self.input_ids[start:stop, :width],
            position_ids=self.position_ids[start:stop, :width],
            segment=self.segment[start:stop, :width],
            pair=some.pair - start,
            lengths=self.lengths[start:stop],
            rows=self.rows[start:stop],
            prompt=self.prompt[start:stop],
            margins=_part(self.margins, start, stop),
            reference_sides=_part(self.reference_sides, start, stop),
            lower=None if self.lower is None else self.lower._slice(start, stop),
        )


def _moved(made: Any, device: torch.device) -> Any:
    """A dataclass with all tensors in it on another device."""

    def there(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device, non_blocking=True)
        if isinstance(value, PairBatch):
            return value.to(device)
        return _moved(value, device) if is_dataclass(value) else value

    return replace(made, **{f.name: there(getattr(made, f.name)) for f in fields(made)})


def pack(batch: PairBatch, *, share: bool, gpu: bool = False) -> Packed:
    """``share``: equal prompts stand once; otherwise every response has its own. ``gpu``: with
    what its kernels need."""
    present = batch.lengths[:, 1:] > 0
    own, pair = batch.lengths[:, 1:][present], present.nonzero()[:, 0]
    if share:
        found, prompt_of = batch.prompt[pair].unique(return_inverse=True)
        owner = torch.full_like(found, len(batch)).scatter_reduce(0, prompt_of, pair, "amin")
    else:
        owner, prompt_of = pair, torch.arange(len(pair), device=pair.device)
    given = batch.lengths[owner, 0]
    prompts = Block.of(given, 0)
    start = int(given.sum())
    responses = Block.of(own - 1, start)
    stretches = Stretches.of(prompts, responses, prompt_of) if gpu else None
    answers = batch.segment >= CHOSEN  # [B, T] of which the tokens of the answers, one by one:
    kept = torch.ones_like(batch.input_ids[answers], dtype=torch.bool)
    kept[own.cumsum(0) - 1] = False  # the last of every response
    columns = torch.arange(prompts.there.shape[1], device=given.device)
    inside = columns < given[:, None]
    before = batch.input_ids[owner, : inside.shape[1]][inside]
    # token -> the place just before it: its prompt's last, or the response's token before
    place = start + kept.cumsum(0) - kept.long() - 1
    firsts = torch.cat([own.new_zeros(1), own.cumsum(0)[:-1]])
    place[firsts] = given.cumsum(0)[prompt_of] - 1
    scored = torch.zeros_like(answers)
    scored[batch.pair, batch.column] = True
    position = batch.position_ids[answers][kept]
    return Packed(
        input_ids=torch.cat([before, batch.input_ids[answers][kept]])[None],
        position_ids=torch.cat([columns.expand_as(inside)[inside], position])[None],
        predictor=place[scored[answers]],
        tree=Tree(prompts, responses, prompt_of, stretches),
    )


class Microbatches:
    """One rank's share of an outer step.

    ``mismatched``: its prompts with others' answers, where the loss asks for them. ``below``:
    whether the outer step has a row for the lower level.

    Neither a sequence nor a dataclass, so Lightning's precision plugins leave it alone: in
    bf16-true they would round the reference's log-probabilities.
    """

    def __init__(self, parts: Sequence, mismatched: Sequence = (), below: bool = True):
        self.parts, self.mismatched, self.below = list(parts), list(mismatched), below

    def __iter__(self) -> Iterator[PairBatch]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def to(self, device: torch.device | str) -> "Microbatches":
        sides = ([part.to(device) for part in some] for some in (self.parts, self.mismatched))
        return Microbatches(*sides, below=self.below)


def collate(
    pairs: Sequence[Pair], pad_id: int, references: Sequence[Tensor] | None = None
) -> PairBatch:
    """Pad B pairs on the right into shared-prompt rows; ``references`` are one [tokens] each."""
    width = max(len(pair) for pair in pairs)
    ids, positions, segments = [], [], []
    index, side, column, predictor = [], [], [], []
    prompts: dict[tuple[int, ...], int] = {}
    for number, pair in enumerate(pairs):
        p, c, r = len(pair.prompt), len(pair.chosen), len(pair.rejected)
        rest = width - len(pair)
        ids.append([*pair.prompt, *pair.chosen, *pair.rejected, *[pad_id] * rest])
        positions.append([*range(p + c), *range(p, p + r), *[0] * rest])
        segments.append([PROMPT] * p + [CHOSEN] * c + [REJECTED] * r + [PAD] * rest)
        for rejected, (runs, start) in enumerate(zip(pair.scored, (p, p + c))):
            for run in runs:
                index += [number] * len(run)
                side += [bool(rejected)] * len(run)
                column += range(start + run.start, start + run.stop)
                # the first token of either response is predicted by the last token of the prompt
                first = start + run.start - 1 if run.start else p - 1
                predictor += [first, *range(start + run.start, start + run.stop - 1)]
    return PairBatch(
        input_ids=torch.tensor(ids),
        position_ids=torch.tensor(positions),
        segment=torch.tensor(segments),
        pair=torch.tensor(index),
        rejected=torch.tensor(side),
        column=torch.tensor(column),
        predictor=torch.tensor(predictor),
        lengths=torch.tensor([[len(p.prompt), len(p.chosen), len(p.rejected)] for p in pairs]),
        rows=torch.tensor([pair.row for pair in pairs]),
        prompt=torch.tensor([prompts.setdefault(pair.prompt, len(prompts)) for pair in pairs]),
        reference=None if references is None else torch.cat(list(references)),
        margins=_known(pair.margin for pair in pairs),
        reference_sides=_known(pair.reference_side for pair in pairs),
        **_sentences(pairs),
    )


def _known(values: Iterable[float | None]) -> Tensor | None:
    given = [math.nan if value is None else value for value in values]
    return None if all(map(math.isnan, given)) else torch.tensor(given)


def _part(values: Tensor | None, start: int, stop: int) -> Tensor | None:
    return None if values is None else values[start:stop]


def _sentences(pairs: Sequence[Pair]) -> dict[str, Any]:
    """PairBatch.sentences and similarities, where pairs know them."""
    if not any(pair.sentences for pair in pairs):
        return {}
    which, near = [], []
    for pair in pairs:
        chosen, rejected = (sum(map(len, runs)) for runs in pair.scored)
        own = [bisect_right(pair.sentences, n) for run in pair.scored[0] for n in run]
        which += own + [0] * rejected
        near += [pair.similarities[n] for n in own] if pair.similarities else [0.0] * chosen
        near += [0.0] * rejected
    return {"sentences": torch.tensor(which), "similarities": torch.tensor(near)}


def by_pairs(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places of an outer step's rows in microbatches of ``limit`` rows, in order."""
    return [list(range(s, min(s + limit, len(sizes)))) for s in range(0, len(sizes), limit)]


def by_tokens(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Places of an outer step's rows in microbatches of near-equal cost.

    ``sizes``: tokens of each row. As few microbatches as have at most ``limit`` tokens each when
    the longest rows are dealt first, always to the shortest microbatch; a longer row stands alone.
    """
    order = sorted(range(len(sizes)), key=lambda place: -sizes[place])
    count = max(1, -(-sum(sizes) // limit))
    while True:
        parts: list[list[int]] = [[] for _ in range(count)]
        loads = [0] * count
        for place in order:
            least = loads.index(min(loads))
            parts[least].append(place)
            loads[least] += sizes[place]
        if all(load <= limit or len(part) == 1 for load, part in zip(loads, parts)):
            return [sorted(part) for part in parts if part]
        count += 1


def epoch_order(count: int, seed: int, epoch: int) -> list[int]:
    """The order of one pass over ``count`` rows: a function of seed and epoch and nothing else."""
    mixed = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    return torch.randperm(count, generator=mixed).tolist()


def draws(
    count: int, batch_size: int, seed: int, start: int, stop: int | None = None
) -> Iterator[list[int]]:
    """Row numbers of outer step ``start``, ``start + 1``, ...; every epoch is shuffled anew.

    Stateless, so a run resumed at ``start`` sees what an uninterrupted one sees. Whoever asks
    ahead for step ``stop`` or a later one gets those of the last before it.
    """
    step, orders = start, {}
    while True:
        last = step if stop is None else min(step, stop - 1)
        places = range(last * batch_size, (last + 1) * batch_size)
        for epoch in {place // count for place in places} - orders.keys():
            orders[epoch] = epoch_order(count, seed, epoch)
        yield [orders[place // count][place % count] for place in places]
        orders = {epoch: order for epoch, order in orders.items() if epoch >= places[-1] // count}
        step += 1
