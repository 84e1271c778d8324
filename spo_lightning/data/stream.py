"""A place too large to hold in, chunks of its rows out: what training reads while it goes on.

Chunks are cut by rows of the place, so chunk ``n`` begins at row ``n * size`` whatever the rows
before it hold.
"""

from collections.abc import Callable, Iterator

from spo_lightning.data import rows
from spo_lightning.data.reading import Place
from spo_lightning.data.rows import Chunk, Row


def chunks(
    place: Place,
    *,
    size: int,
    separator: str | None,
    trains: Callable[[Row], bool],
    start: int,
) -> Iterator[Chunk]:
    """Validated training rows, ``size`` rows of the place at a time, from chunk ``start`` on."""
    for number, raw in enumerate(place.parts(size, start), start):
        given = enumerate(rows.preference_rows(raw, separator), number * size)
        kept = [(at, row) for at, row in given if trains(row)]
        yield Chunk(number, [row for _, row in kept], [at for at, _ in kept])
