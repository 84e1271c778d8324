"""Every prompt's answers and scores, kept as they are drawn: a run that was stopped goes on."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.errors import UserError
from spo_lightning.records.directory import without_pace
from spo_lightning.records.lock import locked

Drawn = dict[str, Any]  # number of the prompt, its row, samples, scores


def record_of(output: Path) -> Path:
    """Where the answers stand that a file of pairs is chosen from."""
    return output.with_suffix(".samples.jsonl")


class Record:
    """A file of one line of settings and a line per prompt, appended part by part.

    A part is what one seed draws; one that a kill left unfinished is dropped and drawn again.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], parts: Sequence[Sequence[int]]):
        self.path, self.parts = path, parts
        self.head = json.dumps({"settings": settings}, sort_keys=True) + "\n"

    def begin(self) -> int:
        """How many parts the file holds; refuses one of other settings, or that is being written.

        What is beyond its whole parts is cut off.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.file = self.path.open("a+b")  # its lock is held for as long as it is open
        if locked(self.file) is False:
            told = "another command draws into it: wait for it, or take another output"
            raise UserError(f"{self.path}: {told}")
        self.file.seek(0)
        head, first = self.file.readline(), self.file.readline()
        differs = self._differs(head) if head.endswith(b"\n") else None
        if differs and first.endswith(b"\n"):
            raise UserError(differs)
        if differs or not head.endswith(b"\n"):  # new, killed at once, or nothing was drawn
            self.file.truncate(0)
            self._write(self.head)
            return 0
        self.file.seek(len(head))
        done, lines, place, end = 0, 0, len(head), len(head)
        for line in self.file:
            if not line.endswith(b"\n") or done == len(self.parts):
                break
            place, lines = place + len(line), lines + 1
            if lines == len(self.parts[done]):
                done, lines, end = done + 1, 0, place
        self.file.truncate(end)
        return done

    def _write(self, text: str) -> None:
        self.file.write(text.encode())
        self.file.flush()
        os.fsync(self.file.fileno())

    def _differs(self, head: bytes) -> str | None:
        """In what another record's settings are others; how fast an endpoint was asked is none."""
        try:
            theirs = without_pace(json.loads(head)["settings"])
            mine = without_pace(json.loads(self.head)["settings"])
            differ = [k for k in sorted({*theirs, *mine}) if theirs.get(k) != mine.get(k)]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            told = f"{self.path}: not a record of samples: take another output"
            raise UserError(told) from error
        for key in differ:
            return (
                f"{self.path} holds samples of other settings ({key} is {theirs.get(key)!r} there "
                f"and {mine.get(key)!r} here): take another output, or remove it"
            )
        return None

    def append(self, rows: Sequence[Drawn]) -> None:
        """The next part, whole."""
        self._write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))

    def read(self) -> Iterator[Drawn]:
        with self.path.open(encoding="utf-8") as file:
            next(file)
            for line in file:
                yield json.loads(line)
