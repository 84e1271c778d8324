"""A start and a solver in, what its outer steps cost out: seconds, and memory at the peak.

The steps are those of training: ``Preference`` under Lightning's Trainer, on the same batches and
from the same weights whichever solver takes them.
"""

import ctypes
import gc
import multiprocessing
import resource
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning import Trainer
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig
from torch.utils.data import DataLoader

from spo_lightning.errors import Diverged
from spo_lightning.evals import Pairs
from spo_lightning.fit import OuterSteps, module_of
from spo_lightning.models import Scorer
from spo_lightning.prepare import quiet
from spo_lightning.progress import Stages

MIB = 2**20
M_MMAP_THRESHOLD = -3  # glibc: blocks of so many bytes are mappings of their own
SMALL = 64 * 1024  # bytes


class Start(NamedTuple):
    """What every solver starts from."""

    scorer: Scorer
    train: Pairs
    lower: Pairs | None  # the lower level's own texts; None: the chosen responses


class Entry(NamedTuple):
    """One solver with the rest of its run."""

    cfg: DictConfig
    loss: Any
    solver: Any


def take(entry: Entry, start: Start, steps: int, watch: Any) -> None:
    """``steps`` outer steps, watched by a callback; the policy is left as it was."""
    cfg = entry.cfg
    parameters = [p for p in start.scorer.parameters() if p.requires_grad]
    kept = [p.detach().cpu().clone() for p in parameters]
    module = module_of(cfg, start.scorer, entry.loss, entry.solver, steps)
    trainer = Trainer(
        accelerator=cfg.hardware.accelerator,
        devices=1,
        precision=cfg.hardware.precision,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[watch],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = OuterSteps(
        start.train, module, micro=cfg.micro_batch_size, seed=cfg.seed, lower=start.lower
    )
    trainer.fit(module, DataLoader(data, batch_size=None))
    with torch.no_grad():
        for p, before in zip(parameters, kept):
            p.copy_(before)
            p.grad = None
    del module, trainer, data
    gc.collect()  # they hold each other, and the solver's and the optimizer's memory


def inner_share(start: Start) -> float:
    """Tokens of a pass of the lower level over those of a pass of both levels."""
    pairs = start.train.pairs
    texts = pairs if start.lower is None else start.lower.pairs
    again = 0 if start.scorer.shared else 1  # the prompt of a pair is encoded twice
    below = sum(len(text.prompt) + len(text.chosen) for text in texts) / len(texts)
    return below * len(pairs) / sum(len(pair) + again * len(pair.prompt) for pair in pairs)


@contextmanager
def named(name: str) -> Iterator[None]:
    """Says whose steps diverged."""
    try:
        yield
    except Diverged as error:
        raise Diverged(f"{name}: {error}") from error


# -- time


@dataclass
class Clock:
    """Seconds of every outer step, from the batch on the device to the parameters moved."""

    seconds: list[float] = field(default_factory=list)
    began: float = 0.0

    def start(self) -> None:
        self._wait()
        self.began = time.perf_counter()

    def stop(self) -> None:
        self._wait()
        self.seconds.append(time.perf_counter() - self.began)

    def _wait(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()


def times(
    entries: Mapping[str, Entry],
    start: Start,
    *,
    steps: int,
    warmup: int,
    repetitions: int,
    stages: Stages,
) -> dict[str, list[float]]:
    """Seconds per step, one per repetition, in rounds over all solvers.

    Every round starts one solver later, so that none always follows the same neighbour's load.
    """
    quiet()  # Lightning, which was imported since
    names = list(entries)
    found: dict[str, list[float]] = {name: [] for name in names}
    take(entries[names[0]], start, 1, LambdaCallback())  # what only the first ever loads
    with stages.stage("time", repetitions * len(names)) as advance:
        for number in range(repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                clock = Clock()
                watch = LambdaCallback(
                    on_train_batch_start=lambda *_, clock=clock: clock.start(),
                    on_train_batch_end=lambda *_, clock=clock: clock.stop(),
                )
                with named(name):
                    take(entries[name], start, warmup + steps, watch)
                found[name].append(sum(clock.seconds[warmup:]) / steps)
                advance(1, f"{name} {1000 * found[name][-1]:.1f} ms")
    return found


# -- memory


class Memory:
    """Bytes in use at the peak of a stretch of work, above those in use when it began."""

    def start(self) -> None:
        if torch.cuda.is_initialized():
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
            return
        _forget_peak()
        self.before = _highest_resident()

    def above(self) -> int:
        if torch.cuda.is_initialized():
            return torch.cuda.max_memory_allocated() - self.before
        return _highest_resident() - self.before


def _forget_peak() -> bool:
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


def peaks(
    entries: Mapping[str, Entry], base: str, start: Start, room: Path, steps: int, stages: Stages
) -> dict[str, float]:
    """MiB at the peak of ``steps`` steps above what the start takes, by solver.

    Every solver has a process of its own, and the start goes there through a file in ``room``.
    """
    place = room / "start.pt"
    torch.save(start, place)
    # one process imports what the others inherit, where no GPU is at hand: CUDA outlives no fork
    method = "spawn" if torch.cuda.is_available() else "forkserver"
    context = multiprocessing.get_context(method)
    if method == "forkserver":
        context.set_forkserver_preload([__name__])
    found = {}
    with (
        ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes,
        stages.stage("memory", len(entries)) as advance,
    ):
        for name, entry in entries.items():
            work = processes.submit(peak, [entries[base], entry], place, steps)
            try:
                with named(name):
                    found[name] = work.result() / MIB
            except BrokenProcessPool as error:
                if stages.stop.signal is None:
                    raise
                raise stages.stop.raised(stages.how_to_go_on) from error
            advance(1, f"{name} {found[name]:.0f} MiB")
    return found


def peak(entries: Sequence[Entry], place: Path, steps: int) -> int:
    """Bytes that the second entry's steps take, once a step of the first has loaded the code."""
    warnings.simplefilter("ignore")
    quiet()
    with suppress(AttributeError):  # what is freed goes back at once; glibc's, others have none
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, SMALL)
    start = torch.load(place, weights_only=False)  # written just now, by ourselves
    first, second = entries
    if first.cfg.hardware.threads:
        torch.set_num_threads(first.cfg.hardware.threads)
    if torch.cuda.is_available() or _forget_peak():  # else its peak would hide the other's
        take(first, start, 1, LambdaCallback())
    memory = Memory()
    take(second, start, steps, LambdaCallback(on_train_start=lambda *_: memory.start()))
    return memory.above()
