"""Prepared pairs in, one item per outer step out: this process's microbatches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from typing import Any, Literal, NamedTuple

from omegaconf import DictConfig
from torch.utils.data import IterableDataset

from spo_lightning.data.batch import Microbatches, PairBatch, by_pairs, by_tokens, draws
from spo_lightning.data.sets import Pairs
from spo_lightning.training.feed import Feed
from spo_lightning.training.largest import largest
from spo_lightning.training.module import Preference
from spo_lightning.world import ALONE, World

LOOKED_AT = 8  # outer steps among whose microbatches those to try are looked for
Split = Callable[[Sequence[int]], list[list[int]]]  # sizes of rows to their places in microbatches


class Share(NamedTuple):
    """A process's rows of an outer step."""

    pairs: Pairs
    texts: Pairs | None  # the lower level's own, one beside each

    @property
    def sizes(self) -> list[int]:
        """Tokens of each row."""
        texts = repeat(()) if self.texts is None else self.texts.pairs
        return [len(pair) + len(text) for pair, text in zip(self.pairs.pairs, texts)]

    def batch(self, places: Sequence[int]) -> PairBatch:
        part = self.pairs.batch(places)
        return part if self.texts is None else replace(part, lower=self.texts.batch(places))


class OuterSteps(IterableDataset):
    """One item per outer step. Starts where the module stands.

    Microbatches have ``micro`` pairs, or are dealt so that none has more than ``tokens`` tokens;
    ``auto``: as many as fit, found before the first. ``lower``: texts drawn beside the pairs, as
    many as pairs, for a lower level of its own. ``feed``: where the pairs come from in place of
    ``pairs``. ``mismatched``: prompts of all steps' rows with others' answers, row by row.
    ``skip``: the rows of so many outer steps are passed over.
    """

    def __init__(
        self,
        pairs: Pairs,
        module: Preference,
        *,
        micro: int,
        seed: int,
        tokens: int | Literal["auto"] | None = None,
        lower: Pairs | None = None,
        feed: Feed | None = None,
        mismatched: Pairs | None = None,
        skip: int = 0,
        world: World = ALONE,
    ):
        self.pairs, self.module, self.seed, self.lower = pairs, module, seed, lower
        self.feed, self.mismatched, self.world = feed, mismatched, world
        self.micro, self.tokens, self.skip = micro, tokens, skip

    @classmethod
    def of(
        cls, cfg: DictConfig, module: Preference, train: Pairs, lower: Pairs | None, **more: Any
    ) -> "OuterSteps":
        """As the configuration deals them."""
        limits = {"micro": cfg.micro_batch_size, "tokens": cfg.data.get("tokens_per_batch")}
        return cls(train, module, seed=cfg.seed, lower=lower, **limits, **more)

    def __iter__(self) -> Iterator[Microbatches]:
        size, split, own = self.module.batch_size, self._split(), self._own
        start = self.skip + self.module.outer_step
        stop = self.skip + self.module.trainer.max_steps
        texts = self._texts(start, stop)
        for step, given in enumerate(self._steps(size, start, stop), start):
            mine = Share(given.take(own), next(texts))
            parts = [mine.batch(places) for places in split(mine.sizes)]
            below = self.lower is not None or any(pair.chosen for pair in given.pairs)
            others = self._mismatched(min(step, stop - 1) * size, split)
            yield Microbatches(parts, others, below)

    @property
    def _own(self) -> range:
        """Places of this process's rows in an outer step."""
        trainer = self.module.trainer
        return range(self.module.batch_size)[trainer.global_rank :: trainer.world_size]

    def _mismatched(self, begin: int, split: Split) -> list[PairBatch]:
        """Of the outer step whose rows begin there, those of this process."""
        if self.mismatched is None:
            return []
        some = self.mismatched.take([begin + place for place in self._own])
        return [some.batch(places) for places in split([len(pair) for pair in some.pairs])]

    def _steps(self, size: int, start: int, stop: int) -> Iterator[Pairs]:
        """The pairs of every outer step, of all processes."""
        if self.feed is not None:
            return self.feed.steps(size, start, stop)
        orders = draws(len(self.pairs), size, self.seed, start, stop)
        return (self.pairs.take(rows) for rows in orders)

    def _texts(self, start: int, stop: int) -> Iterator[Pairs | None]:
        """This process's texts of the lower level, of every outer step."""
        if self.lower is None:
            return repeat(None)
        lower, own = self.lower, self._own
        orders = draws(len(lower), self.module.batch_size, self.seed + 1, start, stop)
        return (lower.take([rows[place] for place in own]) for rows in orders)

    def epoch(self, step: int, pairs_seen: int) -> float:
        """Passes over the training pairs before the end of outer step ``step``."""
        if self.feed is not None:
            return self.feed.epoch(step)
        return pairs_seen / len(self.pairs)

    # -- how many tokens a microbatch has

    def _split(self) -> Split:
        if self.tokens is None:
            return partial(by_pairs, limit=self.micro)
        if isinstance(self.tokens, int):
            return partial(by_tokens, limit=self.tokens)
        if self.module.tokens is None:  # else a checkpoint brought it
            self.module.tokens = self._largest()
        return partial(by_tokens, limit=self.module.tokens)

    def _largest(self) -> int:
        """Of what is tried, the costliest that a run will see: shares of long rows, and rows of
        unlike lengths in one microbatch, which a model that is not packed pads."""
        shares = [self._longest(), *self._first()]
        sizes = [share.sizes for share in shares]
        whole = max(map(sum, sizes))

        def trial(limit: int) -> Microbatches:
            split = partial(by_tokens, limit=limit)
            dealt = [(n, places) for n, own in enumerate(sizes) for places in split(own)]
            dealt.sort(key=lambda it: -len(it[1]) * max(sizes[it[0]][place] for place in it[1]))
            # a second backward meets the gradients of the first
            some = dealt[: 1 if limit >= whole else 2]
            below = any(shares[n].pairs.pairs[place].chosen for n, of in some for place in of)
            parts = [shares[n].batch(places) for n, places in some]
            return Microbatches(parts, self._mismatched(0, split), below or self.lower is not None)

        return largest(self.module, self.world, trial, max(map(max, sizes)), whole)

    def _longest(self) -> Share:
        def some(pairs: Pairs) -> Pairs:
            order = sorted(range(len(pairs)), key=lambda row: -len(pairs.pairs[row]))
            return pairs.take([order[place % len(order)] for place in range(len(self._own))])

        return Share(some(self.pairs), None if self.lower is None else some(self.lower))

    def _first(self) -> Iterator[Share]:
        """Of a streamed file's first rows, whatever their order."""
        stop = min(LOOKED_AT, self.module.trainer.max_steps)
        orders = draws(len(self.pairs), self.module.batch_size, self.seed, 0, stop)
        pairs = (self.pairs.take([rows[place] for place in self._own]) for rows in orders)
        return islice(map(Share, pairs, self._texts(0, stop)), stop)
