"""Rows in, token pairs out: tokenised once for all runs, read from files afterwards.

What is kept is known by the rows themselves, the tokenizer and how it is asked; neither by the
model nor by the run. A file is written beside its place and renamed; one that does not match its
checksum is removed, said, and its rows are tokenised anew.
"""

import copy
import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

from omegaconf import DictConfig

from spo_lightning.cache.shards import Damaged, cache_of, limit_of, trim
from spo_lightning.data.batch import Pair
from spo_lightning.data.chat import CLOCK, remarks
from spo_lightning.data.encode import (
    Encoded,
    check_survivors,
    encode_pairs,
    encode_some,
    encode_texts,
)
from spo_lightning.data.rows import Chunk, Row, Task
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError

log = logging.getLogger(__name__)

CODE = 5  # raise it when the same rows and tokenizer come to give other tokens
READ = ("prompt", "chosen", "rejected", "plain", "tools", "chat_template_kwargs")  # of a row
READ += ("margin", "score_chosen", "score_rejected", "reference_side")
# of a file, as of a Pair
IDS = ("prompt", "chosen", "rejected", "chosen_context", "rejected_context")
COLUMNS = (*IDS, "row", "margin", "reference_side")
SUFFIX = ".tokens"
CHECK = 32  # bytes of the checksum, before an arrow stream
NAME = 32  # hexadecimal digits of a name


