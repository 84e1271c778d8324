"""Run directories in, what they hold out: finished or not, whole or not. Nothing is executed.

What stands in the files is of any kind; here it becomes what the pages count on.
"""

import csv
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import CHOICES, private, without_secrets

POINTS = 400  # of a curve at most; a longer one is thinned
ALARM = "train/displacement/alarm"
MARKS = ("status.json", "metrics.json", "metrics.csv")  # a run has one of them
SWEEP = "sweep.json"
ENDED_BADLY = ("failed", "interrupted", "died")

Curve = tuple[list[float], list[float]]  # steps, values


@dataclass
class Run:
    """One run directory. ``job``: what its sweep says of it, which outlives a killed process.

    ``problems``: a line per file that could not be read as it should be.
    """

    path: Path
    name: str
    job: Mapping[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @cached_property
    def status(self) -> dict[str, str]:
        """status.json, as text."""
        return {name: str(v) for name, v in self._json("status.json").items() if v is not None}

    @cached_property
    def _metrics(self) -> dict[str, Any]:
        return self._json("metrics.json")

    @property
    def numbers(self) -> dict[str, Any]:
        """metrics.json: init, final, choices, seconds."""
        parts: dict[str, Any] = {"init": self.init, "final": self.final}
        return parts | {"choices": self.choices, "seconds": self.seconds}

    @cached_property
    def final(self) -> dict[str, float]:
        return _numbers(self._metrics.get("final"))

    @cached_property
    def init(self) -> dict[str, float]:
        return _numbers(self._metrics.get("init"))

    @cached_property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        return _numbers(self._metrics.get("seconds"))

    @cached_property
    def _config(self) -> tuple[dict[str, Any], dict[str, str]]:
        from yaml import YAMLError

        text = self._text("config.yaml")
        config, choices = None, None
        try:
            config = _loaded(text) if text else {}
            first = text.partition("\n")[0]
            if first.startswith(CHOICES):
                choices = json.loads(first.removeprefix(CHOICES))
            kept = without_secrets(config) if isinstance(config, dict) else {}
        except (YAMLError, ValueError, RecursionError) as error:
            self.problems.append(f"config.yaml: unreadable ({str(error).splitlines()[0]})")
            kept = {}
        return kept, _texts(choices)

    @property
    def config(self) -> dict[str, Any]:
        return self._config[0]

    @property
    def choices(self) -> dict[str, str]:
        """The option of each config group."""
        return self._config[1] or _texts(self._metrics.get("choices"))

    @property
    def seed(self) -> int:
        return seed_of(self.config)

    @property
    def state(self) -> str:
        if self.job.get("state") in ENDED_BADLY:  # a killed process left its last word
            return self.job["state"]
        return self.status.get("state") or ("finished" if self.final else "unknown")

    @property
    def error(self) -> str | None:
        """Why it ended, in one line."""
        told = self.status.get("error")
        return told if told or self.state not in ENDED_BADLY else self.job.get("error")

    @cached_property
    def _columns(self) -> dict[str, Any]:
        path = self.path / "metrics.csv"
        if not path.is_file() or self._elsewhere(path):
            return {}
        columns, told = _columns(path)
        if told:
            self.problems.append(told)
        return columns

    @cached_property
    def curves(self) -> dict[str, Curve]:
        """By the names of metrics.csv, thinned; rows without the number are left out."""
        found = {}
        for name in self._columns:
            steps, values = self._logged(name)
            kept = _thinned(len(steps))
            if kept and name != "step":
                found[name] = steps[kept].tolist(), values[kept].tolist()
        return found

    @cached_property
    def alarm(self) -> int | None:
        """The first step at which the displacement alarm sounded."""
        steps, values = self._logged(ALARM)
        loud = steps[values > 0] if len(steps) else []
        return int(loud[0]) if len(loud) else None

    def _logged(self, name: str) -> tuple[Any, Any]:
        import numpy as np

        nothing = np.array([])
        steps, values = (self._columns.get(key, nothing) for key in ("step", name))
        if len(steps) != len(values):
            return nothing, nothing
        kept = np.isfinite(values) & np.isfinite(steps)
        return steps[kept], values[kept]

    @cached_property
    def samples(self) -> list[dict[str, Any]]:
        """Rows of samples.jsonl."""
        found, broken = [], 0
        for line in self._text("samples.jsonl").split("\n"):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
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
        _ = (self.status, self.final, self.config, self.curves, self.samples)
        if not self.curves:
            self.problems.append("metrics.csv: no row yet")
        return self

    def _elsewhere(self, path: Path) -> bool:
        """Whether it is a link to a file that is not the run's."""
        return not path.resolve().is_relative_to(self.path.resolve())

    def _text(self, name: str) -> str:
        path = self.path / name
        if not path.is_file() or self._elsewhere(path):
            return ""
        try:
            return private(path.read_text(encoding="utf-8", errors="replace"))
        except OSError as error:
            self.problems.append(f"{name}: unreadable ({error.strerror})")
            return ""

    def _json(self, name: str) -> dict[str, Any]:
        text = self._text(name)
        if not text:
            return {}
        try:
            found = json.loads(text)
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict):
            self.problems.append(f"{name}: unreadable: it was cut off, or is no object")
            return {}
        return found


