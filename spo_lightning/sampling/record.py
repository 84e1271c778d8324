"""Every prompt's answers and scores, kept as they are drawn: a run that was stopped goes on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError

Drawn = dict[str, Any]  # number of the prompt, its row, samples, scores


class Record:
    """A file of one line of settings and a line per prompt, appended part by part.

    A part is what one seed draws; one that a kill left unfinished is dropped and drawn again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], parts: Sequence[Sequence[int]]):
        self.path, self.parts = path, parts
        self.head = json.dumps({"settings": settings}, sort_keys=True) + "\n"

    def begin(self) -> int:
        """How many parts the file holds; refuses one of other settings."""
        if not self.path.exists() or not self.path.stat().st_size:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.path.write_text(self.head, encoding="utf-8")
            return 0
        with self.path.open("r+b") as file:
            head = file.readline()
            if head.decode("utf-8", "replace") != self.head:
                raise UserError(self._differs(head))
            done, lines, place, end = 0, 0, len(head), len(head)
            for line in file:
                if not line.endswith(b"\n") or done == len(self.parts):
                    break
                place, lines = place + len(line), lines + 1
                if lines == len(self.parts[done]):
                    done, lines, end = done + 1, 0, place
            file.truncate(end)
        return done

    def _differs(self, head: bytes) -> str:
        try:
            theirs = json.loads(head)["settings"]
            mine = json.loads(self.head)["settings"]
        except (ValueError, KeyError, TypeError):
            return f"{self.path}: not a record of samples: take another output"
        key = next(k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k))
        return (
            f"{self.path} holds samples of other settings ({key} is {theirs.get(key)!r} there and "
            f"{mine.get(key)!r} here): take another output, or remove it"
        )

    def append(self, rows: Sequence[Drawn]) -> None:
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def read(self) -> Iterator[Drawn]:
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield json.loads(line)
