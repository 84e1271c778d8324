"""Chunks of a file in, the pairs of outer steps out, in an order that a checkpoint can go on from.

Chunks come in the file's order and every epoch shuffles each of them anew, by seed, epoch and
number. While one is trained on, a thread reads, checks and tokenises the next; the reference
scores a chunk when it is reached. Chunks are dealt over processes by their numbers, and each tells
all of its own when they are reached: order and checkpoints know nothing of how many there are.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, TypeVar

from omegaconf import DictConfig

from spo_lightning.cache.reference import Referee
from spo_lightning.cache.tokens import chunk_encoder, tokens_of
from spo_lightning.data.batch import draws, epoch_order
from spo_lightning.data.encode import Encoded
from spo_lightning.data.rows import Chunk, Task
from spo_lightning.data.sets import Pairs, mismatched
from spo_lightning.world import ALONE, World

log = logging.getLogger(__name__)

APART = 1_000_003  # between the seeds of two chunks' orders
AHEAD = 8  # Lightning asks for fewer outer steps than this before the first of them is trained on
Item = TypeVar("Item")


def streamed(
    cfg: DictConfig,
    task: Task,
    tokenizer: Any,
    first: Pairs,
    counts: dict[str, int],
    referee: Referee,
    world: World,
) -> "Feed":
    """The training pairs of a streamed file, as the config says; ``first``: those of chunk 0."""
    assert task.chunks is not None
    encode = chunk_encoder(cfg, tokenizer, tokens_of(cfg, tokenizer))

    def judge(pairs: Pairs) -> Pairs:
        return referee.over({"train": pairs})["train"]

    return Feed(first, counts, task.chunks, encode, judge, seed=cfg.seed, world=world)


def outer_steps(cfg: DictConfig, rows: int) -> int:
    """How many a run takes."""
    if cfg.max_steps >= 0:
        return cfg.max_steps
    return math.ceil(cfg.epochs * rows / cfg.batch_size)


class Mismatched(NamedTuple):
    """Prompts with others' answers: of training in the order of its draws, and the held-out."""

    train: Pairs | None  # None: the loss does not ask for them
    held: Pairs | None


