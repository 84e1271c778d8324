"""One cache for jobs on several machines, where no lock may reach them all: nothing goes wrong."""

import errno
import fcntl
import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import SMALL, environment
from safetensors.torch import load_file
from tiny import policy

from spo_lightning.records.disk import write_text
from spo_lightning.records.lock import alone
from spo_lightning.training import sft
from spo_lightning.world import ALONE


def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")


def test_files_in_the_making_never_meet(tmp_path):
    """Machines number their processes alike; threads of one process have one number too."""
    texts, path = [str(n) * 200_000 for n in range(8)], tmp_path / "verdict.json"
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            list(pool.map(lambda text: write_text(path, text), texts))
            assert path.read_text() in texts
    assert [one.name for one in tmp_path.iterdir()] == ["verdict.json"]


def test_a_warm_start_that_another_kept_stays(tmp_path):
    """Who comes second takes the first one's, which others may be reading."""
    first, second, home = policy(seed=0), policy(seed=1), tmp_path / "0123"
    assert sft._keep(first, [(1, 0.5)], home, ALONE)
    files = {path: path.stat().st_ino for path in home.iterdir()}
    assert not sft._keep(second, [(1, 0.6)], home, ALONE)
    assert {path: path.stat().st_ino for path in home.iterdir()} == files
    assert [one.name for one in tmp_path.iterdir()] == ["0123"]
    second.read(home)
    for (name, one), (_, other) in zip(first.weights(), second.weights()):
        assert torch.equal(one, other), name
    (home / "model.safetensors").unlink()  # what somebody took from is made anew
    assert sft._keep(second, [(1, 0.7)], home, ALONE)
    assert json.loads((home / "curve.json").read_text()) == [[1, 0.7]]


def test_one_at_a_time_where_there_are_locks(tmp_path, caplog):
    caplog.set_level("INFO")
    order, path = [], tmp_path / "room" / "name.lock"

    def other():
        with alone(path):
            order.append("second")

    with alone(path):
        thread = threading.Thread(target=other)
        thread.start()
        time.sleep(0.3)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert f"another run is making {tmp_path / 'room/name'}: waiting" in caplog.text


def test_none_is_waited_for_where_there_are_no_locks(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with alone(tmp_path / "name.lock"), alone(tmp_path / "name.lock"):
        assert f"no locks in {tmp_path}: going on without" in caplog.text
    (tmp_path / "file").write_text("")
    with alone(tmp_path / "file" / "name.lock"):  # nor may it be made
        assert "no lock " in caplog.text


BARE = """
import errno, fcntl, runpy, sys

def no_locks(*_):
    raise OSError(errno.ENOLCK, "No locks available")

fcntl.flock = no_locks
runpy.run_module("spo_lightning.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_runs_fill_one_cache_without_locks(tmp_path):
    """At the same time, from nothing: warm start, sampled pairs, tokens, reference. Both end as a
    run that has a cache of its own does, and so does one that finds what they left."""
    kept = [word for word in SMALL if not word.startswith("data")]
    words = [*kept, "data=arithmetic", "sft.max_steps=60", "max_steps=6", "report.enabled=false"]
    words += [f"data.{size}" for size in ("sft_rows=64", "prompts=24", "eval_prompts=7")]
    words += ["data.operations=1", "data.digits=1", "loss=spo"]

    def begin(name, cache):
        line = [*words, f"hydra.run.dir={name}", f"cache.dir={cache}"]
        code = [sys.executable, "-c", BARE, *line]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(code, cwd=tmp_path, env=environment(), **pipes)

    def end(process):
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        return out

    both = [begin(name, "shared") for name in ("one", "two")]
    said = [end(process) for process in both]
    assert all("no locks in" in out for out in said)
    said = end(begin("after", "shared"))
    assert "Warm start: taken from" in said and "Sampled pairs: taken from" in said
    end(begin("own", "private"))
    assert not [path for path in (tmp_path / "shared").rglob("*") if path.suffix == ".tmp"]
    (start,) = (path for path in (tmp_path / "shared/warm_starts").iterdir() if path.is_dir())
    assert (start / "model.safetensors").exists()
    own = load_file(tmp_path / "own/model/model.safetensors")
    found = json.loads((tmp_path / "own/metrics.json").read_text())
    for name in ("one", "two", "after"):
        for key, value in load_file(tmp_path / name / "model/model.safetensors").items():
            assert torch.equal(own[key], value), (name, key)
        numbers = json.loads((tmp_path / name / "metrics.json").read_text())
        assert all(numbers[when] == found[when] for when in ("init", "final")), name
