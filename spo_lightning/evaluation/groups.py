"""Held-out rows in groups, and the numbers of each: by the name of the place that a row is from
(``data.eval_path.NAME``) and by the values of a column (``eval.by``).

What a pair adds is kept per pair and added up in the order of the pairs, so that neither batches
nor processes show in a group's numbers.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spo_lightning.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from spo_lightning.data.batch import Pair
    from spo_lightning.world import Turn, World

MOST = 50  # values of a column
Numbers = dict[str, dict[str, float]]  # by group, by name
Part = tuple[float, float]  # what a pair adds to a sum and to its count


def groups_of(rows: Sequence[Mapping[str, Any]], by: str | None) -> list[tuple[str, ...]]:
    """The groups of each row; most data has none."""
    found = []
    for number, row in enumerate(rows, 1):
        names = [row["subset"]] if "subset" in row else []
        if by is not None:
            if "by" not in row and by not in row:
                known = ", ".join(key for key in row if key not in ("subset", "by"))
                raise UserError(f"eval.by={by}: held-out row {number} has {known}: name a column")
            names.append(str(row.get("by", row.get(by))))
        found.append(tuple(names))
    return found


def groups_of_pairs(
    pairs: "Sequence[Pair]", rows: Sequence[Mapping[str, Any]], by: str | None
) -> Sequence[tuple[str, ...]]:
    """The groups of each pair, of the row that it was made of; nothing where no pair has one."""
    of_rows = groups_of(rows, by)
    found = [of_rows[pair.row] for pair in pairs]
    return found if any(found) else ()


def check(rows: Sequence[Mapping[str, Any]], by: str | None) -> None:
    """Refuse a column that is not there, or that tells nothing."""
    values = {names[-1] for names in groups_of(rows, by) if by is not None}
    if len(values) > MOST:
        told = f"eval.by={by}: {len(values)} values in {len(rows)} held-out rows"
        raise UserError(f"{told}: name a column of at most {MOST}")


def places_by(groups: Sequence[Sequence[str]]) -> dict[str, list[int]]:
    """The places of each group's rows, in their order; named places before values."""
    found: dict[str, list[int]] = {}
    for rank in range(max(map(len, groups), default=0)):
        for place, names in enumerate(groups):
            if rank < len(names) and names[rank] not in names[:rank]:
                found.setdefault(names[rank], []).append(place)
    return found


class PerPair:
    """What each held-out pair adds to every sum and count, of the pairs of this process."""

    def __init__(self) -> None:
        self.parts: dict[int, dict[str, Part]] = {}

    def add(
        self,
        turn: "Turn",
        numbers: Mapping[str, Any],
        tops: Mapping[str, "Tensor"],
        pair: "Tensor",
    ) -> None:
        """``numbers``: a value per pair of the batch, or its sum and count. ``tops``: a value per
        token, of the pair that ``pair`` says."""
        import torch

        if not turn.mine:
            return
        size = len(turn.item)
        parts: dict[str, tuple[Tensor, Tensor]] = {
            name: value if isinstance(value, tuple) else (value, torch.ones(size))
            for name, value in numbers.items()
        }
        none = torch.zeros(size, dtype=torch.float64, device=pair.device)
        for name, value in tops.items():
            each = none.index_add(0, pair, value.double())
            parts[name] = each, none.index_add(0, pair, torch.ones_like(each[pair]))
        listed = {
            name: (total.double().tolist(), count.double().tolist())
            for name, (total, count) in parts.items()
        }
        for place, index in enumerate(turn.item):
            self.parts[index] = {name: (t[place], c[place]) for name, (t, c) in listed.items()}

    def gathered(self, world: "World") -> dict[int, dict[str, Part]]:
        """The pairs of all processes, in order."""
        found = {index: part for some in world.gather(self.parts) for index, part in some.items()}
        return dict(sorted(found.items()))


def means_by(parts: Mapping[int, dict[str, Part]], groups: Sequence[Sequence[str]]) -> Numbers:
    """Sums over sums of counts, of each group's pairs."""
    found: Numbers = {}
    for group, places in places_by(groups).items():
        names = parts[places[0]]
        sums = {name: [sum(parts[p][name][k] for p in places) for k in (0, 1)] for name in names}
        found[group] = {name: total / count for name, (total, count) in sums.items() if count}
    return found
