"""A place too large to hold in, chunks of its rows out: what training reads while it goes on.

Chunks are cut by rows of the place, so chunk ``n`` begins at row ``n * size`` whatever the rows
before it hold. All are read by the layout of the first.
"""

from collections.abc import Callable, Iterator
from itertools import count

from spo_lightning.data import layouts
from spo_lightning.data.layouts.known import Layout
from spo_lightning.data.reading import Place
from spo_lightning.data.rows import Chunk, Row


def chunks(
    place: Place,
    *,
    size: int,
    layout: Layout,
    asked: layouts.Asked,
    trains: Callable[[Row], bool],
    start: int,
    every: int,
) -> Iterator[Chunk]:
    """Validated training rows, ``size`` rows of the place at a time, from chunk ``start`` on; of
    ``every`` chunks the first, whose rows alone are parsed."""
    for number, raw in zip(count(start, every), place.parts(size, start, every)):
        made = layouts.made_to_train(layouts.file_of(place.title, raw, asked), layout)
        first = number * size
        kept = [(first + at, row) for at, row in zip(made.places, made.rows) if trains(row)]
        yield Chunk(number, [row for _, row in kept], [at for at, _ in kept])
