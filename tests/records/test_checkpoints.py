"""A checkpoint is whole or not there; the newest whole one is gone on from; a full disk."""

import json
import shutil
import subprocess

import pytest
import torch

from spo_lightning.errors import CannotWrite, UserError, is_bug, verdict
from spo_lightning.records import checkpoints
from spo_lightning.records.directory import MetricsCsv, RunDir
from spo_lightning.records.disk import write_text, writing_folder


def tree(step, size=1000):
    return {"spo_lightning": {"outer_step": step}, "state_dict": {"a": torch.full((size,), step)}}


def saved(path, step, size=1000):
    checkpoints.put(
        path,
        lambda beside: checkpoints.write(tree(step, size), beside),
        keep_former=path.name == "last.ckpt",
        first=True,
    )


def newest(directory):
    return checkpoints.newest(directory / "last.ckpt", directory / "best.ckpt")


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.fixture
def full(tmp_path):
    """A file system of 256 KiB, and what fills it."""
    place = tmp_path / "small"
    place.mkdir()
    how = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(how, capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


def test_the_former_stays_until_the_next(tmp_path):
    assert newest(tmp_path) is None
    for step in (5, 10, 15):
        saved(tmp_path / "last.ckpt", step)
    assert names(tmp_path) == ["last.ckpt", "previous.ckpt"]
    path, found = newest(tmp_path)
    assert path.name == "last.ckpt" and torch.equal(
        found["state_dict"]["a"], tree(15)["state_dict"]["a"]
    )
    assert checkpoints.read(tmp_path / "previous.ckpt")["spo_lightning"]["outer_step"] == 10


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flipped(path):
    data = bytearray(path.read_bytes())
    place = data.index(torch.full((4,), 15).numpy().tobytes())
    data[place] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("harm", [cut, flipped, lambda path: path.write_bytes(b"")])
def test_the_one_before_a_broken_one_takes_its_place(tmp_path, harm, caplog):
    for step in (5, 10, 15):
        saved(tmp_path / "last.ckpt", step)
    harm(tmp_path / "last.ckpt")
    path, found = newest(tmp_path)
    assert (path, found["spo_lightning"]["outer_step"]) == (tmp_path / "last.ckpt", 10)
    (line,) = caplog.messages
    assert "last.ckpt: no whole checkpoint of ours" in line and "\n" not in line
    assert line.endswith("taking previous.ckpt of outer step 10 in its place")
    assert names(tmp_path) == ["last.ckpt"]


def test_the_half_of_a_killed_write_is_in_nobodys_way(tmp_path):
    """Of a run whose processes each wrote their parts, which goes on in one."""
    half = tmp_path / "last.ckpt.tmp"
    half.mkdir()
    (half / "part").write_text("half")
    saved(tmp_path / "last.ckpt", 5)
    assert names(tmp_path) == ["last.ckpt"] and newest(tmp_path)[1]["spo_lightning"]


def test_a_kill_between_the_two_names(tmp_path):
    saved(tmp_path / "last.ckpt", 5)
    (tmp_path / "last.ckpt").rename(tmp_path / "previous.ckpt")
    path, found = newest(tmp_path)
    assert path.name == "last.ckpt" and found["spo_lightning"]["outer_step"] == 5


def test_the_best_stands_in_then_nothing(tmp_path, caplog):
    saved(tmp_path / "last.ckpt", 10)
    saved(tmp_path / "best.ckpt", 5)
    cut(tmp_path / "last.ckpt")
    path, _ = newest(tmp_path)
    assert path.name == "best.ckpt" and names(tmp_path) == ["best.ckpt"]
    cut(path)
    with pytest.raises(UserError, match="no other checkpoint of the run is whole"):
        newest(tmp_path)
    assert names(tmp_path) == ["best.ckpt"]  # a refusal touches nothing


@pytest.mark.parametrize("held", [{"state_dict": {}}, torch.zeros(3), {"x": print}])
def test_another_programs_file(tmp_path, held):
    torch.save(held, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="no whole checkpoint of ours") as caught:
        checkpoints.read(tmp_path / "other.ckpt")
    assert "\n" not in str(caught.value)


def test_a_full_disk_leaves_the_one_before(full):
    saved(full / "last.ckpt", 5, size=8000)
    with pytest.raises(CannotWrite) as caught:
        saved(full / "last.ckpt", 10, size=40000)
    said = str(caught.value)
    assert f"cannot write {full}/last.ckpt: " in said and "(0.3 MiB wanted, 0.2 MiB free" in said
    assert said.endswith("the last.ckpt before it is whole, and ckpt_path=last goes on from there")
    assert names(full) == ["last.ckpt"] and newest(full)[1]["spo_lightning"]["outer_step"] == 5
    with pytest.raises(CannotWrite, match="the last.ckpt before it is whole"):
        saved(full / "best.ckpt", 10, size=40000)


def test_every_other_file_says_which_it_is(full):
    kept = RunDir(full)
    kept.note_status(state="running", error=None)
    rows = MetricsCsv(full / "metrics.csv", ["step"])
    with pytest.raises(OSError), (full / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1024))
    with pytest.raises(CannotWrite, match="cannot write .*/samples.jsonl: No space left"):
        kept.note_rows("samples.jsonl", [{"prompt": "p" * 10000}])
    with pytest.raises(CannotWrite, match="cannot write .*/metrics.csv: No space left"):
        for step in range(10000):
            rows.write({"step": step})
    with pytest.raises(CannotWrite), writing_folder(full / "model"):
        (full / "model").mkdir()
        (full / "model/weights").write_bytes(bytes(9000))
    kept.note_end("failed", "no room")  # in place
    assert json.loads((full / "status.json").read_text())["state"] == "failed"
    assert names(full) == ["filler", "metrics.csv", "status.json"]


def test_what_a_full_disk_is_called(tmp_path):
    error = RuntimeError("[enforce fail at inline_container.cc:626] . unexpected pos 64 vs 0")
    assert verdict(error)[0] == 1 and not is_bug(error)
    assert verdict(CannotWrite("a b")) == (1, "a b") and not is_bug(CannotWrite("a"))
    missing = FileNotFoundError(2, "No such file", "x")
    assert is_bug(missing)
    with pytest.raises(FileNotFoundError):
        write_text(tmp_path / "absent" / "x", "")
