"""Pairs in, pairs with the reference's log-probabilities out; scored once for all runs.

A row is known by its token ids, the reference by its weights and by how it computes. Neither
knows of the loss, its beta, the rate, the seed, the batch size or the run directory, so every job
of a sweep finds what the first one scored.
"""

import copy
import hashlib
import importlib.metadata
import json
import logging
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.cache.shards import KEY, Shards, cache_of, limit_of
from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.policy import (
    DTYPES,
    Policy,
    check_same_tokens,
    opened,
    tokenizer_of,
)
from spo_lightning.models.quantized import Bits, bits_of
from spo_lightning.models.scorer import Beside, Scorer, score
from spo_lightning.models.sharded import at
from spo_lightning.models.sharing import as_read_by
from spo_lightning.models.sources import found
from spo_lightning.records.progress import Stages, Within

log = logging.getLogger(__name__)

CODE = 2  # raise it when the same weights and token ids come to score otherwise
TOKENS = 2**20  # scored tokens after which a shard is written, so that a kill loses few
PADDED = 8  # batches' worth of rows that are put in order together where rows are padded
NAME = 32  # hexadecimal digits of a reference's name
UNREAD = ("_name_or_path", "transformers_version", "architectures", "use_cache")  # change no score

NEVER_READ = torch.empty(0)

Precision = Callable[[], AbstractContextManager]
Rows = dict[bytes, Pair]


def row_key(pair: Pair) -> bytes:
    """A row's name: its token ids, where prompt, chosen and rejected response end, and where
    their context does."""
    sizes = (len(pair.prompt), len(pair.chosen), len(pair.rejected))
    ids = array("q", [*sizes, *pair.prompt, *pair.chosen, *pair.rejected])
    if pair.chosen_context or pair.rejected_context:
        ids.extend([len(pair.chosen_context), *pair.chosen_context, *pair.rejected_context])
    return hashlib.sha256(ids.tobytes()).digest()[:KEY]


def weights_name(policy: Policy, precision: Precision) -> str:
    """The name of the policy's start, from its weights in memory: new adapters are no part of it.

    Those of a checkpoint are, as they were loaded.
    """
    lm = policy.lm
    config = {k: v for k, v in lm.config.to_dict().items() if k not in UNREAD}
    digest = _begun(policy.device, lm.dtype, lm.config._attn_implementation, precision)
    shape = [type(lm).__name__, config]
    shape += [policy.settings()] if policy.settings() else []
    digest.update(json.dumps(shape, sort_keys=True, default=str).encode())
    for name, value in policy.tensors():
        digest.update(f"{name} {value.dtype} {[*value.shape]}".encode())
        plain = value.detach().cpu().contiguous().reshape(-1)
        digest.update(plain.view(torch.uint8).numpy())  # type: ignore[arg-type] (a buffer)
    return digest.hexdigest()[:NAME]


def files_name(
    checkpoint: str,
    settings: Any,
    device: torch.device,
    precision: Precision,
    bits: Bits | None = None,
) -> str | None:
    """The name of a checkpoint on this disk, from its files, so that they need not be loaded.

    None where they are not all there: a hub id, or adapters, whose base is elsewhere.
    """
    source = found(checkpoint)
    if not source.local or source.adapters:
        return None
    where = Path(source.where)
    digest = _begun(device, DTYPES[settings.dtype], settings.attention, precision)
    digest.update(f"code of its own: {settings.trust_remote_code}\n".encode())
    digest.update(b"" if bits is None else f"{bits}\n".encode())
    read = (".safetensors", ".json", ".py")
    for path in sorted(where.rglob("*") if source.gguf is None else [source.path]):
        if path.suffix in (*read, ".gguf") and path.is_file():
            with path.open("rb") as file:
                own = hashlib.file_digest(file, "sha256").hexdigest()
            digest.update(f"{path.relative_to(where)} {own}\n".encode())
    return digest.hexdigest()[:NAME]


