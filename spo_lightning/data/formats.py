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
    if suffix == ".json" and not whole:
        return _json(name, whole=False)
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


def _jsonl(name: str) -> Iterator[Block]:
    return _objects(enumerate(lines(name), 1), name)


def _objects(numbered: Iterable[tuple[int, str]], name: str) -> Iterator[Block]:
    for number, line in numbered:
        if line.strip():
            # of what is cut off the end of the line is where it breaks
            yield 1, partial(_row, line.rstrip("\r\n"), name, number)


def _row(line: str, name: str, number: int) -> list[Row]:
    return [_object(parsed(line, name, number), f"{name}:{number}")]


def _json(name: str, whole: bool = True) -> Iterator[Block]:
    """One list of rows, or a row a line."""
    numbered = enumerate(lines(name), 1)
    number, first = next((found for found in numbered if found[1].strip()), (1, ""))
    if not first.lstrip().startswith("["):
        yield from _objects(chain([(number, first)], numbered), name)
    elif whole:
        text = first + "".join(line for _, line in numbered)
        rows = enumerate(parsed(text, name, number), 1)
        found = [_object(row, f"{name}, row {at}") for at, row in rows]
        yield len(found), lambda: found
    else:
        raise UserError(
            f"{name}: one list, which is read whole: write one row a line as .jsonl, or leave "
            "data.stream out"
        )


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
        for column in columns:
            if columns.count(column) > 1:
                raise UserError(f"{name}:1: two columns {column!r}: rename one of them")
        for row in reader:
            if None in row or None in row.values():
                told = f"not {len(columns)} cells: quote the {CELLS[delimiter]}"
                raise UserError(f"{name}:{reader.line_num}: {told}")
            yield 1, partial(list, [row])
    except csv.Error as error:
        line = reader.reader.line_num
        raise UserError(f"{name}:{line}: broken csv ({error}): repair it") from None


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
            for batch in pyarrow.ipc.open_stream(file):
                yield batch.num_rows, batch.to_pylist
            return
        table = pyarrow.ipc.open_file(file)
        for number in range(table.num_record_batches):
            batch = table.get_batch(number)
            yield batch.num_rows, batch.to_pylist


def _seekable(file: BinaryIO) -> BinaryIO:
    """A server that cannot be asked for a part sends the whole."""
    return file if file.seekable() else io.BytesIO(file.read())


READERS: dict[str, Callable[[str], Iterator[Block]]] = {
    **{".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _tsv},
    **{".parquet": _parquet, ".arrow": _arrow},
}
TEXTS = (".jsonl", ".json", ".csv", ".tsv")  # what is packed from outside; arrow packs inside
UNPACKED: dict[str, Callable[[Any], Any]] = {
    **{".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _zstd},
}
TAKEN = f"{', '.join(READERS)} (or of text with {', '.join(UNPACKED)})"
