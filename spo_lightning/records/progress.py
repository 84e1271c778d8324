"""Every stage of a run goes through here: a progress bar, the status file, and signals.

A signal sets a flag; ``advance`` raises ``Interrupted`` after the step in hand. A second signal
ends the process at once, unless the first was a scheduler's warning that an end will come.
"""

import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from spo_lightning.errors import SAVED, Interrupted
from spo_lightning.world import ALONE, World

log = logging.getLogger(__name__)

QUIET_SECONDS = 10.0  # between plain lines where there is no terminal
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)  # of a scheduler, some time before it ends a job
ONCE_SECONDS = 1.0  # within which a signal that comes again, to a whole tree of processes, is one


class Stop:
    """Remembers the first SIGINT, SIGTERM or warning; what follows SIGINT or SIGTERM quits."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self._came = 0.0

    def install(self) -> dict[int, Any]:
        """Take the signals over; returns the handlers that were there."""
        taken = (signal.SIGINT, signal.SIGTERM, *WARNINGS)
        return {number: signal.signal(number, self._note) for number in taken}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Signals are taken over inside; the handlers that were there come back."""
        before = self.install()
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        if number == self.signal and time.monotonic() - self._came < ONCE_SECONDS:
            return
        if self.signal is not None and number in WARNINGS:
            return
        if self.signal not in (None, *WARNINGS):
            os._exit(128 + number)
        self.signal, self._came = number, time.monotonic()
        for child in multiprocessing.active_children():  # the ranks of a ddp run
            if child.pid and number != signal.SIGINT:
                os.kill(child.pid, number)

    def raised(self, how_to_go_on: str) -> Interrupted:
        return stopped(self.signal or signal.SIGTERM, f". {how_to_go_on}")


def stopped(number: int, more: str = "") -> Interrupted:
    """How a run ends that a signal asked to."""
    code = 128 + number if number == signal.SIGINT else SAVED
    return Interrupted(code, f"stopped by {signal.Signals(number).name}{more}")


class Stages:
    """Shows the stages of one run. ``note`` is called with (stage, done, total) meanwhile.

    ``world``: the processes that take them; one of several shows nothing but the first.
    """

    def __init__(
        self,
        note: Callable[[str, int, int], None],
        stop: Stop,
        how_to_go_on: str,
        world: World = ALONE,
    ):
        self.note, self.stop, self.how_to_go_on, self.world = note, stop, how_to_go_on, world

    @contextmanager
    def stage(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """``advance(count, text)`` moves the bar; raises when a signal came, unless told not."""
        self.note(title, done, total)
        with self._shown(title, total, done) as show:
            state = {"done": done}

            def advance(count: int = 1, text: str = "", *, check: bool = True) -> None:
                state["done"] += count
                show(state["done"], text)
                self.note(title, state["done"], total)
                if check:
                    self.check()

            yield advance

    def check(self) -> None:
        """Ends the run where a signal came."""
        if self.stop.signal is not None:
            raise self.stop.raised(self.how_to_go_on)

    def _shown(
        self, title: str, total: int, done: int
    ) -> AbstractContextManager[Callable[[int, str], None]]:
        if not self.world.first:
            return nullcontext(lambda *_: None)
        from rich.console import Console

        console = Console()
        return _bar(console, title, total, done) if console.is_terminal else _lines(title, total)


class Within(Stages):
    """Stages inside another: nothing is shown or noted, and a signal waits for the outer one.

    ``world``: of one, where every process is at something of its own meanwhile.
    """

    def __init__(self, outer: Stages, world: World | None = None):
        super().__init__(lambda *_: None, outer.stop, outer.how_to_go_on, world or outer.world)

    @contextmanager
    def stage(self, title: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        def advance(count: int = 1, text: str = "", *, check: bool = True) -> None:
            pass

        yield advance


@contextmanager
def _bar(console: Any, title: str, total: int, done: int) -> Iterator[Callable[[int, str], None]]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.progress import TimeElapsedColumn as Elapsed
    from rich.progress import TimeRemainingColumn as Remaining

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), Elapsed(), Remaining())
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, note="")
        yield lambda now, note: bar.update(task, completed=now, note=note)


@contextmanager
def _lines(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    began = time.monotonic()
    last = began

    def show(now: int, note: str) -> None:
        nonlocal last
        seconds = time.monotonic()
        if now >= total or seconds - last >= QUIET_SECONDS:
            last = seconds
            log.info("%s %d/%d (%.0f s) %s", title, now, total, seconds - began, note)

    yield show


def silent() -> Stages:
    """For tests and notebooks: nothing shown, nothing written, no signals."""
    return Stages(lambda *_: None, Stop(), "")


@contextmanager
def hushed(name: str = "spo_lightning") -> Iterator[None]:
    """What a room logs is left out where it is said elsewhere, or would be said for every cell."""
    theirs = logging.getLogger(name)
    before = theirs.level
    theirs.setLevel(logging.WARNING)
    try:
        yield
    finally:
        theirs.setLevel(before)


def quiet() -> None:
    """Libraries' notes and bars hide ours; their warnings of errors stay."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in [*logging.root.manager.loggerDict, "bitsandbytes"]:  # that is not yet imported
        if name.split(".")[0] in ("lightning", "lightning_fabric", "datasets", "bitsandbytes"):
            theirs = logging.getLogger(name)
            if theirs.level != logging.ERROR:  # to set one forgets what all loggers have cached
                theirs.setLevel(logging.ERROR)
