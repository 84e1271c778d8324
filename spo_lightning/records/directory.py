"""What a run leaves behind: config.yaml, status.json, metrics.csv and .json, rows as .jsonl."""

import csv
import html
import json
import os
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning import __version__
from spo_lightning.errors import CannotWrite, UserError
from spo_lightning.records.disk import overwrite, write_text, writing

SECRET = re.compile(r"(^|_)(api_?key|token|secret|password)$", re.IGNORECASE)
INSIDE = re.compile(r"(api_?key|token|secret|password)['\"]?\s*[:=]", re.IGNORECASE)
REMOVED = "<removed>"
CHOICES = "# choices: "  # opens config.yaml; the groups' options, as json
STATUS_SECONDS = 1.0  # between writes of status.json within a stage
MAY_DIFFER = ("log", "logger", "hardware", "ckpt_path", "sweep", "report")
# of a judge or an engine: where its endpoint is and how fast it is asked, which changes no number
PACE = (
    *("base_url", "key_from", "timeout", "retries", "concurrency", "requests_per_minute"),
    *("dollars_read", "dollars_written"),
)
# keys of a configuration that change none of a run's numbers; of hardware, all but precision
IDLE = (*MAY_DIFFER, "hydra", "cache", "checkpoint")


def without_secrets(node: Any) -> Any:
    """The same tree; values under secret-looking keys, and values of such variables, removed."""
    hidden = secrets()

    def cleaned(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return {k: cleaned(str(k), v) for k, v in value.items()}
        if isinstance(value, list):
            return [cleaned(key, v) for v in value]
        secret = value is not None and (SECRET.search(key) or any(h in str(value) for h in hidden))
        return REMOVED if secret else value

    return cleaned("", node)


def without_pace(node: Any) -> Any:
    """A judge's or an engine's settings, without those that change no number."""
    if not isinstance(node, dict):
        return node
    return {key: without_pace(value) for key, value in node.items() if key not in PACE}


def words_without_secrets(words: Sequence[str]) -> list[str]:
    """The same for words of a command line, ``key=value``."""
    found = []
    for word in words:
        key, equals, value = word.partition("=")
        last = key.rpartition(".")[2]
        inside = INSIDE.search(value)  # of a value that is settings itself
        value = REMOVED if inside else without_secrets({last: value})[last]
        found.append(f"{key}{equals}{value}" if equals else word)
    return found


def remove_secrets(path: Path) -> None:
    """The values of secret-looking variables, out of a file that is not ours."""
    if path.exists():
        text = path.read_text(encoding="utf-8")
        for secret in secrets():
            text = text.replace(secret, REMOVED)
        write_text(path, text)


def secrets() -> set[str]:
    """Values of environment variables whose names look secret."""
    return {v for k, v in os.environ.items() if SECRET.search(k) and len(v) >= 8}


def private(text: str) -> str:
    """Without the values of secret-looking variables, as they stand or inside JSON or HTML; the
    home folder is ``~``."""
    for secret in secrets():
        forms = {
            secret,
            html.escape(secret),
            *(json.dumps(secret, ensure_ascii=a)[1:-1] for a in (True, False)),
        }
        for form in forms:
            text = text.replace(form, REMOVED)
    home = os.path.expanduser("~")
    return re.sub(rf"{re.escape(home)}(?![\w.-])", "~", text) if len(home) > 1 else text


class RunDir:
    """The files of one run. Of several processes only the first ``writes``."""

    def __init__(self, path: Path, writes: bool = True):
        self.path, self.writes = path, writes
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.last = self.checkpoints / "last.ckpt"
        self.best = self.checkpoints / "best.ckpt"
        self._status: dict[str, Any] = {}
        self._written = 0.0

    def refuse_used(self) -> None:
        """A new run never writes over what an earlier one left."""
        if not self.writes:
            return
        if self.last.exists() or (self.path / "metrics.csv").exists():
            raise UserError(
                f"{self.path} holds a run: go on with ckpt_path=last, or take another "
                "hydra.run.dir"
            )
        if (self.path / "numbers.json").exists():
            raise UserError(f"{self.path} holds a study: take another hydra.run.dir")

    def start(self, cfg: DictConfig, choices: Mapping[str, str], max_steps: int) -> None:
        """Write config.yaml and the first status.json."""
        if not self.writes:
            return
        self._fresh = not (self.path / "config.yaml").exists()
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        resolved = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
        head = f"{CHOICES}{json.dumps(dict(choices))}\n"
        write_text(self.path / "config.yaml", head + OmegaConf.to_yaml(without_secrets(resolved)))
        self._status = {
            "state": "running",
            "stage": "start",
            "step": 0,
            "max_steps": max_steps,
            "error": None,
            "pid": os.getpid(),
            "started": _now(),
            "updated": _now(),
            "version": __version__,
            "git": commit(),
        }
        self.note_status()

    def keep(self, key: str, value: Any) -> None:
        """A key of config.yaml that was null, as the run found it."""
        path = self.path / "config.yaml"
        if self.writes:
            head, text = path.read_text(encoding="utf-8").split("\n", 1)
            cfg = OmegaConf.create(text)
            OmegaConf.update(cfg, key, value)
            write_text(path, f"{head}\n{OmegaConf.to_yaml(cfg)}")

    @property
    def stage(self) -> str:
        """What the run is doing, or was when it ended."""
        return self._status.get("stage", "start")

    def withdraw(self) -> None:
        """Bad input before the first number leaves status.json and the log, no half a run."""
        if self.writes and self._fresh and not (self.path / "metrics.json").exists():
            (self.path / "config.yaml").unlink(missing_ok=True)
            self.checkpoints.rmdir()

    def note_status(self, **changes: Any) -> None:
        self._status |= {**changes, "updated": _now()}
        if not self.writes:
            return
        self._written = time.monotonic()
        write_text(self.path / "status.json", self._told())

    def _told(self) -> str:
        return json.dumps(self._status, indent=1) + "\n"

    def note_end(self, state: str, error: str) -> None:
        """The last word of a run that failed, also where the disk has no room for one."""
        try:
            self.note_status(state=state, error=error)
        except CannotWrite:
            with suppress(OSError):
                overwrite(self.path / "status.json", self._told())

    def note(self, stage: str, done: int, total: int) -> None:
        """What ``Stages`` calls as work goes on; writes at most once a second within a stage."""
        new = self._status.get("stage") != stage
        if stage == "training":
            self._status["step"] = done
        if new or time.monotonic() - self._written >= STATUS_SECONDS:
            self.note_status(stage=stage)

    def note_metrics(self, numbers: Mapping[str, Any]) -> None:
        if self.writes:
            write_text(self.path / "metrics.json", json.dumps(numbers, indent=1) + "\n")

    def note_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """``samples.jsonl``, ``pairs.jsonl``."""
        if self.writes:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_text(self.path / name, text)


class MetricsCsv:
    """metrics.csv: a header, one row per logged step, appended and flushed.

    A number that the first row has not, as the step had no row that it is about, widens it.
    """

    def __init__(self, path: Path, header: Sequence[str]):
        self.path = path
        self.header = list(header)
        if path.exists() and path.stat().st_size:
            with path.open(encoding="utf-8", newline="") as file:
                self.header = next(csv.reader(file))
        else:
            self._append(self.header)

    def write(self, row: Mapping[str, Any]) -> None:
        late = [name for name in row if name not in self.header]
        if late:
            self.header += late
            _, *rest = self.path.read_text("utf-8").splitlines()
            lines = [",".join(self.header), *(line + "," * len(late) for line in rest)]
            write_text(self.path, "".join(f"{line}\n" for line in lines))
        self._append(["" if row.get(name) is None else row[name] for name in self.header])

    def _append(self, cells: Sequence[Any]) -> None:
        with (
            writing(self.path),
            self.path.open("a", encoding="utf-8", newline="") as file,
        ):
            csv.writer(file, lineterminator="\n").writerow(cells)


def cut_after(path: Path, step: int) -> None:
    """Drop rows later than ``step``, and a last row that a kill left unfinished."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", newline="") as file:
        whole = [line for line in file if line.endswith("\n")]
    kept = whole[:1] + [line for line in whole[1:] if int(line.split(",", 1)[0]) <= step]
    write_text(path, "".join(kept))


def choices_of(path: Path) -> dict[str, str]:
    """The groups' options, from the head of a run's config.yaml."""
    with path.open(encoding="utf-8") as file:
        head = file.readline()
    return json.loads(head.removeprefix(CHOICES)) if head.startswith(CHOICES) else {}


def finished_numbers(directory: Path) -> dict[str, Any] | None:
    """metrics.json, or a study's numbers.json, of a run that ended as it should; else None."""

    def read(name: str) -> Any:
        return json.loads((directory / name).read_text(encoding="utf-8"))

    try:
        if read("status.json")["state"] != "finished":
            return None
        return read("metrics.json" if (directory / "metrics.json").exists() else "numbers.json")
    except (OSError, ValueError, KeyError):
        return None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def commit() -> str | None:
    """The package's git commit, where it runs from a checkout."""
    here = Path(__file__).resolve().parents[2]
    if not (here / ".git").exists():
        return None
    found = subprocess.run(
        ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or None
