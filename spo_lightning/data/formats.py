"""One file in, ``Block``s of its rows out, whatever its format and compression.

A block says how many rows it holds before they are parsed, so that a run that goes on skips what
it has seen. Lines and cells are counted here, because a broken one is named by its place.
"""

import bz2
import csv
import gzip
import io
import lzma
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from pathlib import Path, PurePath
from typing import Any, BinaryIO

from spo_lightning.data.rows import Row, kind_of, parsed
from spo_lightning.errors import UserError

AT_ONCE = 1024  # rows that arrow hands over together
HEAD = 200  # lines by which a csv's delimiter is found
LONGEST = 2**24  # letters of a csv's cell; python's own limit is 2**17, and transcripts are longer
AROUND = ("data", "rows", "train", "examples", "instances", "samples", "records", "items")
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
CELLS = {",": "commas", ";": "semicolons", "\t": "tabs"}

Block = tuple[int, Callable[[], Iterable[Row]]]  # how many rows, and what gives them


def suffixes(name: str) -> tuple[str, str]:
    """``.jsonl`` and ``.gz`` of ``a.jsonl.gz``, whose url may end in a query."""
    plain = name.split("::")[0].split("?")[0] if "://" in name else name
    path = PurePath(plain.lower())
    packed = path.suffix if path.suffix in UNPACKED else ""
    return PurePath(path.name.removesuffix(packed)).suffix, packed


def is_read(name: str) -> bool:
    """Whether the suffix says a format, and a compression that it is read in."""
    suffix, packed = suffixes(name)
    return suffix in (TEXTS if packed else READERS)


def blocks(name: str, *, whole: bool) -> Iterator[Block]:
    """The rows of a path or url. Not ``whole``: in constant memory, or refused."""
    suffix = suffixes(name)[0]
    if suffix in JSON and not whole:
        return JSON[suffix](name, whole=False)
    return READERS[suffix](name)


def lines(name: str) -> Iterator[str]:
    """Split at line feeds alone: others may stand inside a string."""
    empty = True
    with _opened(name) as file:
        for number, raw in enumerate(file, 1):
            try:
                # the first may begin with a byte order mark
                line = raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                packed = [end for head, end in MAGIC.items() if raw.startswith(head)]
                if number == 1 and packed:
                    told = f"{name}: packed, by its first bytes"
                    raise UserError(f"{told}: name it {name}{packed[0]}") from None
                raise UserError(f"{name}:{number}: not utf-8: convert the file") from None
            empty = empty and not line.strip()
            yield line
    if empty:
        raise UserError(f"{name}: the file is empty: name one that is not")


