"""Raw rows and what a source's keys say of them in, the rows as layouts look at them out."""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property

from spo_lightning.data.layouts.columns import chosen_by_user, kinds_of, unpacked
from spo_lightning.data.layouts.known import Groups, Kinds
from spo_lightning.data.rows import Row, Rows
from spo_lightning.errors import UserError


@dataclass(frozen=True)
class Asked:
    """What the keys of a source say of how its rows are read."""

    columns: Mapping[str, str] = field(default_factory=dict)  # by role: data.columns
    key: str | None = None  # of the columns, where the source has one
    separator: str | None = None
    pairing: str = "best_worst"
    seed: int = 0
    unpaired: bool = False  # labelled answers stay apart


@dataclass(frozen=True)
class File:
    """Raw rows with the columns that the user named, and where each stands."""

    path: str
    rows: list[Row]
    kinds: list[Kinds]
    asked: Asked
    name: Callable[[int], str]  # of the row at a place

    @cached_property
    def groups(self) -> Groups:
        """The sets of columns and kinds that its rows have: how many do, and the first place."""
        counts = Counter(map(id, self.kinds))
        first: dict[int, int] = {}
        for place, kinds in enumerate(self.kinds):
            first.setdefault(id(kinds), place)
        return [(self.kinds[place], counts[same], place) for same, place in first.items()]


def file_of(path: str, raw: Rows, asked: Asked) -> File:
    """The rows as layouts look at them."""
    read = []
    for at, row in enumerate(raw):
        try:
            read.append(unpacked(row))
        except UserError as error:
            raise UserError(f"{raw.named(at)}: {error}") from None
    rows = chosen_by_user(read, asked.columns, path)
    same: dict[tuple, Kinds] = {}
    kinds = [same.setdefault(tuple(found.items()), found) for found in map(kinds_of, rows)]
    return File(path, rows, kinds, asked, raw.named)
