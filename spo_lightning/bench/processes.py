"""Words of a command in, the seconds of its process out."""

import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from spo_lightning.errors import Diverged
from spo_lightning.records.progress import Stages

POLL = 0.02  # seconds between two looks at what a process has done


def clocked(
    words: Sequence[str],
    what: str,
    *,
    environment: Mapping[str, str],
    room: Path,
    stages: Stages,
    until: Callable[[], bool] | None = None,
) -> float:
    """Wall-clock seconds to the end, or to the first time that ``until`` holds.

    A process that fails ends the measurement in one line; ``room`` takes what it says.
    """
    with open(room / "said.txt", "w+", encoding="utf-8") as said:
        began, reached = time.perf_counter(), None
        process = subprocess.Popen(words, env=environment, stdout=said, stderr=subprocess.STDOUT)
        while process.poll() is None:
            if reached is None and until is not None and until():
                reached = time.perf_counter() - began
            try:
                process.wait(1.0 if until is None or reached else POLL)
            except subprocess.TimeoutExpired:
                if stages.stop.signal is not None:
                    process.terminate()
        taken = time.perf_counter() - began
        said.seek(0)
        lines = said.read().strip().splitlines() or [""]
    if stages.stop.signal is not None:
        raise stages.stop.raised(stages.how_to_go_on)
    if process.returncode:
        raise Diverged(f"{what}: its run ended with {process.returncode}: {lines[-1]}")
    return reached or taken
