"""Keys in, rows of numbers out: tensors on disk, shared by every process that reads there.

A shard is a file written beside its place and renamed, and never changed afterwards. It holds the
keys of its rows, their lengths, and their values one after the other; one checksum guards the keys
and lengths, another the values. A shard that does not match them is removed, and said.
"""

import hashlib
import logging
import os
import struct
import time
from array import array
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO
from uuid import uuid4

import torch
from omegaconf import DictConfig
from torch import Tensor

from spo_lightning.records.lock import alone
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)

MAGIC = b"spo-row1"
KEY = 16  # bytes of a key
CHECK = 16  # bytes of a checksum
# magic, kind of number, rows, bytes of the values, checksum of the values
HEAD = struct.Struct(f"<8s8sQQ{CHECK}s")
KINDS = {b"float32": torch.float32, b"float64": torch.float64}
ABANDONED = 24 * 3600  # seconds after which a half-written file is nobody's


MAX_GB = 5.0  # cache.max_gb of a configuration that has none


def cache_of(cfg: DictConfig) -> Path | None:
    """Where runs share what they trained, sampled, tokenised and scored; None: nowhere."""
    return Path(cfg.cache.dir) if cfg.cache.get("enabled", True) else None


def limit_of(cfg: DictConfig) -> float:
    """Bytes that one kind of what is shared may take."""
    return cfg.cache.get("max_gb", MAX_GB) * 1e9


class Damaged(Exception):
    """A shard that is not what was written."""


@dataclass(frozen=True)
class Shards:
    """The rows of one ``name`` in ``home``, which has a directory for every name.

    ``limit``: bytes of all shards in ``home``, whatever their name.
    """

    home: Path
    name: str
    limit: float

    @property
    def room(self) -> Path:
        return self.home / self.name

    def find(self, wanted: Collection[bytes]) -> dict[bytes, Tensor]:
        """The rows that are there; a damaged shard is removed, and its rows are not."""
        found: dict[bytes, Tensor] = {}
        missing = set(wanted)
        for path in sorted(self.room.glob("*.rows")):
            if not missing:
                break
            try:
                some = self._read(path, missing)
            except FileNotFoundError:  # another run's size limit took it
                continue
            except (Damaged, OSError) as error:
                log.warning("Cache: %s is not used and its rows are found anew: %s", path, error)
                if isinstance(error, Damaged):
                    with suppress(OSError):
                        path.unlink()
                continue
            found |= some
            missing -= some.keys()
        return found

    def keep(self, rows: Mapping[bytes, Tensor]) -> None:
        """Write one shard of all rows that are finite; where that fails, go on without."""
        finite = {key: row for key, row in rows.items() if bool(row.isfinite().all())}
        if len(finite) < len(rows):
            log.warning("Cache: %d rows are not finite: not kept", len(rows) - len(finite))
        if not finite:
            return
        content, name = _packed(self.name, finite)
        beside = self.room / f".{name}.{uuid4().hex}.tmp"
        try:
            self.room.mkdir(parents=True, exist_ok=True)
            with beside.open("wb") as file:
                file.write(content)
            beside.replace(self.room / f"{name}.rows")
        except OSError as error:
            log.warning("Cache: nothing kept: %s", error)
            with suppress(OSError):
                beside.unlink(missing_ok=True)

    def trim(self) -> None:
        """Remove the least recently used shards of any name until ``limit`` holds."""
        trim(self.home, self.limit, ".rows")

    def alone(self, stages: Stages) -> AbstractContextManager[None]:
        """One process at a time, where the file system has locks; a signal ends the wait."""
        return alone(self.home / f"{self.name}.lock", stages.check)

    def _read(self, path: Path, wanted: Collection[bytes]) -> dict[bytes, Tensor]:
        with path.open("rb") as file:
            kind, check, keys, lengths = _index(file, self.name)
            places = [place for place, key in enumerate(keys) if key in wanted]
            if not places:
                return {}
            values = file.read()
        if _checksum(values) != check or not values:
            raise Damaged("its values do not match their checksum")
        with suppress(OSError):
            os.utime(path)  # the latest read or written are removed last
        rows = torch.frombuffer(bytearray(values), dtype=kind).split(lengths)
        # copies: a row that is kept must not keep its whole shard
        return {keys[place]: rows[place].clone() for place in places}


def trim(home: Path, limit: float, kind: str) -> None:
    """Remove the least recently used files of a kind, a suffix, in the directories of ``home``."""
    found = []
    for path in home.glob("*/*"):
        with suppress(OSError):
            at = path.stat()
            if path.suffix == kind:
                found.append((at.st_mtime_ns, path, at.st_size))
            elif path.suffix == ".tmp" and time.time() - at.st_mtime > ABANDONED:
                path.unlink()
    size, gone = sum(taken for *_, taken in found), 0
    for _, path, taken in sorted(found):
        if size <= limit:
            break
        with suppress(OSError):
            path.unlink(missing_ok=True)
            size, gone = size - taken, gone + 1
    if gone:
        log.info(
            "Cache: removed %d of %d files in %s, the least recently used: they exceed "
            "cache.max_gb=%g",
            *(gone, len(found), home, limit / 1e9),
        )


def _packed(name: str, rows: Mapping[bytes, Tensor]) -> tuple[bytes, str]:
    """A shard, and what to call it: the same rows have the same name."""
    values = torch.cat([row.detach().cpu().reshape(-1) for row in rows.values()])
    kind = next(kind for kind, dtype in KINDS.items() if dtype == values.dtype)
    body = values.numpy().tobytes()
    head = HEAD.pack(MAGIC, kind, len(rows), len(body), _checksum(body))
    lengths = array("Q", [row.numel() for row in rows.values()]).tobytes()
    index = head + b"".join(rows) + lengths
    check = _checksum(name.encode(), index)
    return index + check + body, check.hex()


def _index(file: BinaryIO, name: str) -> tuple[Any, bytes, list[bytes], list[int]]:
    """Kind of number, checksum of the values, keys and lengths; the file is left at the values."""
    head = file.read(HEAD.size)
    if len(head) < HEAD.size or not head.startswith(MAGIC):
        raise Damaged("it does not begin as one")
    _, kind, rows, size, check = HEAD.unpack(head)
    width = rows * (KEY + 8)
    if os.fstat(file.fileno()).st_size != HEAD.size + width + CHECK + size:
        raise Damaged("its length is not that of its rows")
    index = file.read(width)
    if file.read(CHECK) != _checksum(name.encode(), head + index):
        raise Damaged("its keys do not match their checksum")
    keys = [index[KEY * row : KEY * (row + 1)] for row in range(rows)]
    lengths = array("Q")
    lengths.frombytes(index[KEY * rows :])
    return KINDS[kind.rstrip(b"\0")], check, keys, lengths.tolist()


def _checksum(*parts: bytes) -> bytes:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.digest()[:CHECK]
