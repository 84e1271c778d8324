"""what=rates: a tiny round for real, and that plan reads what it wrote. Never how fast it was."""

import pytest
from benches import measured, refused

from spo_lightning.plan.__main__ import RATES, rates_of

FEW = ("what=rates", "hardware=cpu", "hardware.threads=1", "width=128", "tokens=64")


def test_plan_reads_its_rates(tmp_path):
    numbers = measured(tmp_path / "run", *FEW, "repetitions=3")
    assert {*numbers["rates"]} == {*RATES} and all(v > 0 for v in numbers["rates"].values())
    assert numbers["rates"] == rates_of(str(tmp_path / "run/bench.json"))
    assert "matrices" in (tmp_path / "run/table.md").read_text()


@pytest.mark.parametrize(
    "word, says",
    [
        ("width=32", "width=32: it must be at least 64"),
        ("model.config.hidden_size=32", "model.config.hidden_size has no effect"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *FEW, word)
