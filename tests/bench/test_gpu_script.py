"""tests/gpu.sh where no GPU is at hand: every row is measured, at a tiny size."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = {
    "1.24B, every weight, long", "1.24B, every weight, chat", "8B, adapters, bfloat16, long",
    "8B, adapters on nf4, long", "profile of the first", "tokens_per_batch", "compile", "nf4",
    "int8", "adamw_8bit", "paged_adamw_8bit", "sharding.offload",
}  # fmt: skip
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]


def test_every_row_is_measured(tmp_path):
    for package in ("trl", "bitsandbytes"):
        pytest.importorskip(package)
    given = {**os.environ, "GPU": "0", "LIMIT": "3000"}  # seconds: others may be at work here
    done = subprocess.run(
        [ROOT / "tests/gpu.sh", tmp_path / "gpu"], env=given, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "gpu/table.md").read_text()
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    titles, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines)
    table = {row[0]: dict(zip(titles, row, strict=True)) for row in rows}
    assert {*table} == ROWS
    offload = table.pop("sharding.offload")
    assert "hardware.sharding.offload" in offload["what it says"]  # a GPU's alone
    for name, row in table.items():
        assert "error" not in row["what it says"] and float(row["ours, ms"]) > 0, name
        if name[0].isdigit():
            assert float(row["ours / floor"]) > 0 and float(row["TRL / ours"]) > 0
            assert float(row["utilisation"]) >= 0
