"""One writer per run directory: a lock that names its holder and dies with it; and waiting in
turn for what is made once for all runs."""

import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from spo_lightning.errors import UserError
from spo_lightning.records.disk import writing

log = logging.getLogger(__name__)

NAME = "writer.lock"
LOOK_SECONDS = 0.5
BEAT_SECONDS = 10.0
# of a holder on another host, whose kernel's lock may not reach us: longer than a shared file
# system takes to show a beat, shorter than a scheduler takes to start a job anew twice
DEAD_SECONDS = 60.0


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """This process alone writes into ``directory`` meanwhile; another is told who does."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / NAME
    file = _taken(path)
    OPEN.add(file)
    over = threading.Event()
    beating = threading.Thread(target=_beat, args=(file, over), daemon=True)
    try:
        beating.start()
        yield
    finally:
        over.set()
        beating.join()
        path.unlink(missing_ok=True)  # still locked: who opened it before sees that it has gone
        OPEN.discard(file)
        file.close()


@contextmanager
def alone(path: Path, check: Callable[[], None] = lambda: None) -> Iterator[None]:
    """One process at a time, of those that the kernel's lock reaches: on some shared file systems
    that is none, or those of one machine. It saves work, and what is inside is right without it.

    ``check`` ends the wait by what it raises.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a", encoding="utf-8")
    except OSError as error:
        log.warning("Cache: no lock %s (%s): going on without", path, error)
        yield
        return
    with file:
        waited = False
        while (mine := locked(file)) is False:
            if not waited:
                log.info("Cache: another run is making %s: waiting for it", path.with_suffix(""))
            waited = True
            check()
            time.sleep(LOOK_SECONDS)
        if mine is None:
            log.warning("Cache: no locks in %s: going on without", path.parent)
        yield


OPEN: set[IO[str]] = set()
# a child that outlives its parent must not keep the lock; the parent's own stays
os.register_at_fork(after_in_child=lambda: [file.close() for file in OPEN])


def _taken(path: Path) -> IO[str]:
    """The file, locked, with this process's name in it."""
    while True:
        file = path.open("a+", encoding="utf-8")
        mine = locked(file)
        file.seek(0)
        before = _named(file.read())
        if mine is False:
            raise _refusal(path, before)
        try:
            if os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
        except FileNotFoundError:
            pass
        file.close()  # its holder has removed it since we opened it
    here = socket.gethostname()
    if before and (mine is None or before.get("host") != here):
        age = _now(path) - path.stat().st_mtime
        if age < DEAD_SECONDS:
            raise _refusal(path, before, age)
    began = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    with writing(path):
        file.truncate(0)
        file.write(json.dumps({"host": here, "pid": os.getpid(), "started": began}) + "\n")
        file.flush()
    return file


def locked(file: IO[Any]) -> bool | None:
    """Whether the kernel gives us the lock; None on a file system that has none."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _beat(file: IO[str], over: threading.Event) -> None:
    """The file's time is the heartbeat: the server's clock sets it, not this host's."""
    while not over.wait(BEAT_SECONDS):
        os.utime(file.fileno())


def _now(path: Path) -> float:
    """The time by the clock that stamps this directory's files."""
    probe = path.with_name(f"{NAME}.{socket.gethostname()}.{os.getpid()}")
    probe.touch()
    try:
        return probe.stat().st_mtime
    finally:
        probe.unlink()


def _named(text: str) -> dict[str, Any]:
    """Who holds it, by the file's text; nothing of a file that is not ours or not yet written."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _refusal(path: Path, holder: dict[str, Any], age: float | None = None) -> UserError:
    who = "another process"
    if holder:
        who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('started')}"
    if age is None:
        return UserError(f"{path.parent} is written by {who}: wait for its end, or stop it")
    left = DEAD_SECONDS - age
    return UserError(
        f"{path.parent} is written by {who}, last heard {age:.0f} s ago: wait for its end; if it "
        f"was killed, try again in {left:.0f} s"
    )
