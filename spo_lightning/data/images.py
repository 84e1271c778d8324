"""Pairs of images from parquet files, webdataset archives or a folder in, checked rows out.

Columns are ``prompt``, ``chosen`` and ``rejected``, or ``prompt``, ``image_0``, ``image_1`` and
``label``: 1 if image_0 is better, 0 if image_1 is, and 0.5 of a tie, which is left out.
Pick-a-Pic's own names of these are known too.
"""

import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from spo_lightning.data.pictures import PictureRow, Pictures
from spo_lightning.data.rows import split
from spo_lightning.errors import UserError

# as Pick-a-Pic has them -> as they are called here
ALIASES = {"caption": "prompt", "jpg_0": "image_0", "jpg_1": "image_1", "label_0": "label"}
BY_LABEL, BY_SIDE = ("image_0", "image_1"), ("chosen", "rejected")
FOLDER = "metadata.jsonl"  # of a folder: a row a line, its images as paths beside it
Found = tuple[str, Mapping[str, Any]]  # where a row stands, and what it holds


def images(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
) -> Pictures:
    """Pairs as somebody judged them. Raises UserError that names the file, the row and the key."""
    if path is None:
        raise UserError("data.path: name parquet files, webdataset archives (tar) or a folder")
    rows, ties = _rows(path, "data.path")
    if eval_path is None:
        asked = [{"prompt": row.prompt, "row": row} for row in rows]
        train, held = ([row["row"] for row in side] for side in split(asked, eval_fraction))
    else:
        held, _ = _rows(eval_path, "data.eval_path")
        prompts = {row.prompt for row in held}
        train = [row for row in rows if row.prompt not in prompts]
    train = train[:max_rows]
    for side, some in (("train on", train), ("measure on", held)):
        if not some:
            raise UserError(
                f"{path}: of {len(rows)} pairs none is left to {side}: give more prompts, or set "
                "data.eval_fraction or data.eval_path"
            )
    told = f"Pairs of images: {len(train)} to train on, {len(held)} held out, {ties} ties left out"
    return Pictures(train=train, held_out=held, notes=(told,))


def _rows(name: str, key: str) -> tuple[list[PictureRow], int]:
    """Rows without ties, and how many ties there were."""
    rows, ties = [], 0
    for where, row in _found(Path(name).expanduser(), key):
        named = {ALIASES.get(column, column): value for column, value in row.items()}
        made = _row(where, named)
        rows += [made] if made else []
        ties += made is None
    if not rows:
        raise UserError(f"{name}: it holds no pair of images")
    return rows, ties


def _row(where: str, row: Mapping[str, Any]) -> PictureRow | None:
    prompt, label = row.get("prompt"), row.get("label")
    if not isinstance(prompt, str) or not prompt.strip():
        raise UserError(f"{where}: 'prompt' is missing or no text: correct it")
    sides = BY_SIDE if BY_SIDE[0] in row else BY_LABEL
    for side in sides:
        if row.get(side) is None:
            raise UserError(f"{where}: {side!r} is missing: give chosen and rejected, or image_0, "
                            "image_1 and label")  # fmt: skip
    first, second = (_pixels(where, side, row[side]) for side in sides)
    if sides is BY_SIDE:
        label = 1
    if label not in (0, 0.5, 1) or isinstance(label, str):
        raise UserError(f"{where}: 'label' is {label!r}: give 1 (image_0 is better), 0 or 0.5")
    if label == 0.5 or (first.shape == second.shape and (first == second).all()):
        return None
    return PictureRow(prompt, *((first, second) if label == 1 else (second, first)))


def _pixels(where: str, side: str, value: Any) -> np.ndarray:
    """[H, W, 3] of the bytes of an image, of datasets' {bytes, path}, or of pixels as they are."""
    from PIL import Image, UnidentifiedImageError

    if isinstance(value, Mapping):
        value = value.get("bytes")
    if not isinstance(value, bytes):
        raise UserError(f"{where}: {side!r} holds no bytes of an image: correct it")
    try:
        return np.asarray(Image.open(io.BytesIO(value)).convert("RGB"))
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise UserError(f"{where}: {side!r} is no image that can be read: correct it") from error


def _found(path: Path, key: str) -> Iterator[Found]:
    """Rows of whatever stands there, in order."""
    if path.is_dir() and (path / FOLDER).exists():
        yield from _of_folder(path)
        return
    files = sorted(it for it in path.rglob("*") if it.is_file()) if path.is_dir() else [path]
    known = [it for it in files if it.suffix in READERS]
    if not known or not path.exists():
        raise UserError(
            f"{key}={path}: no such file, or no parquet, tar or folder with {FOLDER}: correct it"
        )
    for file in known:
        yield from READERS[file.suffix](file)


def _of_parquet(file: Path) -> Iterator[Found]:
    import pyarrow as arrow
    from pyarrow import parquet

    try:
        held = parquet.ParquetFile(file)
        number = 0
        for batch in held.iter_batches(64):
            for row in batch.to_pylist():
                number += 1
                yield f"{file}, row {number}", row
    except (arrow.ArrowException, OSError) as error:
        raise UserError(f"{file} is no parquet file that can be read: {error}") from error


def _of_archive(file: Path) -> Iterator[Found]:
    """A webdataset: the files of a row begin alike, up to the first dot of their names. A column
    ``json`` holds the rest of the row; prompt and label may be files of their own."""
    try:
        with tarfile.open(file) as held:
            name, row = None, {}
            for member in held:
                if not member.isfile():
                    continue
                stem, _, rest = Path(member.name).name.partition(".")
                if name is not None and stem != name:
                    yield f"{file}, {name}", row
                    row = {}
                name = stem
                reader = held.extractfile(member)
                assert reader is not None  # of a file
                row |= _column(f"{file}, {stem}", rest, reader.read())
            if name is not None:
                yield f"{file}, {name}", row
    except tarfile.TarError as error:
        raise UserError(f"{file} is no archive that can be read: {error}") from error


def _column(where: str, rest: str, content: bytes) -> dict[str, Any]:
    column = rest.split(".")[0]
    try:
        if column == "json":
            return dict(json.loads(content))
        if rest.endswith("txt") or column in ("prompt", "caption"):
            text = content.decode("utf-8").strip()
            return {column if column != "txt" else "prompt": text}
        if column.startswith("label"):
            return {column: float(content)}
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {rest} cannot be read: {error}") from error
    return {column: content}


def _of_folder(path: Path) -> Iterator[Found]:
    with (path / FOLDER).open(encoding="utf-8") as file:
        lines = [*file]  # str.splitlines would break prompts too
    for number, line in enumerate(lines, 1):
        where = f"{path / FOLDER}, row {number}"
        try:
            row = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise UserError(f"{where}: it is no JSON object: correct it") from error
        for column in (*BY_LABEL, *BY_SIDE, "jpg_0", "jpg_1"):
            if isinstance(row.get(column), str):
                file = path / row[column]
                if not file.is_file():
                    raise UserError(f"{where}: {column!r} names {row[column]}, which is not there")
                row[column] = file.read_bytes()
        yield where, row


READERS = {".parquet": _of_parquet, ".tar": _of_archive}
