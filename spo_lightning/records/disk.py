"""Text and bytes to files that are whole or not there; a full disk as one line."""

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

from spo_lightning.errors import CannotWrite, is_full

MIB = 2**20


@contextmanager
def writing(path: Path, needed: int | None = None, safe: str = "") -> Iterator[None]:
    """A full disk inside is a ``CannotWrite`` that names ``path``.

    ``needed``: bytes, where it is known; ``safe``: what stays as it was.
    """
    try:
        yield
    except Exception as error:
        if not is_full(error):
            raise
        wants = "" if needed is None else f"{_size(needed)} wanted, "
        free = f"{_size(shutil.disk_usage(path.parent).free)} free there"
        why = getattr(error, "strerror", None) or "no room on the disk"
        raise CannotWrite(
            f"cannot write {path}: {why} ({wants}{free}): make room{safe and f'; {safe}'}"
        ) from error


@contextmanager
def writing_folder(path: Path) -> Iterator[None]:
    """The same of a folder, of which no half stays."""
    try:
        with writing(path):
            yield
    except CannotWrite:
        shutil.rmtree(path, ignore_errors=True)
        raise


def _size(count: int) -> str:
    return f"{count / MIB:.1f} MiB" if count < 1024 * MIB else f"{count / MIB / 1024:.1f} GiB"


def write_text(path: Path, text: str) -> None:
    """Beside, then renamed: a reader never sees half a file."""
    beside = path.with_name(f"{path.name}.{uuid4().hex}.tmp")  # nodes share a process's number
    with writing(path):
        try:
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def json_rows(path: Path) -> list[Any]:
    """Of a file with one in every line. (``str.splitlines`` would also break a text within a row,
    at marks as U+2028 that JSON leaves as they are.)"""
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """The first row's keys are the head."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(path, text.getvalue())


def overwrite(path: Path, text: str) -> None:
    """In place: takes no room that the file has not already."""
    with path.open("r+", encoding="utf-8") as file:
        file.write(text)
        file.truncate()


def force(path: Path) -> None:
    """Wait until a file, or a directory's names, are on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
