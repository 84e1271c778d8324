"""A csv that is made in pieces: a row per finished job, by the hash of what decides its numbers.

A sweep with ``sweep.table=FILE`` leaves out jobs whose row is there, and adds those it finishes.
"""

import csv
import hashlib
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spo_lightning.errors import UserError
from spo_lightning.records.directory import IDLE, write_text
from spo_lightning.records.lock import alone
from spo_lightning.sweep.jobs import Job

NUMBERS = (
    *("exact_match", "win_rate", "nll/chosen", "displacement/rate", "displacement/chosen"),
    *("preference/accuracy", "rewards/margins"),
)
WHEN = ("init", "final")
JOB = ("config", "words", "seconds", "commit")


def name_of(config: Any) -> str:
    """The hash of a composed job. Files and models count by their names, not what is in them."""
    plain: Any = OmegaConf.to_container(config, resolve=False, enum_to_str=True)
    kept = {key: value for key, value in plain.items() if key not in IDLE}
    kept["precision"] = OmegaConf.select(config, "hardware.precision")
    text = json.dumps(OmegaConf.to_container(OmegaConf.create(kept), resolve=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


class Table:
    """The rows of the file, by hash. ``more``: names of numbers beside the usual ones."""

    def __init__(self, path: Path, more: Sequence[str] = ()):
        self.path, self.names = path, tuple(dict.fromkeys((*NUMBERS, *more)))
        self.head = (*JOB, *(f"{when}/{name}" for when in WHEN for name in self.names))
        self.rows = self._read()

    def _read(self) -> dict[str, dict[str, str]]:
        if not self.path.exists():
            return {}
        with self.path.open(encoding="utf-8", newline="") as file:
            reader = csv.DictReader(file)
            found = tuple(reader.fieldnames or ())
            if found[:2] != JOB[:2]:
                wanted = f"not a table of jobs: it does not begin with {JOB[0]},{JOB[1]}"
                raise UserError(f"{self.path}: {wanted}: take another sweep.table")
            if apart := set(found) ^ set(self.head):
                told = ", ".join(sorted(apart))
                raise UserError(
                    f"{self.path} and sweep.numbers differ in {told}: take another sweep.table, "
                    "or the numbers that it has"
                )
            return {row["config"]: row for row in reader}

    def numbers(self, name: str) -> dict[str, dict[str, float]] | None:
        """init and final of a job that is there."""
        row = self.rows.get(name)
        if row is None:
            return None
        return {
            when: {n: float(row[f"{when}/{n}"]) for n in self.names if row[f"{when}/{n}"]}
            for when in WHEN
        }

    def add(self, name: str, job: Job, commit: str | None) -> None:
        """One row more; written anew beside and renamed, and no other sweep's row is lost."""
        row: dict[str, Any] = {
            "config": name,
            "words": " ".join(job.words),
            "seconds": round(job.seconds),
            "commit": commit,
        }
        for when in WHEN:
            row |= {f"{when}/{n}": job.numbers.get(when, {}).get(n) for n in self.names}
        with alone(self.path.with_name(f".{self.path.name}.lock")):
            self.rows = self._read() | {name: row}
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, self.head, lineterminator="\n")
            writer.writeheader()
            writer.writerows(self.rows.values())
            write_text(self.path, text.getvalue())
