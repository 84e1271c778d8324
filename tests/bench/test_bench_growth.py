"""what=growth: tiny sizes end to end, and its arithmetic. Never how long it took."""

import json

import pytest
from benches import SHORT, TINY, measured, refused

from spo_lightning.bench.cell import Cell
from spo_lightning.bench.growth import Generated, References, fitted

GROWTH = (*("what=growth", *TINY, *SHORT), "steps=1", "warmup=1", "repetitions=2", "sizes=[1,2]")


@pytest.mark.slow
def test_what_it_leaves_behind(tmp_path):
    numbers = measured(tmp_path / "run", *GROWTH, "counts=[10,1000000]")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md", "growth.svg", "growth.png"}
    assert json.loads((tmp_path / "run/bench.json").read_text()) == numbers
    assert [row["pairs_per_step"] for row in numbers["tokens"]["rows"]] == [1, 2]
    assert [row["pairs"] for row in numbers["pairs"]["rows"]] == [10, 1_000_000]
    for axis in ("tokens", "pairs"):
        for row in numbers[axis]["rows"]:
            assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["tokens"] > 0
        assert set(numbers[axis]["fit"]) == {"exponent", "intercept", "slope", "worst"}
    text = (tmp_path / "run/table.md").read_text()
    assert "Exponent of time in tokens" in text and "Exponent of time in the data's size" in text


def test_one_size_has_no_exponent(tmp_path):
    numbers = measured(tmp_path / "run", *GROWTH, "sizes=[1]", "counts=[10]", "repetitions=1")
    assert numbers["tokens"]["fit"] is None and numbers["pairs"]["fit"] is None
    assert "One size: nothing to fit." in (tmp_path / "run/table.md").read_text()


@pytest.mark.parametrize(
    "word, says",
    [
        ("sizes=[0]", "sizes=[0]: it must be at least 1"),
        ("counts=[]", "name at least one"),
        ("counts=[x]", "counts=['x']"),
        ("completion=[1,2]", "completion=[1, 2]"),
        ("vocabulary=2", "must be at least 8"),
        ("model.lora.rank=2", "model.lora.rank has no effect"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *GROWTH, word)


def test_a_million_pairs_are_nowhere():
    pairs = Generated(Cell("pairs", 512, (4, 9), (3, 6)), 10**6, seed=0)
    references = References(pairs)
    assert len(pairs) == len(references) == 10**6
    for place in (0, 17, 10**6 - 1):
        pair = pairs[place]
        assert pair == pairs[place] and pair.row == place
        assert 4 <= len(pair.prompt) <= 9 and 3 <= len(pair.rejected) <= 6
        assert pair.chosen[-1] == pair.rejected[-1] == 510
        assert len(references[place]) == len(pair.chosen) + len(pair.rejected)
    assert pairs[0] != pairs[1]
    with pytest.raises(IndexError):
        pairs[10**6]


def test_exponents():
    found = fitted([1.0, 2.0, 4.0], [3.0, 5.0, 9.0])
    assert (found["intercept"], found["slope"]) == pytest.approx((1, 2))
    assert found["worst"] == pytest.approx(0, abs=1e-12)
    assert fitted([1.0, 2.0, 4.0], [3.0, 12.0, 48.0])["exponent"] == pytest.approx(2)
    assert fitted([10.0, 100.0], [5.0, 5.0])["exponent"] == pytest.approx(0)