@dataclass(frozen=True)
class Tokens:
    """Files of one tokenizer in ``home``; ``limit``: bytes of all files of all tokenizers."""

    home: Path
    name: str
    limit: float

    def find(
        self,
        rows: Sequence[Row],
        places: Sequence[int],
        how: Mapping[str, Any],
        encode: Callable[[], Encoded],
    ) -> Encoded:
        """What ``encode`` makes of the rows, asked for only where no file has it."""
        path = self.home / self.name / f"{_key(rows, places, how)}{SUFFIX}"
        found = self._read(path)
        if found is None:
            found = encode()
            self._keep(path, found)
        return found

    def _read(self, path: Path) -> Encoded | None:
        import pyarrow as pa

        try:
            with pa.OSFile(str(path)) as file:  # a map ends the process where another node trims
                whole = file.read_buffer()
            content = whole.slice(CHECK)
            if _check(content) != whole.slice(0, CHECK).to_pybytes():
                raise Damaged("it does not match its checksum")
            os.utime(path)  # the latest read or written are removed last
        except FileNotFoundError:
            return None
        except (pa.ArrowException, OSError, IndexError, Damaged) as error:
            log.warning("Cache: %s is not used, its rows are tokenised anew: %s", path, error)
            with suppress(OSError):
                path.unlink()
            return None
        table = pa.ipc.open_stream(content).read_all()
        found = zip(*(table[name].to_pylist() for name in COLUMNS))
        pairs = [
            Pair(tuple(p), tuple(c), tuple(r), row, tuple(its), tuple(other), margin, side)
            for p, c, r, its, other, row, margin, side in found
        ]
        told = (json.loads(table.schema.metadata[name]) for name in (b"counts", b"examples"))
        return Encoded(pairs, *told)

    def _keep(self, path: Path, found: Encoded) -> None:
        """Where it cannot be written, go on without."""
        import pyarrow as pa

        ids, kinds = pa.list_(pa.int32()), dict.fromkeys(IDS) | {"row": pa.int64()}
        fields = [pa.field(name, kinds.get(name, pa.float64()) or ids) for name in COLUMNS]
        told = {name: json.dumps(getattr(found, name)) for name in ("counts", "examples")}
        schema = pa.schema(fields, told)
        columns = [[getattr(pair, name) for pair in found.pairs] for name in COLUMNS]
        table = pa.table(columns, schema)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, schema) as stream:
            stream.write_table(table)
        content = sink.getvalue()
        beside = path.with_name(f".{path.stem}.{uuid4().hex}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(_check(content))
                file.write(content)
            beside.replace(path)
        except OSError as error:
            log.warning("Cache: no tokens kept: %s", error)
            with suppress(OSError):
                beside.unlink(missing_ok=True)
        trim(self.home, self.limit, SUFFIX)


def name_of(tokenizer: Any) -> str | None:
    """A tokenizer's name, from all that decides its tokens.

    None where that cannot be told: a tokenizer in Python, or a template that asks the time.
    """
    # a template that asks the time gives other tokens another day
    theirs = type(tokenizer).__module__.startswith("transformers.")
    template = json.dumps(tokenizer.chat_template)
    if not theirs or not tokenizer.is_fast or CLOCK in template:
        return None
    versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
    said = [CODE, versions, type(tokenizer).__name__, template, tokenizer.special_tokens_map]
    digest = hashlib.sha256(json.dumps(said, default=str, sort_keys=True).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    return digest.hexdigest()[:NAME]


def _key(rows: Sequence[Row], places: Sequence[int], how: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([list(places), how], sort_keys=True).encode())
    for row in rows:
        read = {name: row[name] for name in READ if name in row}
        digest.update(json.dumps(read, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:NAME]


def _check(content: Any) -> bytes:
    return hashlib.sha256(content).digest()


def tokens_of(cfg: DictConfig, tokenizer: Any) -> Tokens | None:
    """Where runs share what the tokenizer made of their rows; None: nowhere."""
    home, name = cache_of(cfg), name_of(tokenizer)
    if home is None or name is None:
        return None
    return Tokens(home / "tokens", name, limit_of(cfg))


def of_both_sides(cfg: DictConfig, task: Task, tokenizer: Any) -> dict[str, Encoded]:
    """Token pairs for training and held out; of a streamed file those of its first chunk."""
    kept = tokens_of(cfg, tokenizer)
    if task.chunks is None:
        train = encoded(cfg, tokenizer, task.train, "train", kept)
    else:
        rows = cfg.data.chunk_rows
        log.info("Pairs (train): those of the first %d rows; the rest follows", rows)
        train = chunk_encoder(cfg, tokenizer, kept)(next(task.chunks(0)))
        check_survivors(train.counts, f"{cfg.data.path}, the first {rows} rows")
    sides = {
        "train": train,
        "held-out": encoded(cfg, tokenizer, task.held_out, "held-out", kept),
    }
    for name, some in sides.items():
        told = ", ".join(f"{key} {count}" for key, count in some.counts.items() if count)
        log.info("Pairs (%s): %s", name, told)
    for remark in remarks([*task.train, *task.held_out], tokenizer):
        log.info("%s", remark)
    return sides


def lower_texts(cfg: DictConfig, task: Task, tokenizer: Any) -> Pairs:
    """The lower level's own texts, as pairs without a rejected side."""
    how = {"max_length": cfg.max_length, "scored": cfg.data.scored}
    texts = encode_texts(task.lower, tokenizer, **how)
    if not texts:
        raise UserError(
            f"data.sft={cfg.data.sft}: no row has a prompt and a completion that fit max_length"
        )
    log.info("Texts (lower level): kept %d of %d", len(texts), len(task.lower))
    return Pairs(texts, None, tokenizer.pad_token_id)


def encoded(
    cfg: DictConfig, tokenizer: Any, rows: Sequence[Row], name: str, kept: Tokens | None = None
) -> Encoded:
    """Token pairs of one side of the data; ``kept``: where they are looked up and kept."""
    where, how = f"{cfg.data.get('path') or 'data'} ({name})", _how(cfg)
    encode = partial(encode_pairs, rows, tokenizer, where=where, **how)
    return encode() if kept is None else kept.find(rows, range(len(rows)), how, encode)


def chunk_encoder(
    cfg: DictConfig, tokenizer: Any, kept: Tokens | None
) -> Callable[[Chunk], Encoded]:
    """Token pairs of a part of the training rows; rows have the numbers they have in the file.

    With a tokenizer of its own: two threads must not use the same one.
    """
    own, how = copy.deepcopy(tokenizer), _how(cfg)

    def encode(chunk: Chunk) -> Encoded:
        rows, places = chunk.rows, chunk.places
        anew = partial(encode_some, rows, own, places, where=cfg.data.path, **how)
        return anew() if kept is None else kept.find(rows, places, how, anew)

    return encode


def _how(cfg: DictConfig) -> dict[str, Any]:
    return {
        "max_length": cfg.max_length,
        "on_mismatch": cfg.data.on_mismatch,
        "strict": cfg.data.strict,
        "scored": cfg.data.scored,
    }