def runs_of(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories, in the order of their names, and a sweep's jobs that
    never came to a directory."""
    found: dict[Path, Run] = {}
    for top in directories:
        jobs = _jobs(top)
        places = {path.parent for name in MARKS for path in top.rglob(name)}
        inside = {p for p in places if "checkpoints" not in p.relative_to(top).parts}
        for path in sorted(inside | jobs.keys(), key=natural):
            name = str(path.relative_to(top)) if path != top else path.absolute().name
            found.setdefault(path.resolve(), Run(path, name, jobs.get(path, {})))
    return list(found.values())


def _jobs(top: Path) -> dict[Path, dict[str, Any]]:
    """What sweep.json says of every job that began, by its directory under ``top``."""
    try:
        record = json.loads(private((top / SWEEP).read_text(encoding="utf-8")))
        began = Path(record["jobs"][0]["directory"]) if record["jobs"] else top
        jobs = [job for job in record["jobs"] if job["state"] in ENDED_BADLY]
        # the sweep may have been moved since: what stays is the place of a job within it
        home = next((p for p in began.parents if p.name == top.absolute().name), began.parent)
        return {
            top / Path(job["directory"]).relative_to(home): {
                "state": str(job["state"]),
                "error": f"{' '.join(job['words'])}: {job['error']}",
            }
            for job in jobs
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return {}


def seed_of(config: Mapping[str, Any]) -> int:
    seed = config.get("seed", 0)
    return seed if isinstance(seed, int) else 0


def _numbers(found: Any) -> dict[str, float]:
    """What is a number in it."""
    if not isinstance(found, dict):
        return {}
    kinds = (int, float)
    return {
        str(name): value
        for name, value in found.items()
        if isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(value)
    }


def _texts(found: Any) -> dict[str, str]:
    if not isinstance(found, dict):
        return {}
    return {str(key): value for key, value in found.items() if isinstance(value, str)}


def natural(name: Path | str) -> tuple[list[Any], str]:
    """To sort by: letters by the alphabet, numbers by size."""
    parts = enumerate(re.split(r"(\d+(?:\.\d+)?)", str(name)))
    return [(0, float(part)) if at % 2 else (1, part) for at, part in parts], str(name)


@lru_cache(maxsize=1000)  # the page and the table read the same runs
def _loaded(text: str) -> Any:
    import yaml

    return yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))


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
            parse_options=arrow.ParseOptions(invalid_row_handler=skip),
            convert_options=arrow.ConvertOptions(column_types=kinds),
        )
        columns = {name: table[name].to_numpy() for name in table.column_names}
    except (pa.ArrowException, KeyError, OSError, UnicodeDecodeError, csv.Error):
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
    every = max(1, -(-count // POINTS))
    return sorted({*range(0, count, every), count - 1} - {-1})


def dotted(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Every leaf by its dotted name."""
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, sub in tree.items()
        for name, leaf in dotted(sub, f"{prefix}.{key}" if prefix else str(key)).items()
    }
