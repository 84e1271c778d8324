"""Run directories in, what they hold out: finished or not, whole or not. Nothing is executed."""

import csv
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from spo_lightning.rundir import CHOICES, without_secrets

POINTS = 400  # of a curve at most; a longer one is thinned
ENDED = ("finished", "failed", "interrupted", "died")

Curve = tuple[list[float], list[float]]  # steps, values


@dataclass
class Run:
    """One run directory. ``problems``: a line per file that could not be read as it should be."""

    path: Path
    name: str
    problems: list[str] = field(default_factory=list)

    @cached_property
    def status(self) -> dict[str, Any]:
        return self._json("status.json")

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """metrics.json: init, final, choices, steps, seconds."""
        return self._json("metrics.json")

    @cached_property
    def _config(self) -> tuple[dict[str, Any], dict[str, str]]:
        import yaml

        text = self._text("config.yaml")
        choices: Any = {}
        try:
            config = yaml.load(text, Loader=_loader()) if text else {}
            first = text.partition("\n")[0]
            if first.startswith(CHOICES):
                choices = json.loads(first.removeprefix(CHOICES))
        except (yaml.YAMLError, ValueError) as error:
            self.problems.append(f"config.yaml: unreadable ({str(error).splitlines()[0]})")
            config = {}
        kept = config if isinstance(config, dict) else {}
        return without_secrets(kept), choices if isinstance(choices, dict) else {}

    @property
    def config(self) -> dict[str, Any]:
        return self._config[0]

    @property
    def choices(self) -> dict[str, str]:
        """The option of each config group."""
        return self._config[1] or self.numbers.get("choices") or {}

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every key of the configuration by its dotted name."""
        return dotted(self.config)

    @property
    def seed(self) -> int:
        return self.config.get("seed", 0)

    @property
    def state(self) -> str:
        return self.status.get("state") or ("finished" if self.numbers else "unknown")

    @property
    def final(self) -> dict[str, float]:
        return _numbers(self.numbers.get("final"))

    @property
    def init(self) -> dict[str, float]:
        return _numbers(self.numbers.get("init"))

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By the names of metrics.csv; rows without the number are left out."""
        path = self.path / "metrics.csv"
        if not path.is_file():
            return {}
        import numpy as np

        columns, told = _columns(path)
        if told:
            self.problems.append(told)
        steps = columns.pop("step", np.array([]))
        found = {}
        for name, values in columns.items():
            kept = np.flatnonzero(np.isfinite(values) & np.isfinite(steps))
            if len(kept):
                kept = kept[_thinned(len(kept))]
                found[name] = steps[kept].tolist(), values[kept].tolist()
        return found

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        found, broken = [], 0
        for line in self._text("samples.jsonl").split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if isinstance(row, dict):
                found.append(row)
            else:
                broken += 1
        if broken:
            self.problems.append(f"samples.jsonl: {broken} unreadable row(s) left out")
        return found

    def log(self, lines: int) -> str:
        """The end of train.log."""
        return "\n".join(self._text("train.log").splitlines()[-lines:])

    def read(self) -> "Run":
        """All of it, so that ``problems`` is complete."""
        _ = (self.status, self.numbers, self.config, self.curves, self.samples)
        if not self.curves:
            self.problems.append("metrics.csv: no row yet")
        return self

    def _text(self, name: str) -> str:
        path = self.path / name
        if not path.is_file():
            return ""
        try:
            return path.read_text(encoding="utf-8", errors="replace")
        except OSError as error:
            self.problems.append(f"{name}: unreadable ({error.strerror})")
            return ""

    def _json(self, name: str) -> dict[str, Any]:
        text = self._text(name)
        if not text:
            return {}
        try:
            found = json.loads(text)
        except ValueError:
            found = None
        if not isinstance(found, dict):
            self.problems.append(f"{name}: unreadable: it was cut off, or is no object")
            return {}
        return found


def runs_of(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories, in the order of their names."""
    found: dict[Path, Run] = {}
    for top in directories:
        for path in sorted({p.parent for n in MARKS for p in top.rglob(n)}, key=_natural):
            name = str(path.relative_to(top)) if path != top else path.absolute().name
            found.setdefault(path.absolute(), Run(path, name))
    return [run for run in found.values() if "checkpoints" not in run.path.parts]


MARKS = ("status.json", "metrics.json", "metrics.csv")  # a run has one of them


def _natural(path: Path) -> list[Any]:
    import re

    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.split(r"(\d+)", str(path))]


def _loader() -> Any:
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _numbers(found: Any) -> dict[str, float]:
    if not isinstance(found, dict):
        return {}
    return {name: v for name, v in found.items() if isinstance(v, (int, float))}


def _columns(path: Path) -> tuple[dict[str, Any], str | None]:
    """Columns of metrics.csv, nan where a field is empty, and what is wrong with the file; row by
    row where Arrow refuses it."""
    import pyarrow as pa
    import pyarrow.csv as arrow

    broken: list[int] = []

    def skip(row: Any) -> str:
        broken.append(row.number or 0)
        return "skip"

    try:
        with path.open(encoding="utf-8") as file:
            names = next(csv.reader(file), [])
        kinds = dict.fromkeys(names, pa.float64())
        table = arrow.read_csv(
            path,
            read_options=arrow.ReadOptions(use_threads=False),
            parse_options=arrow.ParseOptions(invalid_row_handler=skip),
            convert_options=arrow.ConvertOptions(column_types=kinds),
        )
        columns = {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, OSError, UnicodeDecodeError, csv.Error):
        columns, lost = _row_by_row(path)
        return columns, f"metrics.csv: {lost} unreadable row(s) left out" if lost else None
    told = f"metrics.csv: {len(broken)} row(s) cut off, left out" if broken else None
    return columns, told


def _row_by_row(path: Path) -> tuple[dict[str, Any], int]:
    import numpy as np

    columns: dict[str, list[float]] = {}
    lost = 0
    text = path.read_text(encoding="utf-8", errors="replace").replace("\0", "")
    for row in csv.DictReader(text.splitlines()):
        try:
            values = {name: float(cell or "nan") for name, cell in row.items() if name}
        except (TypeError, ValueError):
            lost += 1
            continue
        for name, value in values.items():
            columns.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in columns.items()}, lost


def _thinned(count: int) -> list[int]:
    """At most ``POINTS`` places of ``count``: every so many, and the last."""
    every = -(-count // POINTS)
    return sorted({*range(0, count, every), count - 1})


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, sub in tree.items()
        for name, leaf in dotted(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }
