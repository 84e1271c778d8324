"""Rows in, token pairs out: tokenised once for all runs, read from mapped files afterwards.

What is kept is known by the rows themselves, the tokenizer and how it is asked; neither by the
model nor by the run. A file is written beside its place and renamed; one that does not match its
checksum is removed, said, and its rows are tokenised anew.
"""

import hashlib
import importlib.metadata
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from spo_lightning.cache.shards import Damaged, trim
from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import Encoded
from spo_lightning.data.rows import Row

log = logging.getLogger(__name__)

CODE = 1  # raise it when the same rows and tokenizer come to give other tokens
READ = ("prompt", "chosen", "rejected", "tools", "chat_template_kwargs")  # of a row
COLUMNS = ("prompt", "chosen", "rejected", "row")  # of a file, as of a Pair
SUFFIX = ".tokens"
CHECK = 32  # bytes of the checksum, before an arrow stream
NAME = 32  # hexadecimal digits of a name
CLOCK = "strftime_now"  # a template that asks the time gives other tokens another day


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
            with pa.memory_map(str(path)) as file:
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
        *sides, places = (table[name].to_pylist() for name in COLUMNS)
        pairs = [Pair(*map(tuple, ids), row=row) for *ids, row in zip(*sides, places)]
        return Encoded(pairs, json.loads(table.schema.metadata[b"counts"]))

    def _keep(self, path: Path, found: Encoded) -> None:
        """Where it cannot be written, go on without."""
        import pyarrow as pa

        kinds = (pa.list_(pa.int32()),) * 3 + (pa.int64(),)
        fields = [pa.field(name, kind) for name, kind in zip(COLUMNS, kinds)]
        schema = pa.schema(fields, {"counts": json.dumps(found.counts)})
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
