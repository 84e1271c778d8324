"""CHES: the paper's definition token by token, whatever the padding; the filter; ches.csv."""

import csv
import logging
from contextlib import nullcontext

import pytest
import torch
from conftest import SMALL
from fitting import PAD_ID, config
from tiny import in_float64, lora, policy, random_pairs

from spo_lightning.data.batch import collate
from spo_lightning.data.sets import Pairs
from spo_lightning.evaluation import ches
from spo_lightning.models.scorer import Scorer
from spo_lightning.train import train


def slow(lm, pair):
    """CHES and its normalised form from two unpadded forwards of one answer each, in float64."""
    sums = []
    for response in (pair.chosen, pair.rejected):
        with torch.no_grad():
            states = lm.base_model(torch.tensor([pair.prompt + response])).last_hidden_state[0]
        places = range(len(pair.prompt) - 1, len(pair.prompt) + len(response) - 1)
        sums.append(sum(states[place].double() for place in places))
    (chosen, rejected), n_w, n_l = sums, len(pair.chosen), len(pair.rejected)
    plain = chosen @ rejected - chosen @ chosen
    return [float(plain), float(chosen @ rejected / (n_w * n_l) - chosen @ chosen / n_w**2)]


def scores(lm, pairs, shared=True, batch_size=5):
    return ches.scores(
        Scorer(lm, shared),
        Pairs(pairs, None, PAD_ID),
        batch_size=batch_size,
        precision=nullcontext,
    )


@pytest.mark.parametrize("name", ["llama-grouped", "qwen2", "gpt2"])
@pytest.mark.parametrize("shared", [True, False])
def test_equals_the_definition(monkeypatch, name, shared):
    in_float64(monkeypatch)
    lm, pairs = policy(name).lm, random_pairs(12)
    expected = torch.tensor([slow(lm, pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(scores(lm, pairs, shared), expected, rtol=1e-6, atol=1e-9)


def test_float32_model_float64_sums():
    lm, pairs = policy(dtype="float32").lm, random_pairs(12)
    found = scores(lm, pairs)
    assert found.dtype == torch.float64
    expected = torch.tensor([slow(lm, pair) for pair in pairs], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_hand_worked_pair():
    # E+ = (3, 1) of 2 tokens, E- = (2, -4) of 4: <E+,E-> = 2, |E+|^2 = 10
    sums = torch.tensor([[[3.0, 1.0], [2.0, -4.0]]], dtype=torch.float64)
    found = ches.ches(sums, torch.tensor([[2, 4]]))
    assert found.tolist() == [[2 - 10, 2 / 8 - 10 / 4]]


def test_the_first_state_is_the_prompts_and_the_last_is_left_out():
    """With one token per answer both are predicted by the prompt's last state: CHES is 0."""
    pairs = [pair for pair in random_pairs(40, longest=2)]
    single = [p for p in pairs if len(p.chosen) == len(p.rejected) == 1]
    assert single
    found = scores(policy().lm, single)
    torch.testing.assert_close(found, torch.zeros_like(found), rtol=0, atol=1e-9)


def test_batch_and_padding_do_not_matter():
    lm, pairs = policy().lm, random_pairs(9)
    torch.testing.assert_close(scores(lm, pairs, batch_size=1), scores(lm, pairs, batch_size=9))


def test_hidden_sums_have_no_gradient():
    assert (
        not Scorer(policy().lm, True).hidden_sums(collate(random_pairs(2), PAD_ID)).requires_grad
    )


def test_fresh_adapters_change_nothing():
    plain, adapted = policy(), lora(policy())
    pairs = random_pairs(6)
    torch.testing.assert_close(scores(plain.lm, pairs), scores(adapted.lm, pairs))


def test_the_highest_go():
    pairs = Pairs(random_pairs(10), [torch.full((2,), float(n)) for n in range(10)], PAD_ID)
    normalised = torch.tensor([3.0, 9, 1, 8, 2, 7, 0, 6, 4, 5])
    kept = ches.without_highest(pairs, normalised, 0.25)  # 2.5, rounded down
    assert [pair.row for pair in kept.pairs] == [0, 2, 4, 5, 6, 7, 8, 9]
    assert kept.references is not None
    assert [int(r[0]) for r in kept.references] == [0, 2, 4, 5, 6, 7, 8, 9]
    assert len(ches.without_highest(pairs, normalised, 0.09)) == 10
    assert len(ches.without_highest(pairs, torch.zeros(10), 0.5)) == 5


def table(directory):
    with (directory / "ches.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_drops_the_highest_and_says_so(tmp_path, cache, caplog):
    words = (*SMALL, cache, "loss=dpo", "max_steps=4", "diagnostics.ches.every_n_steps=3")
    train(config(*words), tmp_path / "all")
    every = table(tmp_path / "all")
    start = [row for row in every if row["step"] == "0"]
    assert [row["step"] for row in every] == ["0"] * len(start) + ["3"] * len(start)
    assert len({row["row"] for row in start}) == len(start)
    caplog.set_level(logging.INFO)
    train(config(*words, "data.drop_high_ches=0.2"), tmp_path / "fewer")
    gone = int(0.2 * len(start))
    assert gone > 2
    assert f"{gone} of {len(start)} dropped, those of highest normalised CHES" in caplog.text
    ranked = sorted(start, key=lambda row: float(row["ches_normalised"]))[: len(start) - gone]
    left = [row for row in table(tmp_path / "fewer") if row["step"] == "0"]
    assert {row["row"] for row in left} == {row["row"] for row in ranked}
