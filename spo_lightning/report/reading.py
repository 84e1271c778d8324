"""Run directories in, what they hold out: finished or not, whole or not. Nothing is executed.

What stands in the files is of any kind; here it becomes what the pages count on.
"""

import csv
import io
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import CHOICES, private, without_secrets

POINTS = 400  # of a curve at most; a longer one is thinned
ALARM = "train/displacement/alarm"
MARKS = ("status.json", "metrics.json", "metrics.csv")  # a run has one of them
EVALUATED = "eval.json"  # what `eval` leaves alone, in a directory that is no run's
SWEEP = "sweep.json"
ENDED_BADLY = ("failed", "interrupted", "died")
LAST_LINES = 200  # of train.log
TEXTS = ("prompt", "reference", "chosen", "rejected", "before", "after")  # of a sample
DELTAS = ("chosen_delta", "rejected_delta")
PAIR_TEXTS = ("prompt", "chosen", "rejected", "answer", "rival")  # of a row of pairs.jsonl


@dataclass(frozen=True)
class Run:
    """One run directory. ``problems``: a line per file that could not be read as it should be."""

    path: Path
    name: str
    status: Mapping[str, str]  # status.json
    init: Mapping[str, float]  # metrics.json: held-out numbers before training
    final: Mapping[str, float]  # and after
    by: Mapping[str, tuple[Mapping[str, float], Mapping[str, float]]]  # both, of groups of rows
    paired: Mapping[str, Mapping[str, float]]  # differences on the same prompts, and how sure
    seconds: Mapping[str, float]  # by stage
    config: Mapping[str, Any]  # config.yaml
    choices: Mapping[str, str]  # the option of each config group
    curves: Mapping[str, Any]  # metrics.csv: by name a pandas Series over steps, thinned
    alarm: int | None  # the first step at which the displacement alarm sounded
    samples: Sequence[Mapping[str, Any]]  # rows of samples.jsonl
    log: str  # the end of train.log
    state: str
    error: str | None  # why it ended, in one line
    problems: Sequence[str]

    @property
    def seed(self) -> int:
        seed = self.config.get("seed", 0)
        return seed if isinstance(seed, int) else 0

    @property
    def finished(self) -> bool:
        """Whether it has come to its numbers, and one knows what was run."""
        return bool(self.final and self.config)


def rows_of(file: Path | io.BytesIO, **how: Any) -> Any:
    """A csv as a pandas frame."""
    import pandas as pd

    return pd.read_csv(file, **how)


def runs_of(directories: Sequence[Path]) -> list[Run]:
    """Every run at or below the directories, in the order of their names, and a sweep's jobs that
    never came to a directory."""
    found: dict[Path, Run] = {}
    for top in directories:
        jobs = _jobs(top)
        places = {path.parent for name in MARKS for path in top.rglob(name)}
        inside = {p for p in places if "checkpoints" not in p.relative_to(top).parts}
        if not inside and (top / EVALUATED).exists():
            inside = {top}
        for path in sorted(inside | jobs.keys(), key=natural):
            name = str(path.relative_to(top)) if path != top else path.absolute().name
            if path.resolve() not in found:
                found[path.resolve()] = read(path, name, jobs.get(path, {}))
    return list(found.values())


def natural(name: Path | str) -> tuple[list[Any], str]:
    """To sort by: letters by the alphabet, numbers by size."""
    parts = enumerate(re.split(r"(\d+(?:\.\d+)?)", str(name)))
    return [(0, float(part)) if at % 2 else (1, part) for at, part in parts], str(name)


def _jobs(top: Path) -> dict[Path, dict[str, str]]:
    """What sweep.json says of every job that ended badly, by its directory under ``top``: a job
    that was killed could not say so itself."""
    try:
        record = json.loads(private((top / SWEEP).read_text(encoding="utf-8")))
        began = Path(record["jobs"][0]["directory"]) if record["jobs"] else top
        # the sweep may have been moved since: what stays is the place of a job within it
        home = next((p for p in began.parents if p.name == top.absolute().name), began.parent)
        return {
            top / Path(job["directory"]).relative_to(home): {
                "state": job["state"],
                "error": f"{' '.join(job['words'])}: {job['error']}",
            }
            for job in record["jobs"]
            if job["state"] in ENDED_BADLY
        }
    except (OSError, ValueError, KeyError, TypeError, IndexError, RecursionError):
        return {}