def _begun(
    device: torch.device, dtype: torch.dtype, attention: str, precision: Precision
) -> "hashlib._Hash":
    """What besides the weights decides the numbers."""
    with precision():
        cast = torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type)
    versions = [importlib.metadata.version(name) for name in ("torch", "transformers")]
    matmul = torch.get_float32_matmul_precision()
    parts = [CODE, *versions, device.type, matmul, str(dtype), attention, str(cast)]
    return hashlib.sha256(json.dumps(parts).encode())


class Referee:
    """What scores pairs as the run's reference does, a row once for all runs that share a cache.

    The reference is the policy's own start, or the checkpoint ``model.reference``, which is not
    even loaded where every row is in the cache. ``scorer``: the policy's, to be read like.
    """

    def __init__(
        self, cfg: DictConfig, policy: Policy, scorer: Scorer, precision: Precision, stages: Stages
    ):
        self.policy, self.scorer, self.start = policy, scorer, policy.start
        self.precision, self.stages, self.batch_size = precision, stages, cfg.eval.batch_size
        # a model that is not packed pads, so more rows are put in order of their lengths
        self.block = self.batch_size * (1 if scorer.packs else PADDED)
        self.other, self.settings = cfg.model.reference, cfg.model
        self.bits = bits_of(policy.lm)  # another model is read in as many
        if self.other is not None:
            plain = {**cfg.model, "revision": None}  # that one is the policy's
            theirs = tokenizer_of(self.other, plain)
            check_same_tokens(policy.tokenizer, theirs, self.other)
        self.shards, home = None, cache_of(cfg)
        if home is not None:
            device = policy.device
            how = (cfg.model, device, precision, self.bits)
            name = self.other and files_name(self.other, *how)
            name = name or weights_name(self.opened, precision)
            self.shards = Shards(home / "reference", name, limit_of(cfg))

    @cached_property
    def opened(self) -> Policy:
        if self.other is None:
            return self.policy
        return opened(self.other, self.settings, self.policy.device, bits=self.bits)

    def judge(self) -> Scorer:
        return self.scorer if self.other is None else as_read_by(self.scorer, self.opened.lm)

    def over(
        self, sets: Mapping[str, Pairs], orders: Mapping[str, Sequence[int]] = {}, count: int = 0
    ) -> dict[str, Pairs]:
        """Every set with its reference.

        ``orders``: the order in which training draws the rows of a set, ``count`` of them: most of
        the others have no reference. They are scored block by block in that order, so that a run
        that is prolonged scores its rows as one that was as long from the beginning.
        """
        with self.start():
            return with_reference(
                sets,
                self.shards,
                self.judge,
                orders=orders,
                count=count,
                block=self.block,
                batch_size=self.batch_size,
                precision=self.precision,
                stages=self.stages,
            )

    def stays(self) -> "Referee":
        """The same for pairs that are read while the policy trains: a copy stays what it is now,
        of spread parameters one of this process's parts, which hold its values meanwhile.

        Adapters need none: they are switched off meanwhile, or hold what they began with.
        """
        later = copy.copy(self)
        if self.other is None and not self.policy.adapted and self.scorer.spread is not None:
            values = {name: p.detach().clone() for name, p in self.scorer.spread.items()}
            later.start = partial(at, self.scorer, values)
        elif self.other is None and not self.policy.adapted:
            later.scorer = self._copy()
        later.stages = Within(self.stages)
        return later

    def beside(self) -> Beside:
        """The same to be read in every step, for losses that compare whole distributions."""
        if self.other is not None:
            return Beside(self.judge(), nullcontext)
        head = self.policy.lm.get_output_embeddings()
        # a head is read once more in the backward pass, where adapters cannot be switched off
        if self.policy.adapted and not any(p.requires_grad for p in head.parameters()):
            return Beside(self.scorer, self.policy.start)
        return Beside(self._copy(), nullcontext)

    def _copy(self) -> Scorer:
        if self.scorer.spread is not None:
            raise UserError(
                "hardware=fsdp: this loss reads a copy of the start in every step, and what is "
                "spread is not copied: train adapters (model.lora.rank), or take hardware=ddp"
            )
        return copy.deepcopy(self.scorer).requires_grad_(False)


