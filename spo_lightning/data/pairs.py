"""Your own preference pairs, in TRL's formats: a file, a saved dataset or a hub id."""

from spo_lightning.data import rows
from spo_lightning.data.rows import Task
from spo_lightning.errors import UserError


def pairs(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    split: str,
    separator: str | None,
    sft: str | None,
    summary: bool,
) -> Task:
    """Validated pairs, split by prompt, or with held-out pairs from a place of their own."""
    if path is None:
        raise UserError("data.path is not set: name a file, a saved dataset or a hub id of pairs")
    raw = rows.read(path, split=split, where="data.path")
    if separator is not None and all("prompt" in row for row in raw):
        raise UserError(
            f"{path}: data.separator={separator!r}, but every row has a prompt: unset it"
        )
    given = rows.preference_rows(raw, path, separator)
    if eval_path is None:
        train, held = rows.split(given, eval_fraction)
    else:
        raw = rows.read(eval_path, split=split, where="data.eval_path")
        held = rows.preference_rows(raw, eval_path, separator)
        train = rows.without(given, held)
    texts = []
    if sft is not None:
        texts = rows.completion_rows(rows.read(sft, split=split, where="data.sft"), sft)
    repeated = len(given) - len(train) if eval_path else 0
    return Task(
        train=rows.limit(train, max_rows, seed),
        held_out=held,
        sft=rows.without(texts, held),
        answer_of=str.strip if all("answer" in row for row in given + held) else None,
        summary=summary,
        counts={"read": len(given), "also in data.eval_path": repeated},
    )
