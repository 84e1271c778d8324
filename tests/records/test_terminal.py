"""A full or closed terminal ends no run and prints no traceback."""

import os
import subprocess
import sys

import pytest
from conftest import command, environment

# a command that says more than a pipe holds, and that its work was done
TELLS = """
import logging, sys
from pathlib import Path
from spo_lightning import command
from spo_lightning.records import terminal
def work(*_):
    for _ in range(200):
        logging.getLogger("spo_lightning").info("said " * 200)
    print("printed", flush=True)
    if len(sys.argv) > 1:
        terminal.check()
    Path("done").write_text("done")
command.run({!r}, work)
"""


def told(tmp_path, name, out, *words):
    """Exit code and standard error of a command whose standard output is ``out``."""
    process = subprocess.run(
        [sys.executable, "-c", TELLS.format(name), *words],
        cwd=tmp_path,
        env=environment(),
        stdout=out,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    return process.returncode, process.stderr


@pytest.fixture
def unread():
    """A pipe whose reader has gone."""
    reads, writes = os.pipe()
    os.close(reads)
    yield writes
    os.close(writes)


def test_a_run_goes_on_unread(tmp_path, unread):
    assert told(tmp_path, "train", unread) == (0, "")
    assert (tmp_path / "done").exists()


def test_a_run_goes_on_beside_a_full_disk(tmp_path):
    with open("/dev/full", "w") as full:
        assert told(tmp_path, "train", full) == (0, "")
    assert (tmp_path / "done").exists()


def test_a_run_goes_on_with_both_closed(tmp_path):
    code = f"import os; os.close(1); os.close(2); os.execv({sys.executable!r}, "
    code += f"[{sys.executable!r}, '-c', {TELLS.format('train')!r}])"
    done = command(tmp_path, code, module=("-c",))
    assert (done.code, done.out, done.err) == (0, "", "")
    assert (tmp_path / "done").read_text() == "done"


def test_what_is_only_output_ends_as_other_commands_do(tmp_path, unread):
    assert told(tmp_path, "inspect", unread, "seed=1") == (141, "")
    with open("/dev/full", "w") as full:
        code, said = told(tmp_path, "inspect", full, "seed=1")
    assert code == 1
    assert said == "error: cannot write to standard output: No space left on device\n"
    assert not (tmp_path / "done").exists()


@pytest.mark.parametrize("word", ["--help", "--cfg=job", "seed=nope"])
def test_no_word_prints_a_traceback(tmp_path, unread, word):
    code, said = told(tmp_path, "inspect", unread, word)
    assert "Traceback" not in said and "Exception ignored" not in said