def with_reference(
    sets: Mapping[str, Pairs],
    shards: Shards | None,
    judge: Callable[[], Scorer],
    *,
    orders: Mapping[str, Sequence[int]] = {},
    count: int = 0,
    block: int = 1,
    batch_size: int,
    precision: Precision,
    stages: Stages,
) -> dict[str, Pairs]:
    """Every set with its reference; ``judge`` is asked for only when a row has to be scored.

    Of a set with its order the blocks that hold its first ``count`` rows are scored. ``shards``:
    where rows are looked up and kept, None: nowhere. A row that occurs twice is scored once, so
    that a run that finds its rows equals the one that scored them. All processes score.
    """
    keys = {name: [row_key(pair) for pair in pairs.pairs] for name, pairs in sets.items()}
    rows = {name: dict(zip(keys[name], pairs.pairs)) for name, pairs in sets.items()}
    rows |= {n: _first(rows[n], keys[n], order, count, block) for n, order in orders.items()}
    wanted = {key for some in rows.values() for key in some}
    world = stages.world
    known = {} if shards is None else world.once(lambda: shards.find(wanted))

    def score_rest() -> None:
        for name, pairs in sets.items():
            together = block if name in orders else max(len(pairs), 1)
            for part in _parts(pairs, rows[name], known.keys(), together, batch_size):
                found = [key for batch in part for key in batch]
                places = iter(range(len(found)))
                scored = score(
                    judge(),
                    replace(pairs, pairs=[rows[name][key] for key in found], references=None),
                    batches=[[next(places) for _ in batch] for batch in part],
                    precision=precision,
                    stages=stages,
                    title=f"reference ({name})",
                )
                fresh = dict(zip(found, scored.references or (), strict=True))
                known.update(fresh)
                if shards is not None and world.first:
                    shards.keep(fresh)

    if shards is None:
        score_rest()
    elif len(known) == len(wanted):
        _say(keys, rows, known)
    else:
        with shards.alone(stages) if world.first else nullcontext():
            # what another run scored meanwhile
            known |= world.once(lambda: shards.find(wanted - known.keys()))
            _say(keys, rows, known)
            score_rest()
    if shards is not None and world.first:
        shards.trim()
    return {
        name: replace(pairs, references=[known.get(key, NEVER_READ) for key in keys[name]])
        for name, pairs in sets.items()
    }


def _first(rows: Rows, keys: list[bytes], order: Sequence[int], count: int, block: int) -> Rows:
    """As many whole blocks of the rows in their order as hold the first ``count``."""
    drawn = [*dict.fromkeys(keys[place] for place in order)]
    reached = len({keys[place] for place in order[:count]})
    return {key: rows[key] for key in drawn[: -(-reached // block) * block]}


def _say(
    keys: Mapping[str, list[bytes]],
    rows: Mapping[str, Collection[bytes]],
    known: Collection[bytes],
) -> None:
    asked = [key for name, some in keys.items() for key in some if key in rows[name]]
    found = sum(key in known for key in asked)
    log.info("reference: %d of %d rows from the cache", found, len(asked))


def _parts(
    pairs: Pairs, rows: Rows, known: Collection[bytes], block: int, size: int
) -> Iterator[list[list[bytes]]]:
    """Rows not yet known in batches of near-equal length, in parts of about TOKENS tokens.

    Batches of at most ``size`` are made of one block of consecutive rows, the longest first.
    """
    part: list[list[bytes]] = []
    tokens, items = 0, [*rows.items()]
    for start in range(0, len(items), block):
        rest = {key: pair for key, pair in items[start : start + block] if key not in known}
        found, some = [*rest], replace(pairs, pairs=[*rest.values()], references=None)
        for batch in some.batches(size):
            part.append([found[place] for place in batch])
            tokens += sum(len(rest[key].chosen) + len(rest[key].rejected) for key in part[-1])
            if tokens >= TOKENS:
                yield part
                part, tokens = [], 0
    if part:
        yield part
