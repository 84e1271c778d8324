"""A run directory has one writer, which is named, and whose end frees it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from conftest import environment

from spo_lightning.errors import UserError
from spo_lightning.records import lock
from spo_lightning.records.lock import NAME, held

HOLDS = """
import sys, time
from pathlib import Path
from spo_lightning.records.lock import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(directory, *, host=None, age=0.0):
    """A lock file as a process on another host leaves it."""
    path = directory / NAME
    path.write_text(json.dumps({"host": host, "pid": 7, "started": "yesterday"}))
    stamp = time.time() - age
    os.utime(path, (stamp, stamp))
    return path


def test_it_names_its_holder_and_goes_with_it(tmp_path):
    with held(tmp_path / "run"):
        found = json.loads((tmp_path / "run" / NAME).read_text())
        assert (found["host"], found["pid"]) == (socket.gethostname(), os.getpid())
        with pytest.raises(UserError) as caught, held(tmp_path / "run"):
            pass
        assert f"written by process {os.getpid()} on {socket.gethostname()}" in str(caught.value)
        assert (tmp_path / "run" / NAME).exists()
    assert not list((tmp_path / "run").iterdir())
    with held(tmp_path / "run"):
        pass


def test_a_kill_frees_it_at_once(tmp_path):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"written by process {process.pid} on"), held(tmp_path):
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with held(tmp_path):
        assert json.loads((tmp_path / NAME).read_text())["pid"] == os.getpid()


def test_a_child_does_not_keep_it(tmp_path):
    with held(tmp_path):
        child = os.fork()
        if not child:
            time.sleep(5)
            os._exit(0)
    try:
        with held(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_another_host_is_heard_by_its_heartbeat(tmp_path):
    path = holder(tmp_path, host="elsewhere", age=20)
    before = path.stat()
    said = "process 7 on elsewhere, since yesterday, last heard 20 s ago.* again in 40 s"
    with pytest.raises(UserError, match=said), held(tmp_path):
        pass
    after = path.stat()
    assert (before.st_mtime_ns, before.st_ino) == (after.st_mtime_ns, after.st_ino)
    assert [one.name for one in tmp_path.iterdir()] == [NAME]
    holder(tmp_path, host="elsewhere", age=61)
    with held(tmp_path):
        assert json.loads(path.read_text())["host"] == socket.gethostname()


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    with held(tmp_path):
        os.utime(tmp_path / NAME, (0, 0))
        patience = time.monotonic() + 10
        while time.time() - (tmp_path / NAME).stat().st_mtime > 5:
            assert time.monotonic() < patience
            time.sleep(0.02)


def test_without_the_kernels_locks_the_heartbeat_decides(tmp_path, monkeypatch):
    def none(*_):
        raise OSError("no locks here")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    with held(tmp_path), pytest.raises(UserError, match="last heard 0 s ago"), held(tmp_path):
        pass
    holder(tmp_path, host=socket.gethostname(), age=61)
    with held(tmp_path):
        pass
