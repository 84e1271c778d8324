"""what=start: real processes once, and what it refuses. Never how long they took."""

import sys

import pytest
from benches import measured, refused
from conftest import SMALL

from spo_lightning.bench import start
from spo_lightning.bench.start import clocked
from spo_lightning.errors import Diverged
from spo_lightning.records.progress import silent


@pytest.mark.slow
def test_one_round(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ",".join(f'"{word}"' for word in ("loss=dpo", "model=llama", *SMALL))
    numbers = measured(tmp_path / "run", "what=start", "repetitions=1", f"run=[{words}]")
    (row,) = numbers["rounds"]
    assert min(row[key] for key in ("imports", "first_step", "help")) > 0
    assert row["beyond"] == row["first_step"] - row["imports"]
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md"}
    assert "beyond the imports" in (tmp_path / "run/table.md").read_text()


@pytest.mark.parametrize(
    "word, says",
    [
        ('run=["max_steps=3"]', "said by the bench"),
        ("repetitions=0", "repetitions=0: it must be at least 1"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, "what=start", word)


def test_a_process_is_clocked_until_a_condition_and_then_ends(tmp_path):
    mark = tmp_path / "mark"
    code = f"import time; open({str(mark)!r}, 'w').close(); time.sleep(1)"
    how = {"environment": {}, "room": tmp_path, "stages": silent()}
    words = [sys.executable, "-c", code]
    assert clocked(words, "it", **how) > 1
    mark.unlink()
    assert clocked(words, "it", until=mark.exists, **how) < 1
    with pytest.raises(Diverged, match="it: its run ended with 3: no"):
        clocked([sys.executable, "-c", "print('no'); raise SystemExit(3)"], "it", **how)


def test_a_head_is_no_row(tmp_path):
    path = tmp_path / "metrics.csv"
    assert not start.has_row(path)
    path.write_text("step\n")
    assert not start.has_row(path)
    path.write_text("step\n1\n")
    assert start.has_row(path)