def read(path: Path, name: str, job: Mapping[str, str]) -> Run:
    """``job``: what its sweep says of the run where it ended badly, which outlives the process."""
    problems: list[str] = []

    def content(file: str) -> bytes:
        return _content(path, file, problems.append)

    def text(file: str) -> str:
        return private(content(file).decode("utf-8", "replace"))

    def loaded(file: str) -> dict[str, Any]:
        told = text(file)
        found = _parsed(told) if told else {}
        if not isinstance(found, dict):
            problems.append(f"{file}: unreadable: it was cut off, or is no object")
        return found if isinstance(found, dict) else {}

    status = {key: str(v) for key, v in loaded("status.json").items() if v is not None}
    alone = not any((path / name).exists() for name in MARKS) and (path / EVALUATED).exists()
    metrics = loaded(EVALUATED if alone else "metrics.json")
    if alone:
        told = {"init": metrics.get("reference"), "paired": metrics.get("paired")}
        metrics = {"final": metrics, **told}
    final = _numbers(metrics.get("final"))
    config, choices = _config(text("config.yaml"), problems.append)
    state = job.get("state") or status.get("state") or ("finished" if final else "unknown")
    error = status.get("error") or (job.get("error") if state in ENDED_BADLY else None)
    curves, alarm = ({}, None) if alone else _curves(content("metrics.csv"), problems.append)
    return Run(
        path=path,
        name=name,
        status=status,
        init=_numbers(metrics.get("init")),
        final=final,
        by=_by(metrics),
        paired=_paired(metrics.get("paired")),
        seconds=_numbers(metrics.get("seconds")),
        config=config,
        choices=_texts(choices) or _texts(metrics.get("choices")),
        curves=curves,
        alarm=alarm,
        samples=[*map(_sample, _rows(text("samples.jsonl"), "samples.jsonl", problems.append))],
        log="\n".join(text("train.log").splitlines()[-LAST_LINES:]),
        state=state,
        error=error,
        problems=problems,
    )


