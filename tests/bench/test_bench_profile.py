"""what=profile: a tiny step looked at for real, and arithmetic. Never how fast it was."""

import json

import pytest
from benches import SHORT, TINY, measured, refused

from spo_lightning.bench.profile import longest, short, table

WORDS = ("what=profile", *TINY, *SHORT, "steps=2", "warmup=1", "rows=5")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    directory = tmp_path_factory.mktemp("profile")
    return measured(directory, *WORDS, "trace=true"), directory


def test_what_it_leaves_behind(found):
    numbers, directory = found
    left = {path.name for path in directory.iterdir()}
    files = {"config.yaml", "bench.json", "table.md", "profile.svg", "profile.png", "trace.json"}
    assert left == files
    assert json.loads((directory / "bench.json").read_text()) == numbers
    text = (directory / "table.md").read_text()
    assert f"{len(numbers['kernels']) - 5} others" in text and "none of them" in text
    assert text.count("\n| ") == 9  # titles and their rule, five, the others, none


def test_it_counts_what_a_step_does(found):
    numbers, _ = found
    kernels = {kernel["name"]: kernel for kernel in numbers["kernels"]}
    times = [kernel["seconds"] for kernel in numbers["kernels"]]
    assert times == sorted(times, reverse=True) and 0 < numbers["busy"] <= 1
    assert sum(times) == pytest.approx(numbers["busy"] * numbers["seconds"])
    # 2 layers of 7 matrices and the head, forward, and twice backward
    assert kernels["aten::mm"]["calls"] >= 3 * 15
    assert kernels["aten::_fused_adamw_"]["calls"] == 1
    assert numbers["waits"] == kernels["aten::_local_scalar_dense"]["calls"]


def test_the_others_are_one_row():
    kernels = [{"name": n, "seconds": s, "calls": 1.0} for n, s in (("a", 3), ("b", 2), ("c", 1))]
    assert longest(kernels, 1)[1:] == [{"name": "2 others", "seconds": 3, "calls": 2}]
    assert longest(kernels, 3) == kernels
    assert short("a | b\n<c>") == "a / b <c>" and len(short("k" * 500)) == 72
    setting = {"device": "cpu", "threads": 1, "precision": "32-true", "parameters": 1000}
    setting |= {"batch_size": 2, "steps": 1, "warmup": 1, "contestant": "ours"}
    numbers = {"setting": setting, "seconds": 10, "busy": 0.6, "launched": 3, "waits": 1}
    told = table({**numbers, "kernels": kernels}, 2)
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines()]
    assert ["1 others", "1000.00", "0.100", "1"] in cells
    assert ["none of them", "4000.00", "0.400", ""] in cells


@pytest.mark.parametrize(
    "word, says",
    [
        ("contestant=them", "them is none of contestants"),
        ("contestant=liger", "contestant=liger needs trl and liger_kernel"),
        ("steps=0", "steps=0: it must be at least 1"),
        ("model.pretrained=here", "model.pretrained has no effect"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *WORDS, word)