def mismatches(cfg: DictConfig, sets: Mapping[str, Pairs], block: int) -> dict[str, Pairs]:
    """What a loss that asks for them reads, without the reference.

    Of training as many as fill whole blocks of the reference's, as a longer run has them there.
    """
    train, held, size = sets["train"], sets["held-out"], cfg.batch_size
    count, found = -(-outer_steps(cfg, len(train)) * size // block) * block, []
    for rows in draws(len(train), size, cfg.seed, 0):
        if len(found) >= count:
            break
        found += mismatched([train.pairs[row] for row in rows], cfg.max_length)
    of_held = mismatched(held.pairs, cfg.max_length)
    some = {"mismatched": found[:count], "held-out, mismatched": of_held}
    return {name: Pairs(pairs, None, train.pad_id) for name, pairs in some.items()}


def drawn(cfg: DictConfig, sets: Mapping[str, Pairs]) -> tuple[dict[str, list[int]], int]:
    """The order in which training draws the rows of its sets, and how many at most; no order
    where it may come to all, as the bench does, whose steps have no end of their own."""
    steps = cfg.get("max_steps", -1)
    if steps < 0:
        return {}, 0
    seeds = {"train": cfg.seed, "lower level": cfg.seed + 1}
    orders = {
        name: epoch_order(len(sets[name]), seed, 0) for name, seed in seeds.items() if name in sets
    }
    if "mismatched" in sets:
        orders["mismatched"] = [*range(len(sets["mismatched"]))]
    return orders, steps * cfg.batch_size


class Place(NamedTuple):
    """Where an outer step begins: ``offset`` pairs into a chunk's order.

    ``counts``: what became of the rows before this chunk, in the first epoch.
    """

    epoch: int
    chunk: int
    offset: int
    counts: dict[str, int]


class Feed:
    """Pairs of outer steps. ``first``: chunk 0 with its reference; ``counts``: of its rows.

    ``chunks`` reads from a chunk on, of so many the first; ``encode`` tokenises one; ``judge``
    adds the reference.
    """

    def __init__(
        self,
        first: Pairs,
        counts: dict[str, int],
        chunks: Callable[[int, int], Iterator[Chunk]],
        encode: Callable[[Chunk], Encoded],
        judge: Callable[[Pairs], Pairs],
        *,
        seed: int,
        world: World = ALONE,
    ):
        self.world = world
        self.first, self.first_counts = first, counts
        self.chunks, self.encode, self.judge, self.seed = chunks, encode, judge, seed
        self.places = {0: Place(0, 0, 0, dict.fromkeys(counts, 0))}
        self.counts = counts  # of all rows reached so far, in the first epoch

    def steps(self, size: int, start: int, stop: int) -> Iterator[Pairs]:
        """``size`` pairs for every outer step from ``start`` on, which has been begun before.

        Whoever asks ahead for more than ``stop`` steps gets the last again: none is read for it.
        """
        step, drawn = start, []
        for place, part, order in self._parts(self.places[start]):
            scored = part.references
            for offset in range(place.offset, len(order)):
                row = order[offset]
                drawn.append((part.pairs[row], None if scored is None else scored[row]))
                if len(drawn) < size:
                    continue
                step += 1
                self.places[step] = place._replace(offset=offset + 1)
                self.places.pop(step - AHEAD, None)
                pairs, references = zip(*drawn)
                drawn = []
                found = Pairs(pairs, None if scored is None else references, part.pad_id)
                yield found
                while step >= stop:
                    yield found
            del part, scored  # the next chunk is scored before it could take their place

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after outer step ``step`` keeps."""
        self.places = {at: place for at, place in self.places.items() if at >= step}
        return {"step": step, **self.places[step]._asdict()}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        kept = dict(state)
        self.places = {kept.pop("step"): Place(**kept)}

    def epoch(self, step: int) -> float:
        """Whole passes over the file, of unknown size, at the end of outer step ``step``."""
        return float(self.places[step].epoch)

    def tell(self) -> None:
        """Say what became of the rows."""
        told = ", ".join(f"{key} {count}" for key, count in self.counts.items() if count)
        log.info("Pairs (train, all rows reached): %s", told)

    def _parts(self, place: Place) -> Iterator[tuple[Place, Pairs, list[int]]]:
        """Chunks with their reference and their order, pass after pass."""
        while True:
            for number, part, counts in self._pass(place.chunk):
                place = place._replace(chunk=number)
                order = epoch_order(len(part), self.seed + APART * number, place.epoch)
                reached = _sum(place.counts, counts) if place.epoch == 0 else place.counts
                self.counts = reached
                yield place, part, order
                del part
                place = place._replace(offset=0, counts=reached)
            place = place._replace(epoch=place.epoch + 1, chunk=0)

    def _pass(self, start: int) -> Iterator[tuple[int, Pairs, dict[str, int]]]:
        """One pass over the file from chunk ``start`` on."""
        mine = ahead(self._encoded(max(start, 1)))
        if start == 0:
            yield 0, self.first, self.first_counts
        for number in itertools.count(max(start, 1)):
            found = self.world.once(lambda: next(mine, None), by=number % self.world.size)
            if found is None:
                return
            bare = Pairs(found.pairs, None, self.first.pad_id)
            yield number, self.judge(bare), found.counts
            del found, bare

    def _encoded(self, start: int) -> Iterator[Encoded]:
        """This process's chunks: those whose numbers leave its rank."""
        size = self.world.size
        own = start + (self.world.rank - start) % size
        return (self.encode(chunk) for chunk in self.chunks(own, size))


def ahead(items: Iterator[Item]) -> Iterator[Item]:
    """The same items; a thread makes one while the one before it is used, from now on.

    What making an item raises is raised where that item would have come.
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ahead")
    first = pool.submit(next, items, None)

    def rest() -> Iterator[Item]:
        waiting = first
        try:
            while (item := waiting.result()) is not None:
                waiting = pool.submit(next, items, None)
                yield item
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    return rest()


def _sum(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return {key: one.get(key, 0) + other.get(key, 0) for key in {**one, **other}}
