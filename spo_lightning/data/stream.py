"""A file too large to hold in, chunks of its rows out: what training reads while it goes on.

The readers and messages of ``rows.read``, one row after the other. Chunks are cut by rows of the
file, so chunk ``n`` begins at row ``n * size`` whatever the rows before it hold.
"""

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from spo_lightning.data import rows
from spo_lightning.data.rows import Chunk, Row
from spo_lightning.errors import UserError

AT_ONCE = 1024  # rows that arrow hands over together


def chunks(
    path: str,
    *,
    size: int,
    split: str,
    separator: str | None,
    trains: Callable[[Row], bool],
    start: int,
) -> Iterator[Chunk]:
    """Validated training rows, ``size`` rows of the file at a time, from chunk ``start`` on."""
    for number, raw in enumerate(parts(path, size=size, split=split, start=start), start):
        first = number * size
        given = rows.preference_rows(raw, path, separator, first + 1)
        kept = [(place, row) for place, row in enumerate(given, first) if trains(row)]
        yield Chunk(number, [row for _, row in kept], [place for place, _ in kept])


def parts(path: str, *, size: int, split: str, start: int) -> Iterator[list[Row]]:
    """The file's rows as they stand there, ``size`` at a time, from part ``start`` on."""
    found = _rows(path, split, start * size)
    while part := list(islice(found, size)):
        yield part


def _rows(path: str, split: str, skipped: int) -> Iterator[Row]:
    place, where = Path(path).expanduser(), "data.path"
    if place.suffix == ".json" and not place.is_dir():
        raise UserError(
            f"{path}: one list, which is read whole: write one row a line as .jsonl, or leave "
            "data.stream out"
        )
    if place.is_dir():
        return _mapped(rows.saved(place, split), skipped)
    if rows.is_file(path, READERS, where):
        return READERS[place.suffix](rows.existing(place, where), skipped)
    return _mapped(rows.hub(path, split, where), skipped)


def _lines(path: Path) -> Iterator[str]:
    """Split at line feeds alone: others may stand inside a string."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                # the first may begin with a byte order mark
                yield raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError:
                raise UserError(f"{path}:{number}: not utf-8: convert the file") from None


def _jsonl(path: Path, skipped: int) -> Iterator[Row]:
    full = ((number, line) for number, line in enumerate(_lines(path), 1) if line.strip())
    return (rows.json_row(line, path, number) for number, line in islice(full, skipped, None))


def _csv(path: Path, skipped: int) -> Iterator[Row]:
    return islice(rows.csv_rows(_lines(path), path), skipped, None)


def _parquet(path: Path, skipped: int) -> Iterator[Row]:
    from pyarrow.parquet import ParquetFile

    with rows.parquet_errors(path), ParquetFile(path) as file:
        for group in range(file.num_row_groups):
            inside = file.metadata.row_group(group).num_rows
            if skipped >= inside:
                skipped -= inside
                continue
            batches = file.iter_batches(AT_ONCE, row_groups=[group])
            yield from islice(_flat(batch.to_pylist() for batch in batches), skipped, None)
            skipped = 0


def _mapped(data: Any, skipped: int) -> Iterator[Row]:
    starts = range(skipped, len(data), AT_ONCE)
    return _flat(data.select(range(s, min(s + AT_ONCE, len(data)))).to_list() for s in starts)


def _flat(parts: Iterable[list[Row]]) -> Iterator[Row]:
    return (row for part in parts for row in part)


READERS = {".jsonl": _jsonl, ".parquet": _parquet, ".csv": _csv}
