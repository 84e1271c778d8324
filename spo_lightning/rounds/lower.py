"""Rounds' pairs and the data in, the file of the lower level's texts out; None: no such file."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.data.load import load
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError
from spo_lightning.records.disk import json_rows, write_text


def lower_texts(cfg: Any, place: Path, pairs: Sequence[Path]) -> str | None:
    """Texts for ``data.sft``, written anew where they grow with the rounds.

    None leaves the chosen answers of the pairs, or the texts that the data names itself.
    """
    wanted = cfg.loop.lower
    if wanted == "round" or (wanted == "data" and cfg.data.get("sft") is not None):
        return None
    file = place / f"lower-{len(pairs) if wanted == 'all' else 'data'}.jsonl"
    if not file.exists():
        texts = [*(_of_rounds(pairs) if wanted == "all" else _of_data(cfg))]
        if not texts:
            raise UserError("loop.lower=data: this data has no answers: take round or all")
        write_text(file, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in texts))
    return str(file)


def _of_rounds(pairs: Sequence[Path]) -> Iterator[Row]:
    for path in pairs:
        for row in json_rows(path):
            yield {"prompt": row["prompt"], "completion": row["chosen"]}


def _of_data(cfg: Any) -> list[Row]:
    """Chosen answers of the training rows, or the SFT rows of data whose prompts have none."""
    task = load(cfg.data)
    own = [r for r in task.train if "chosen" in r]
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in own]
    return chosen or [{key: row[key] for key in ("prompt", "completion")} for row in task.sft]
