"""What is known of each job of a sweep: its words, its state, its numbers; and sweep.json."""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from spo_lightning import __version__
from spo_lightning.errors import UserError
from spo_lightning.records.directory import MAY_DIFFER, words_without_secrets, write_text

RECORD = "sweep.json"
WAITING, RUNNING, FINISHED = "waiting", "running", "finished"
FAILED, INTERRUPTED, DIED = "failed", "interrupted", "died"  # died: by a signal, leaving no word
SHOWN = (
    "hypervolume",
    "exact_match",
    "win_rate",
    "nll/chosen",
    "displacement/chosen",
    "rewards/accuracies",
)
WIDE = 60  # columns of a job's words in a table


@dataclass
class Job:
    """One run of a sweep."""

    number: int
    words: Sequence[str]  # its overrides, without secrets
    directory: str
    state: str = WAITING
    seconds: float = 0.0  # of this and earlier tries
    error: str | None = None  # one line
    numbers: dict[str, Any] = field(default_factory=dict)  # init and final, as in metrics.json

    @property
    def path(self) -> Path:
        return Path(self.directory)

    @property
    def meaning(self) -> list[str]:
        """The words that decide its numbers."""
        keys = ((word, word.lstrip("+~").partition("=")[0]) for word in self.words)
        return sorted(word for word, key in keys if key.split(".")[0] not in MAY_DIFFER)

    def progress(self) -> tuple[str, float]:
        """Its stage and how much of the training is done, from its status.json."""
        try:
            status = json.loads((self.path / "status.json").read_text(encoding="utf-8"))
            return status["stage"], status["step"] / max(1, status["max_steps"])
        except (OSError, ValueError, KeyError):  # not begun, or of another kind
            return "start", 0.0

    def ended(self, state: str, error: str | None, numbers: Any) -> None:
        self.state, self.error = state, error
        if isinstance(numbers, Mapping):
            self.numbers = {k: numbers[k] for k in ("init", "final") if numbers.get(k)}


@dataclass
class Sweep:
    """The jobs of one command, in order."""

    directory: Path
    command: Sequence[str]  # the words of the command line
    cwd: str
    jobs: list[Job] = field(default_factory=list)
    started: float = field(default_factory=time.time)
    reported: bool = False  # whether a page is made of it at its end

    @property
    def failed(self) -> list[Job]:
        return [job for job in self.jobs if job.state in (FAILED, DIED, INTERRUPTED)]

    def varying(self, job: Job) -> str:
        """The words by which the job differs from the others."""
        shared = set.intersection(*(set(other.words) for other in self.jobs))
        return " ".join(w for w in job.words if w not in shared) or " ".join(job.words)

    def write(self) -> None:
        record = {
            "version": __version__,
            "command": words_without_secrets(self.command),
            "cwd": self.cwd,
            "started": self.started,
            "updated": time.time(),
            "jobs": [asdict(job) for job in self.jobs],
        }
        write_text(self.directory / RECORD, json.dumps(record, indent=1) + "\n")

    def table(self) -> str:
        """Every job's numbers, or its one line; plain text."""
        finals = [job.numbers.get("final") or {} for job in self.jobs]
        names = [name for name in SHOWN if any(name in final for final in finals)]
        labels = [_cut(self.varying(job)) for job in self.jobs]
        width = max([len(label) for label in labels], default=3)
        lines = [f"{'job':>4}  {'':<{width}}  {'state':<11} {'seconds':>7}"]
        lines[0] += "".join(f"{name:>{len(name) + 2}}" for name in names)
        for job, label, final in zip(self.jobs, labels, finals):
            line = f"{job.number:>4}  {label:<{width}}  {job.state:<11} {job.seconds:>7.0f}"
            for name in names if final else ():
                cell = f"{final[name]:.4f}" if name in final else ""
                line += f"{cell:>{len(name) + 2}}"
            lines.append(line + (f"  {job.error}" if job.error else ""))
        return "\n".join(line.rstrip() for line in lines)


def _cut(text: str) -> str:
    return text if len(text) <= WIDE else f"{text[: WIDE - 3]}..."


def read(directory: Path) -> dict[str, Any]:
    """sweep.json of an earlier command."""
    path = directory / RECORD
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        found["jobs"] = [Job(**job) for job in found["jobs"]]
        return {key: found[key] for key in ("command", "cwd", "started", "jobs")}
    except OSError as error:
        raise UserError(f"{path}: no sweep to go on with ({error.strerror})") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: no record of a sweep ({error})") from error