def pairs_of(run: Run, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    """Rows of pairs.jsonl, which a page of one run alone reads: texts and numbers."""
    # an evaluation's own, where a file of the user's has the other name
    own = (run.path / "eval.pairs.jsonl").exists() and not (run.path / "metrics.json").exists()
    file = "eval.pairs.jsonl" if own else "pairs.jsonl"
    rows = _rows(private(_content(run.path, file, tell).decode("utf-8", "replace")), file, tell)
    return [
        {name: row[name] for name in PAIR_TEXTS if isinstance(row.get(name), str)} | _numbers(row)
        for row in rows
    ]


def _content(path: Path, file: str, tell: Callable[[str], None]) -> bytes:
    place = path / file
    # a link may lead to a file that is not the run's
    if not place.is_file() or not place.resolve().is_relative_to(path.resolve()):
        return b""
    try:
        return place.read_bytes()
    except OSError as error:
        tell(f"{file}: unreadable ({error.strerror})")
        return b""


def _parsed(text: str) -> Any:
    """JSON, or None where it is none; a file may be cut, or nested too deeply to be read."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _numbers(found: Any) -> dict[str, float]:
    """What is a number in it."""
    return {
        str(name): float(value)
        for name, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    }


def _by(metrics: Mapping[str, Any]) -> dict[str, tuple[dict[str, float], dict[str, float]]]:
    """Before and after, of each group of held-out rows."""
    sides = [metrics.get(when) for when in ("init", "final")]
    found = [side.get("by") if isinstance(side, dict) else None for side in sides]
    init, final = (side if isinstance(side, dict) else {} for side in found)
    both = {str(group): None for group in (*init, *final)}
    return {group: (_numbers(init.get(group)), _numbers(final.get(group))) for group in both}


def _paired(found: Any) -> dict[str, dict[str, float]]:
    """By the name of a number; an entry that is not whole is left out."""
    named = found.items() if isinstance(found, dict) else ()
    changes = {str(name): _numbers(change) for name, change in named}
    return {name: of for name, of in changes.items() if {"difference", "low", "high"} <= {*of}}


def _texts(found: Any) -> dict[str, str]:
    pairs = found.items() if isinstance(found, dict) else ()
    return {str(key): value for key, value in pairs if isinstance(value, str)}


def _config(text: str, tell: Callable[[str], None]) -> tuple[dict[str, Any], Any]:
    """The configuration, and the options of its groups, which its first line names."""
    import yaml

    try:
        # libyaml's reader takes a tenth of the time, which 200 runs feel
        config = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        kept = without_secrets(config) if isinstance(config, dict) else {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        tell(f"config.yaml: unreadable ({str(error).splitlines()[0]})")
        return {}, None
    first = text.partition("\n")[0]
    return kept, _parsed(first.removeprefix(CHOICES)) if first.startswith(CHOICES) else None


def _curves(content: bytes, tell: Callable[[str], None]) -> tuple[dict[str, Any], int | None]:
    """The columns of metrics.csv without their empty fields, and where the alarm first sounded."""
    import numpy as np
    import pandas as pd

    whole, _, cut = content.rpartition(b"\n")  # a row is flushed with its line's end
    if cut.strip():
        tell("metrics.csv: 1 row(s) cut off, left out")
    try:
        # a stray quote, or a first row too long, must not shift what comes after
        how = {"quoting": csv.QUOTE_NONE, "index_col": False, "low_memory": False}
        how |= {"encoding_errors": "replace", "on_bad_lines": "skip"}
        cells = rows_of(io.BytesIO(whole), **how)
    except ValueError:  # no line, or none that is a table's
        cells = rows_of(io.BytesIO(b"step"))
    rows = cells.apply(pd.to_numeric, errors="coerce").astype(float)
    odd = (rows.isna() & cells.notna()).any(axis=1)
    lost = int(odd.sum()) + max(0, whole.count(b"\n") - len(cells))
    if lost:
        tell(f"metrics.csv: {lost} unreadable row(s) left out")
    rows = rows[~odd].replace([np.inf, -np.inf], np.nan)
    if rows.empty or "step" not in rows:
        tell("metrics.csv: no row yet")
        return {}, None
    rows = rows.dropna(subset="step").drop_duplicates("step", keep="last").set_index("step")
    found: dict[str, Any] = {str(name): column.dropna() for name, column in rows.items()}
    loud = found[ALARM].index[found[ALARM] > 0] if ALARM in found else ()
    alarm = next(map(int, loud), None)
    return {name: _thinned(curve) for name, curve in found.items() if len(curve)}, alarm


def _thinned(curve: Any) -> Any:
    """At most ``POINTS`` points and the last: every so many."""
    every = max(1, -(-len(curve) // POINTS))
    return curve.iloc[sorted({*range(0, len(curve), every), len(curve) - 1})]


def _rows(text: str, file: str, tell: Callable[[str], None]) -> list[dict[str, Any]]:
    rows = [_parsed(line) for line in text.split("\n") if line.strip()]
    found = [row for row in rows if isinstance(row, dict)]
    if len(found) < len(rows):
        tell(f"{file}: {len(rows) - len(found)} unreadable row(s) left out")
    return found


def _sample(row: Mapping[str, Any]) -> dict[str, Any]:
    """Its texts, the changes in nats, and whether the answers are right; None where unknown."""
    found: dict[str, Any] = {}
    for name in TEXTS:
        value = "" if row.get(name) is None else row[name]
        found[name] = value if isinstance(value, str) else json.dumps(value)
    moved = _numbers({name: row.get(name) for name in DELTAS})
    found |= {name: moved.get(name) for name in DELTAS}
    right = {name: row.get(name) for name in ("before_ok", "after_ok")}
    return found | {name: v if isinstance(v, bool) else None for name, v in right.items()}
