"""Work in, the memory at its peak out: what a process of its own had in use, above its start."""

import ctypes
import multiprocessing
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.errors import Diverged
from spo_lightning.records.progress import Stages, quiet
from spo_lightning.run.prepare import set_threads

MIB = 2**20
M_MMAP_THRESHOLD = -3  # glibc: blocks of so many bytes are mappings of their own
SMALL = 64 * 1024  # bytes


class Memory:
    """Bytes in use at the peak of a stretch of work, above those in use when it began."""

    def start(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        forget_peak()
        self.before = _highest_resident()

    def above(self) -> int:
        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() - self.before
        return _highest_resident() - self.before


def forget_peak() -> bool:
    """Start the peak of this process anew; False where the system does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _highest_resident() -> int:
    """Bytes of this process in memory, at most since the peak was forgotten."""
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def can_forget() -> bool:
    """Whether an earlier, higher peak does not hide a later one."""
    return torch.cuda.is_available() or forget_peak()


@contextmanager
def named(name: str) -> Iterator[None]:
    """Says whose steps diverged."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from error


def apart(
    calls: Mapping[str, Sequence[Any]],
    stages: Stages,
    *,
    shown: Callable[[Any], str],
    title: str = "memory",
) -> dict[str, Any]:
    """What each call, a function and its arguments, returns from a process of its own."""
    # one process imports what the others inherit, where no GPU is at hand: CUDA outlives no fork
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([function.__module__ for function, *_ in calls.values()])
    found = {}
    with (
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes,
        stages.stage(title, len(calls)) as advance,
    ):
        for name, call in calls.items():
            work = processes.submit(*call)
            try:
                with named(name):
                    found[name] = work.result()
            except BrokenProcessPool as error:
                if stages.stop.signal is None:
                    raise
                raise stages.stop.raised(stages.how_to_go_on) from error
            advance(1, f"{name} {shown(found[name])}")
    return found


def settle(hardware: DictConfig) -> None:
    """Make a fresh process quiet, and its memory go back as soon as it is freed."""
    warnings.simplefilter("ignore")
    quiet()
    with suppress(AttributeError):  # glibc's, others have none
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)
    set_threads(hardware)
