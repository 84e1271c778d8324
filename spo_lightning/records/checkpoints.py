"""Checkpoints of a run: written whole or not at all, and the newest whole one read.

A checkpoint is written beside its name, forced to the disk, then renamed, so a kill or a full disk
leaves the one before it. That one stays as ``previous.ckpt`` while the run trains: a last.ckpt
that was cut later, by a fault of the disk or by hand, costs the steps between two writes and not
the run. It costs no room, as it stands where the next write goes (two at once is what any whole
write needs): it goes before that begins, and when the training has ended.
"""

import logging
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.disk import force, writing

log = logging.getLogger(__name__)

BESIDE = ".tmp"


def former(last: Path) -> Path:
    """Where the one before it stays."""
    return last.with_name("previous.ckpt")


def put(path: Path, save: Callable[[Path], None], *, keep_former: bool, first: bool) -> None:
    """``save`` writes the checkpoint, in every process; the first one gives it its name."""
    beside = path.with_name(path.name + BESIDE)
    if first and keep_former:
        former(path).unlink(missing_ok=True)
    try:
        save(beside)
    except BaseException:
        if first:
            beside.unlink(missing_ok=True)
        raise
    if not first:
        return
    if keep_former and path.exists():
        path.replace(former(path))  # a kill here leaves both whole, under other names
    beside.replace(path)
    force(path.parent)


def write(tree: dict[str, Any], beside: Path) -> None:
    """What a checkpoint holds, to the file that ``put`` names."""
    import torch

    path = beside.with_name(beside.name.removesuffix(BESIDE))
    safe = "the run has no checkpoint before it"
    if path.exists() or path.with_name("last.ckpt").exists():
        safe = "the last.ckpt before it is whole, and ckpt_path=last goes on from there"
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
    """The checkpoint; a file that is cut, damaged or not of ours is the user's error."""
    import torch

    try:
        with zipfile.ZipFile(path) as archive:  # torch itself checks no sums
            damaged = archive.testzip()
        if damaged is not None:
            raise zipfile.BadZipFile(f"its {damaged} is damaged")
        found = torch.load(path, map_location="cpu", weights_only=True)
        int(dict(found)["spo_lightning"]["outer_step"])
    except Exception as error:  # of a stranger's file, whatever torch makes of it
        said = str(error).strip().splitlines() or [repr(error)]
        raise UserError(f"{path}: no whole checkpoint of ours ({said[0]})") from error
    return found


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
            cut.unlink()
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
