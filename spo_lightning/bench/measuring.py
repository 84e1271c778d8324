"""Who takes steps in; seconds per step, and memory at the peak of a process of its own, out."""

import ctypes
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from omegaconf import DictConfig

from spo_lightning.bench.contestants import Contestant
from spo_lightning.bench.ours import Watch
from spo_lightning.errors import Diverged
from spo_lightning.models.device import set_threads
from spo_lightning.models.memory import forget_peak, highest_resident
from spo_lightning.records.progress import Stages, quiet

MIB = 2**20
M_MMAP_THRESHOLD = -3  # glibc: blocks of so many bytes are mappings of their own
SMALL = 64 * 1024  # bytes; by default a freed block of up to 32 MiB may stay, and count


@contextmanager
def named(name: str) -> Iterator[None]:
    """Says whose steps diverged."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from error


# -- time


class Clock(Watch):
    """Seconds of every outer step, from the batch on the device to the parameters moved."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def start(self) -> None:
        self.began = now()

    def stop(self) -> None:
        self.seconds.append(now() - self.began)

    def per_step(self, warmup: int) -> float:
        return sum(self.seconds[warmup:]) / len(self.seconds[warmup:])


class Ends(Watch):
    """From the end of one step to the end of the next: what lies between them counts too."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def stop(self) -> None:
        self.at.append(now())

    def per_step(self, warmup: int) -> float:
        return (self.at[-1] - self.at[warmup - 1]) / (len(self.at) - warmup)


def now() -> float:
    """Seconds, once the GPU has done what it was told."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


def rounds(
    cfg: DictConfig,
    made: Mapping[str, Contestant],
    stages: Stages,
    *,
    title: str = "time",
    watch: Callable[[], Clock | Ends] = Clock,
) -> dict[str, list[float]]:
    """Seconds per step, one per repetition.

    Every round starts one contestant later, so that none always follows the same neighbour's load.
    """
    names = list(made)
    found: dict[str, list[float]] = {name: [] for name in names}
    with stages.stage(title, cfg.repetitions * len(names)) as advance:
        for number in range(cfg.repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                clock = watch()
                with named(name):
                    made[name].run(cfg.warmup + cfg.steps, clock)
                found[name].append(clock.per_step(cfg.warmup))
                advance(1, f"{name} {1000 * found[name][-1]:.1f} ms")
    return found


# -- memory


class Memory(Watch):
    """What is in use at the peak, above what was before the first step."""

    def begin(self) -> None:
        self.gpu = torch.cuda.is_initialized()
        if self.gpu:
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        else:
            forget_peak()
            self.before = highest_resident()

    @property
    def highest(self) -> int:
        """Bytes in use at the peak since it began."""
        return torch.cuda.max_memory_allocated() if self.gpu else highest_resident()

    @property
    def mib(self) -> float:
        return (self.highest - self.before) / MIB


def above(contestant: Contestant, steps: int) -> float:
    """MiB at the peak of so many steps, above what was in use before the first."""
    watch = Memory()
    contestant.run(steps, watch)
    return watch.mib


def peaks(
    calls: Mapping[str, tuple[DictConfig, partial[Any]]], steps: int, stages: Stages
) -> dict[str, float]:
    """MiB at the peak by name, each call in a process of its own, as a process on a CPU may keep
    what it once held.

    A call: the hardware's settings, and what makes two contestants there, the one whose first step
    loads the code and the one that is measured.
    """
    # one process imports what the others inherit, where no GPU is at hand: CUDA outlives no fork
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([make.func.__module__ for _, make in calls.values()])
    found = {}
    with (
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes,
        stages.stage("memory", len(calls)) as advance,
    ):
        for name, (hardware, make) in calls.items():
            work = processes.submit(alone, hardware, make, steps)
            try:
                with named(name):
                    found[name] = work.result()
            except BrokenProcessPool as error:
                if stages.stop.signal is None:
                    raise
                raise stages.stop.raised(stages.how_to_go_on) from error
            advance(1, f"{name} {found[name]:.0f} MiB")
    return found


def alone(hardware: DictConfig, make: partial[Any], steps: int) -> float:
    """MiB of one call, in its process."""
    warnings.simplefilter("ignore")
    quiet()
    with suppress(AttributeError):  # glibc's, others have none: freed memory goes back at once
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)
    set_threads(hardware)
    first, second = make()
    if torch.cuda.is_available() or forget_peak():  # else its peak would hide the other's
        first.run(1, Watch())
    return above(second, steps)
