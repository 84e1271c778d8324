"""A checkpoint of what is spread over processes: a directory, to which each writes its parts.

torch.distributed.checkpoint writes and reads them, as safetensors; what all processes have is one
more file of torch's. Nothing in it is unpickled beyond what ``weights_only`` allows.
"""

import logging
import warnings
import zipfile
from collections.abc import Callable
from math import prod
from pathlib import Path
from typing import Any

from spo_lightning.records.disk import force

REST = "rest.pt"
PART = "spread tensor"  # the key of what stands in REST for one
FILES = 32  # of a process, at most: what stands in one is copied while it is written
LEAST = 2**20  # bytes of such a file, unless there is no more
Tree = Any  # of dicts, lists and tuples


def bytes_of(tree: Tree) -> int:
    """Of this process's parts."""
    spread: list[Any] = []
    _walked(tree, lambda tensor: spread.append(tensor.to_local()))
    return sum(part.numel() * part.dtype.itemsize for part in spread)


def write(tree: Tree, folder: Path, *, first: bool) -> None:
    """Every process calls it, on a folder that is not there."""
    import torch
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    spread: dict[str, Any] = {}

    def put(tensor: Any) -> dict[str, Any]:
        key = str(len(spread))
        spread[key] = tensor.detach()
        return {PART: key, "shape": [*tensor.shape]}

    rest = _walked(tree, put)
    writer = HuggingFaceStorageWriter(str(folder), _files(spread), save_distributed=True)
    logging.getLogger("torch.distributed.checkpoint").setLevel(logging.ERROR)
    try:
        save(spread, storage_writer=writer)
    except CheckpointException as error:  # of a full disk above all
        causes = [cause for cause, _ in error.failures.values() if isinstance(cause, OSError)]
        raise causes[0] if causes else error from None
    if first:
        with (folder / REST).open("wb") as file:
            torch.save(rest, file)
        force(folder / REST)
        force(folder)


def _files(spread: dict[str, Any]) -> dict[str, int]:
    """The number, from 1, of the file in which a process writes its part of each."""
    sizes = {key: bytes_of(tensor) for key, tensor in spread.items()}
    most, number, held = max(LEAST, sum(sizes.values()) // FILES), 1, 0
    found = {}
    for key, size in sizes.items():
        if held and held + size > most:
            number, held = number + 1, 0
        found[key], held = number, held + size
    return found


def read(folder: Path) -> Tree:
    """The tree with whole tensors on the CPU; parts that are missing are a ValueError."""
    import torch
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    with zipfile.ZipFile(folder / REST) as archive:
        if archive.testzip() is not None:
            raise ValueError(f"its {REST} is damaged")
    rest = torch.load(folder / REST, map_location="cpu", weights_only=True)
    reader = HuggingFaceStorageReader(str(folder))
    found: Any = reader.read_metadata().state_dict_metadata
    spread: dict[str, Any] = {}

    def room(told: dict[str, Any]) -> Any:
        key, shape = told[PART], told["shape"]
        there = sum(prod(chunk.sizes) for chunk in found[key].chunks) if key in found else 0
        if there != prod(shape):
            raise ValueError(f"parts are missing: {there} of {prod(shape)} numbers of one tensor")
        spread[key] = torch.empty(shape, dtype=found[key].properties.dtype)
        return spread[key]

    tree = _filled(rest, room)
    with warnings.catch_warnings():  # that each process reads by itself is meant
        warnings.simplefilter("ignore")
        load(spread, storage_reader=reader, no_dist=True)
    return tree


def _walked(tree: Tree, of: Callable[[Any], Any]) -> Tree:
    """The tree with what ``of`` makes of spread tensors."""
    if hasattr(tree, "full_tensor"):
        return of(tree)
    if isinstance(tree, dict):
        return {key: _walked(value, of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_walked(value, of) for value in tree)
    return tree


def _filled(tree: Tree, of: Callable[[dict[str, Any]], Any]) -> Tree:
    """The tree with what ``of`` makes of what stands for spread tensors."""
    if isinstance(tree, dict):
        if PART in tree:
            return of(tree)
        return {key: _filled(value, of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_filled(value, of) for value in tree)
    return tree