@contextmanager
def _opened(name: str) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked."""
    file: Any
    if "://" in name:
        import fsspec

        file = fsspec.open(name, "rb")
    else:
        file = Path(name).expanduser().open("rb")
    with file as raw:
        packed = suffixes(name)[1]
        yield UNPACKED[packed](raw) if packed else raw


def _zstd(raw: BinaryIO) -> Any:
    import pyarrow

    stream: Any = pyarrow.CompressedInputStream(raw, "zstd")
    return io.BufferedReader(stream)


def _jsonl(name: str, whole: bool = True) -> Iterator[Block]:
    """A row a line; what begins as a list is read as one."""
    numbered = enumerate(lines(name), 1)
    number, first = _full(numbered)
    if not first.lstrip().startswith("["):
        yield from _objects(chain([(number, first)], numbered), name)
    elif whole:
        yield from _whole(first + "".join(line for _, line in numbered), name, number)
    else:
        raise _one_list(name)


def _full(numbered: Iterator[tuple[int, str]]) -> tuple[int, str]:
    """The next line that is not blank."""
    return next((found for found in numbered if found[1].strip()), (1, ""))


def _objects(numbered: Iterable[tuple[int, str]], name: str) -> Iterator[Block]:
    for number, line in numbered:
        if line.strip():
            # of what is cut off the end of the line is where it breaks
            yield 1, partial(_row, line.rstrip("\r\n"), name, number)


def _row(line: str, name: str, number: int) -> list[Row]:
    return [_object(parsed(line, name, number), f"{name}:{number}")]


def _json(name: str, whole: bool = True) -> Iterator[Block]:
    """A row a line, or one list of rows, which may stand in an object."""
    numbered = enumerate(lines(name), 1)
    (number, first), (later, second) = _full(numbered), _full(numbered)
    if second and first.rstrip().endswith("}"):
        yield from _objects(chain([(number, first), (later, second)], numbered), name)
    elif whole:
        blank = "\n" * (later - number - 1)
        rest = "".join(line for _, line in numbered)
        yield from _whole(first + blank + second + rest, name, number)
    else:
        raise _one_list(name)


def _one_list(name: str) -> UserError:
    return UserError(
        f"{name}: one list, which is read whole: write one row a line as .jsonl, or leave "
        "data.stream out"
    )


def _whole(text: str, name: str, number: int) -> Iterator[Block]:
    found = parsed(text, name, number)
    if isinstance(found, dict):
        lists = [key for key, value in found.items() if _are_objects(value)]
        around = [key for key in lists if key in AROUND]
        if around and len(lists) > 1:
            told = f"{name}: lists of rows under {' and '.join(lists)}"
            raise UserError(f"{told}: write each as a file of its own")
        found = found[around[0]] if around else [found]
    rows = [_object(row, f"{name}, row {at}") for at, row in enumerate(found, 1)]
    yield len(rows), lambda: rows


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and value != [] and all(isinstance(v, dict) for v in value)


def _object(row: Any, where: str) -> Row:
    if not isinstance(row, dict):
        raise UserError(f"{where}: {kind_of(row)}, not an object: write {{'prompt': ..., ...}}")
    return row


def _csv(name: str) -> Iterator[Block]:
    yield from _sheet(name, delimiter_of(name))


def _tsv(name: str) -> Iterator[Block]:
    return _sheet(name, "\t")


def _sheet(name: str, delimiter: str) -> Iterator[Block]:
    csv.field_size_limit(LONGEST)
    reader = csv.DictReader(lines(name), delimiter=delimiter, strict=True)
    try:
        columns = list(reader.fieldnames or ())
        _check_columns(columns, f"{name}:1")
        for row in reader:
            if None in row or None in row.values():
                told = f"not {len(columns)} cells: quote the {CELLS[delimiter]}"
                raise UserError(f"{name}:{reader.line_num}: {told}")
            yield 1, partial(list, [row])
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"{name}:{line}: broken csv ({error}): repair it") from None


def _check_columns(columns: Sequence[str], where: str) -> None:
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{where}: two columns {column!r}: rename one of them")


def delimiter_of(name: str) -> str:
    """What parts a csv's header; where several could, the one that parts every row alike."""
    head = list(islice(lines(name), HEAD))
    counts = {delimiter: _cells(head, delimiter) for delimiter in CELLS}
    found = [delimiter for delimiter, count in counts.items() if count[0] > 1]
    if len(found) > 1:
        found = [delimiter for delimiter in found if len(set(counts[delimiter])) == 1]
        if len(found) != 1:
            told = f"{name}:1: its header can be parted in more than one way, and so can its rows"
            raise UserError(f"{told}: quote the cells, or write the file as .tsv or .jsonl")
    return found[0] if found else ","


def _cells(head: Sequence[str], delimiter: str) -> list[int]:
    """How many cells each record has; one that breaks the rules has none."""
    counts: list[int] = []
    try:
        for cells in csv.reader(head, delimiter=delimiter, strict=True):
            counts += [len(cells)] if cells else []
    except csv.Error:
        cut = counts and len(head) == HEAD  # the last record may go on behind the head
        counts += [] if cut else [0]
    return counts or [0]


def _parquet(name: str) -> Iterator[Block]:
    from pyarrow.parquet import ParquetFile

    with _opened(name) as file, ParquetFile(_seekable(file)) as table:
        _check_columns(table.schema_arrow.names, name)
        for group in range(table.num_row_groups):
            batches = table.iter_batches(AT_ONCE, row_groups=[group])
            rows = (row for batch in batches for row in batch.to_pylist())
            yield table.metadata.row_group(group).num_rows, partial(iter, rows)


def _arrow(name: str) -> Iterator[Block]:
    """Arrow's file form, or its stream form, which datasets writes."""
    import pyarrow.ipc

    with _opened(name) as raw:
        file = _seekable(raw)
        if file.read(6) != b"ARROW1":
            file.seek(0)
            stream = pyarrow.ipc.open_stream(file)
            _check_columns(stream.schema.names, name)
            for batch in stream:
                yield batch.num_rows, batch.to_pylist
            return
        table = pyarrow.ipc.open_file(file)
        _check_columns(table.schema.names, name)
        for number in range(table.num_record_batches):
            batch = table.get_batch(number)
            yield batch.num_rows, batch.to_pylist


def _seekable(file: BinaryIO) -> BinaryIO:
    """A server that cannot be asked for a part sends the whole."""
    return file if file.seekable() else io.BytesIO(file.read())


# read whole where they are one list
JSON: dict[str, Callable[..., Iterator[Block]]] = {
    **{".jsonl": _jsonl, ".ndjson": _jsonl, ".json": _json},
}
READERS: dict[str, Callable[[str], Iterator[Block]]] = {
    **JSON,
    **{".csv": _csv, ".tsv": _tsv},
    **{".parquet": _parquet, ".arrow": _arrow},
}
TEXTS = (
    ".jsonl",
    ".ndjson",
    ".json",
    ".csv",
    ".tsv",
)  # what is packed from outside; arrow packs inside
UNPACKED: dict[str, Callable[[Any], Any]] = {
    **{".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd},
}
TAKEN = f"{', '.join(READERS)} (or of text with {', '.join(UNPACKED)})"
