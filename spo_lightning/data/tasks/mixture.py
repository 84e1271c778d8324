"""Several sources in proportion to weights. Every source splits by the same hash of the prompt."""

from collections.abc import Callable
from typing import Any

from spo_lightning.data.rows import Row, Task, limit, without
from spo_lightning.errors import UserError


def mixture(
    *, sources: dict[str, Task], weights: dict[str, float], max_rows: int | None, seed: int
) -> Task:
    """As many rows as the scarcest source allows; ``source`` names where a row is from."""
    _check(sources, weights)
    held = [row for name, task in sources.items() for row in _named(task.held_out, name)]
    # two sources may split at different fractions
    train = {name: without(_named(task.train, name), held) for name, task in sources.items()}
    scale = min(len(train[name]) / weight for name, weight in weights.items())
    if max_rows is not None:
        scale = min(scale, max_rows / sum(weights.values()))
    taken = {
        name: limit(train[name], _whole(scale * weight, name), seed)
        for name, weight in weights.items()
    }
    tasks = list(sources.values())
    counts = {
        f"{name}/{key}": n for name, task in sources.items() for key, n in task.counts.items()
    }
    return Task(
        train=[row for rows in taken.values() for row in rows],
        held_out=held,
        sft=[
            row for name, task in sources.items() for row in without(_named(task.sft, name), held)
        ],
        answer_of=_same([task.answer_of for task in tasks]),
        judge=_same([task.judge for task in tasks]),
        summary=all(task.summary for task in tasks),
        counts=counts | {f"{name}/taken": len(rows) for name, rows in taken.items()},
        notes=tuple(f"{name}: {note}" for name, task in sources.items() for note in task.notes),
        dropped={
            f"{n}: {why}": d for n, task in sources.items() for why, d in task.dropped.items()
        },
    )


def _check(sources: dict[str, Task], weights: dict[str, float]) -> None:
    if not sources or sources.keys() != weights.keys():
        raise UserError(
            f"data.sources has {sorted(sources)}, data.weights {sorted(weights)}: name the same"
        )
    for name, task in sources.items():
        if not weights[name] > 0:
            raise UserError(f"data.weights.{name}={weights[name]}: choose a weight above 0")
        if task.samples:
            raise UserError(
                f"data.sources.{name} samples its pairs from the policy: mix given pairs"
            )
        if task.chunks is not None:
            raise UserError(f"data.sources.{name}.stream=true: a mixture needs all rows at once")


def _named(rows: list[Row], name: str) -> list[Row]:
    return [{**row, "source": name} for row in rows]


def _whole(rows: float, name: str) -> int:
    # 0.1 * 3 / 0.1 is a little more or less than 3
    count = int(rows + 1e-6)
    if count < 1:
        raise UserError(f"data.sources.{name} gives no rows: raise its weight or data.max_rows")
    return count


def _same(functions: list[Callable[[str], Any] | None]) -> Callable[[str], Any] | None:
    return functions[0] if all(function == functions[0] for function in functions) else None
