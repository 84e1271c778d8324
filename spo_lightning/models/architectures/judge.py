"""The name of an architecture in, a verdict out: built small, read as a run would, compared.

The comparison knows nothing of how batches are read: plain forwards of the whole model, a row for
each response, scored one token at a time.
"""

import copy
import logging
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spo_lightning.data.batch import Pair, collate
from spo_lightning.errors import UserError
from spo_lightning.models.architectures.small import ORDINARY, config_of, stir
from spo_lightning.models.attention import IMPLEMENTATION
from spo_lightning.models.checks import check
from spo_lightning.models.foreign import auto_class, take_attention, without_dropout
from spo_lightning.models.reading import Reading, line_of
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharing import longest_of, scorer_for

RIGHT = 1e-4  # nats per token, in float32
WINDOWS = ("sliding_window", "attention_chunk_size")
NARROW = 6  # tokens: what is read with windows beyond every row is read with such a one too
PACKED, SHARED, APART = "packed", "shared rows", "apart"
REFUSED, UNBUILT, WRONG = "refused", "not built", "WRONG"


@dataclass(frozen=True)
class Verdict:
    """How an architecture is read, and how far from its own forward."""

    kind: str
    name: str  # of the class
    how: str
    logits: str = ""  # how they follow from hidden states
    why: str = ""  # not packed
    single: float | None = None  # the largest difference in nats per token in float32
    double: float | None = None  # and in float64

    @property
    def right(self) -> bool:
        return self.how in (PACKED, SHARED, APART)


def verdict(kind: str) -> Verdict:
    """Build, read, compare; whatever a foreign model raises while it is built is its reason."""
    try:
        config = config_of(kind)
        lm = built(config)
    except Exception as error:
        return Verdict(kind, "", UNBUILT, why=line_of(error))
    name = type(lm).__name__
    try:
        plain = slow(lm, pairs := random_pairs())
    except Exception as error:
        return Verdict(kind, name, UNBUILT, why=f"reads no text alone: {line_of(error)}")
    try:
        return _compared(kind, config, lm, pairs, plain)
    except UserError as error:
        return Verdict(kind, name, REFUSED, why=_unmeasured(str(error)))


def built(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """A small model of random weights, as a run takes it."""
    config = copy.deepcopy(config)  # a model sets its attention in it
    torch.manual_seed(0)
    plain = {"dtype": torch.float32, "attn_implementation": "eager"}
    lm = auto_class(config).from_config(config, **plain)
    stir(lm)
    without_dropout(lm)
    return lm.to(dtype).eval()


def read(lm: Any, pairs: list[Pair]) -> tuple[Scorer, list[str]]:
    """The scorer that a run would take, and what was said while it was chosen."""
    with _heard() as said:
        take_attention(lm, IMPLEMENTATION)
        lm.train()
        check(lm)
        return scorer_for(lm, longest_of(pairs), share=True), said


def _compared(kind: str, config: Any, lm: Any, pairs: list[Pair], plain: Tensor) -> Verdict:
    scorer, said = read(lm, pairs)
    how = PACKED if scorer.packs else SHARED if scorer.shared else APART
    worst = max(_off(scorer, pairs, plain), _off_through_windows(config, pairs))
    return Verdict(
        kind,
        type(lm).__name__,
        how if worst <= RIGHT else WRONG,
        logits=_logits(scorer.reading),
        why="" if how == PACKED else "; ".join(dict.fromkeys(map(_reason, said))),
        single=worst,
        double=_off_in_double(config, pairs),
    )


def _off(scorer: Scorer, pairs: list[Pair], plain: Tensor) -> float:
    with torch.no_grad():
        found = scorer(collate(pairs, 0)).logps
    worst = (found - plain).abs().max().item()
    return worst if worst == worst else float("inf")


def _off_in_double(config: Any, pairs: list[Pair]) -> float | None:
    """None where a model has float32 in it that float64 does not go with."""
    try:
        lm = built(config, torch.float64)
        if lm._can_set_experts_implementation():
            lm.set_experts_implementation("eager")  # the others know no float64
        plain = slow(lm, pairs)
    except Exception:
        return None
    return _off(read(lm, pairs)[0], pairs, plain)


def _off_through_windows(config: Any, pairs: list[Pair]) -> float:
    """The same where windows, if there are any, are shorter than rows; 0 where there are none."""
    text = config.get_text_config(decoder=True)
    wide = [name for name in WINDOWS if isinstance(getattr(text, name, None), int)]
    for name in wide:
        setattr(text, name, NARROW)
    if not wide:
        return 0.0
    try:
        lm = built(config)
        plain = slow(lm, pairs)
    except Exception:  # windows of that size are none of its own
        return 0.0
    return _off(read(lm, pairs)[0], pairs, plain)


def _logits(reading: Reading) -> str:
    if reading.logits:
        return "its own forward"
    scale = "" if reading.scale == 1 else f" times {reading.scale:.6g}"
    return f"matrix{scale}" + (f", capped at {reading.cap:g}" if reading.cap else "")


def _reason(said: str) -> str:
    """Why, of a line that says first what."""
    before, _, after = said.partition(": ")
    if before.startswith("Attention is"):
        return f"right with {before.removeprefix('Attention is ')} attention only"
    reason = after.removesuffix(" Separate forwards.").removesuffix(".")
    return _unmeasured(reason)


def _unmeasured(said: str) -> str:
    """Without its number of nats, which differs from machine to machine."""
    return re.sub(r" by [^ ]+ nats", "", said)


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What is said of how batches are read."""
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger = logging.getLogger("spo_lightning.models")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield said
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def random_pairs(count: int = 4, longest: int = 11) -> list[Pair]:
    """Ragged; two of one prompt, and a response of one token."""
    chance = random.Random(0)

    def text(length: int) -> tuple[int, ...]:
        return tuple(chance.choice(ORDINARY) for _ in range(length))

    def some() -> tuple[int, ...]:
        return text(chance.randint(2, longest))

    pairs = [Pair(some(), some(), some()) for _ in range(count)]
    return [*pairs, Pair(pairs[0].prompt, text(1), text(5))]


@torch.no_grad()
def slow(lm: Any, pairs: list[Pair]) -> Tensor:
    """[S] log-probabilities by plain forwards of the whole model, token by token."""
    found = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            logits = lm(input_ids=torch.tensor([pair.prompt + response]), use_cache=False).logits
            for place, token in enumerate(response, len(pair.prompt) - 1):
                found.append(logits[0, place].log_softmax(-1)[token])
    return torch.stack(found)
