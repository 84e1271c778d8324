"""what=answers: the contestants' texts are compared for real. Never how long they took."""

import pytest
from benches import TINY, measured, refused
from tiny import policy

from spo_lightning.bench.answers import OURS, contestants, drawn, timed
from spo_lightning.errors import Diverged
from spo_lightning.records.progress import silent

FEW = ("what=answers", *TINY, "answers=3", "max_new_tokens=4", "repetitions=2")


def test_one_round_of_all(tmp_path):
    numbers = measured(tmp_path / "run", *FEW)
    assert numbers["setting"]["tokens"] == 12
    assert len(numbers["seconds"]) == 4 and all(len(s) == 2 for s in numbers["seconds"].values())
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md"}
    assert "transformers, static cache" in (tmp_path / "run/table.md").read_text()


def test_other_texts_end_it():
    prompts = drawn(3, 2, 9, seed=0)
    calls = contestants(policy(), prompts, 2, 4, silent())
    calls["one by one"] = contestants(policy(seed=1), prompts, 1, 4, silent())[OURS]
    with pytest.raises(Diverged, match="one by one: the answer to prompt 1 is"):
        timed(calls, 1, silent())


@pytest.mark.parametrize(
    "word, says",
    [
        ("answers=0", "answers=0: it must be at least 1"),
        ("words=[9,2]", r"words=[9, 2]: [least, most]"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *FEW, word)
