"""Checkpoints of a run: written whole or not at all, and the newest whole one read.

A checkpoint is written beside its name, forced to the disk, then renamed, so a kill or a full disk
leaves the one before it. That one stays as ``previous.ckpt`` while the run trains: a last.ckpt
that was cut later, by a fault of the disk or by hand, costs the steps between two writes and not
the run. It costs no room, as it stands where the next write goes (two at once is what any whole
write needs): it goes before that begins, and when the training has ended.

It is a file, or where parameters are spread over processes a directory (``parts.py``), which any
number of them can go on from.
"""

import logging
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records import parts
from spo_lightning.records.disk import force, writing

log = logging.getLogger(__name__)

BESIDE = ".tmp"


def former(last: Path) -> Path:
    """Where the one before it stays."""
    return last.with_name("previous.ckpt")


def remove(path: Path) -> None:
    """A checkpoint of either form, if there is one."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def put(path: Path, save: Callable[[Path], None], *, keep_former: bool, first: bool) -> None:
    """``save`` writes the checkpoint, in every process; the first one gives it its name."""
    beside = path.with_name(path.name + BESIDE)
    if first and keep_former:
        remove(former(path))
    try:
        save(beside)
    except BaseException:
        if first:
            remove(beside)
        raise
    if not first:
        return
    if keep_former and path.exists():
        path.replace(former(path))  # a kill here leaves both whole, under other names
    if path.is_dir() or beside.is_dir():  # which take no other's place
        remove(path)
    beside.replace(path)
    force(path.parent)


def _ours(beside: Path) -> tuple[Path, str]:
    """The name that ``put`` will give it, and what is safe if it cannot be written."""
    path = beside.with_name(beside.name.removesuffix(BESIDE))
    if path.exists() or path.with_name("last.ckpt").exists():
        return path, "the last.ckpt before it is whole, and ckpt_path=last goes on from there"
    return path, "the run has no checkpoint before it"


def write_parts(tree: dict[str, Any], beside: Path, *, first: bool) -> None:
    """What a checkpoint of spread parameters holds, to the directory that ``put`` names."""
    path, safe = _ours(beside)
    if first:  # the others' parts wait for its plan
        remove(beside)
    with writing(path, parts.bytes_of(tree), safe):
        parts.write(tree, beside, first=first)


def write(tree: dict[str, Any], beside: Path) -> None:
    """What a checkpoint holds, to the file that ``put`` names."""
    import torch

    path, safe = _ours(beside)
    remove(beside)  # half of one, of either form, where a write was killed
    with writing(path, _size(tree), safe):  # what is free is asked when the half is gone
        try:
            with beside.open("wb") as file:
                torch.save(tree, file)
            force(beside)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def _size(tree: Any) -> int:
    """Bytes of its tensors, each storage once."""
    import torch

    seen: dict[int, int] = {}

    def look(node: Any) -> None:
        if isinstance(node, torch.Tensor):
            storage = node.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        elif isinstance(node, dict):
            for value in node.values():
                look(value)
        elif isinstance(node, (list, tuple)):
            for value in node:
                look(value)

    look(tree)
    return sum(seen.values())


def read(path: Path) -> dict[str, Any]:
    """The checkpoint; one that is cut, damaged or not of ours is the user's error."""
    try:
        found = parts.read(path) if path.is_dir() else _read(path)
        int(dict(found)["spo_lightning"]["outer_step"])
    except Exception as error:  # of a stranger's file, whatever torch makes of it
        said = str(error).strip().splitlines() or [repr(error)]
        raise UserError(f"{path}: no whole checkpoint of ours ({said[0]})") from error
    return found


def _read(path: Path) -> dict[str, Any]:
    import torch

    with zipfile.ZipFile(path) as archive:  # torch itself checks no sums
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"its {damaged} is damaged")
    return torch.load(path, map_location="cpu", weights_only=True)


def newest(last: Path, best: Path) -> tuple[Path, dict[str, Any]] | None:
    """The checkpoint that a run goes on from, and what it holds; None where it has none.

    Where last.ckpt is not whole, the one before it takes its place, or else the best one is taken;
    the notice says so.
    """
    broken: list[tuple[Path, UserError]] = []
    for path in (last, former(last), best):
        if not path.exists():
            continue
        try:
            found = read(path)
        except UserError as error:
            broken.append((path, error))
            continue
        for cut, error in broken:
            step = found["spo_lightning"]["outer_step"]
            log.warning("%s: taking %s of outer step %d in its place", error, path.name, step)
            remove(cut)
        if path == former(last):
            path = path.replace(last)
        return path, found
    if broken:
        _, error = broken[0]
        raise UserError(
            f"{error}, and no other checkpoint of the run is whole: bring the file back, or start "
            "a new run in another hydra.run.dir"
        )
    return None
