"""Probability evolution: predicted, idealised and measured change of a step's pairs."""

from functools import partial

import pytest
import torch
from fitting import PAD_ID, scored
from tiny import in_float64, lora, policy, random_pairs
from watching import setting, table, watched

from spo_lightning.data.batch import collate
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.training.callbacks.evolution import Evolution, directional


@pytest.mark.parametrize("name", ["llama", "llama-grouped", "qwen2", "gpt2", "gemma2"])
@pytest.mark.parametrize("shared", [True, False])
def test_the_directional_derivative_equals_finite_differences(monkeypatch, name, shared):
    in_float64(monkeypatch)
    attention = "eager" if name == "gemma2" else "auto"
    check_directional(policy(name, attention=attention).lm, shared)


def check_directional(lm, shared=True):
    scorer, batch = Scorer(lm, shared), collate(random_pairs(4), PAD_ID)
    seeded = torch.Generator().manual_seed(3)
    at = {n: p.detach().clone() for n, p in scorer.named_parameters() if p.requires_grad}
    along = {n: torch.randn(p.shape, generator=seeded, dtype=p.dtype) for n, p in at.items()}
    value, change = directional(scorer, batch, at, along)
    assert not change.requires_grad and not value.requires_grad

    def moved(length):
        with torch.no_grad():
            there = {n: p + length * along[n] for n, p in at.items()}
            return torch.func.functional_call(scorer, there, (batch,)).logps

    h = 1e-5
    central = (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)
    torch.testing.assert_close(value, moved(0.0), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(change, central, rtol=1e-6, atol=1e-6 * float(change.abs().max()))


def test_the_directional_derivative_of_adapters(monkeypatch):
    in_float64(monkeypatch)
    made = lora(policy())
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in made.lm.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=seeded, dtype=p.dtype))
    check_directional(made.lm)


def test_the_directional_derivative_through_checkpoints(monkeypatch):
    in_float64(monkeypatch)
    lm = policy().lm
    lm.train()
    lm.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(Scorer, "_rows", lambda self: 7)
    check_directional(lm)


def test_the_sgd_form_is_that_of_one_pair(tmp_path):
    """eta (c_w |g_w|^2 - c_l <g_w, g_l>) and eta (c_w <g_w, g_l> - c_l |g_l|^2)."""
    made, lr = policy(), 1e-3
    given = scored(made.lm, random_pairs(1, seed=5), shift=lambda n, r: -0.1 * r)
    scorer, batch = Scorer(made.lm, True), given.batch([0])
    ratios, reference = scorer(batch), reference_logps(batch)
    theta = [p for p in scorer.parameters() if p.requires_grad]

    def flat(value):
        found = torch.autograd.grad(value, theta, retain_graph=True)
        return torch.cat([g.flatten() for g in found])

    g_w, g_l = flat(ratios.chosen.sum()), flat(ratios.rejected.sum())
    h = (ratios.gap - reference.gap).sum().item()
    c = 0.1 * torch.sigmoid(torch.tensor(-0.1 * h, dtype=torch.float64))
    expected = lr * c * torch.stack([g_w @ g_w - g_w @ g_l, g_w @ g_l - g_l @ g_l])
    diagnostic = Evolution(setting(tmp_path), every_n_steps=1)
    plain = partial(torch.optim.SGD, lr=lr)
    _, rows = watched(diagnostic, made, given=given, steps=1, batch_size=1, optimizer=plain)
    sides = ("chosen", "rejected")
    for form in ("sgd", "predicted"):  # the optimizer is plain SGD, unclipped
        found = [rows[0][f"train/evolution/{form}/{side}"] for side in sides]
        assert found == pytest.approx(expected.tolist(), rel=1e-6)
    assert "train/evolution/correlation/chosen" not in rows[0]  # of one pair


@pytest.mark.parametrize("words", [("loss=dpo", "solver=unrolled"), ("loss=spo",)])
def test_displacement_and_penalty_are_in_the_prediction(tmp_path, words):
    """Under plain SGD the step is the sgd form, whatever the solver does."""
    diagnostic = Evolution(setting(tmp_path), every_n_steps=1)
    _, rows = watched(diagnostic, policy(), words, steps=2)
    for row in rows:
        for side in ("chosen", "rejected"):
            sgd = row[f"train/evolution/sgd/{side}"]
            assert row[f"train/evolution/predicted/{side}"] == pytest.approx(sgd, rel=1e-7)
            assert abs(sgd) > 1e-6


def test_evolution_does_not_depend_on_microbatches(tmp_path):
    found = []
    for micro in (8, 3):
        (tmp_path / str(micro)).mkdir()
        diagnostic = Evolution(setting(tmp_path / str(micro)), every_n_steps=1)
        _, rows = watched(diagnostic, policy(), steps=2, micro=micro)
        found.append((rows, table(tmp_path / str(micro) / "evolution.csv")))
    for name in Evolution(setting(), every_n_steps=1).names:
        assert found[0][0][1][name] == pytest.approx(found[1][0][1][name], rel=1e-7), name
    for one, two in zip(found[0][1], found[1][1], strict=True):
        assert one == pytest.approx(two, rel=1e-6, abs=1e-12)


def test_measured_is_the_change_of_the_log_probabilities(tmp_path):
    """And mass_elsewhere, both_fall, correlation and slope are what the rows say."""
    made = policy()
    given = scored(made.lm, random_pairs(8, longest=2))
    with torch.no_grad():
        before = Scorer(made.lm, True)(given.batch(range(8))).sums
    diagnostic = Evolution(setting(tmp_path), every_n_steps=1)
    _, rows = watched(diagnostic, made, given=given, steps=1)
    with torch.no_grad():
        after = Scorer(made.lm, True)(given.batch(range(8))).sums
    found = sorted(table(tmp_path / "evolution.csv"), key=lambda row: row["row"])
    for place, side in enumerate(("chosen", "rejected")):
        measured = torch.tensor([row[f"measured_{side}"] for row in found], dtype=torch.float64)
        predicted = torch.tensor([row[f"predicted_{side}"] for row in found], dtype=torch.float64)
        torch.testing.assert_close(measured, (after - before)[:, place], rtol=1e-8, atol=1e-10)
        pair = torch.stack([predicted, measured])
        said = {
            name: rows[0][f"train/evolution/{name}/{side}"] for name in ("correlation", "slope")
        }
        assert said["correlation"] == pytest.approx(float(pair.corrcoef()[0, 1]), rel=1e-9)
        slope = float(predicted @ measured / (predicted @ predicted))
        assert said["slope"] == pytest.approx(slope, rel=1e-9)
    lost = (before.exp() - after.exp()).sum(1).mean()
    assert rows[0]["train/evolution/mass_elsewhere"] == pytest.approx(float(lost), rel=1e-8)
    share = ((after - before) < 0).all(1).double().mean()
    assert rows[0]["train/evolution/both_fall"] == float(share)


@pytest.mark.slow
def test_first_order_holds_in_training_at_a_small_rate(tmp_path):
    """200 steps of AdamW at 1e-5 on a float32 Llama: correlation >= 0.95, slope within 1%."""
    adam = partial(torch.optim.AdamW, lr=1e-5)
    made = policy(dtype="float32", initializer_range=0.1, num_hidden_layers=1)
    diagnostic = Evolution(setting(tmp_path), every_n_steps=1)
    given = scored(made.lm, random_pairs(64))
    _, rows = watched(diagnostic, made, given=given, steps=200, batch_size=4, optimizer=adam)
    assert len(rows) == 200
    found = table(tmp_path / "evolution.csv")
    assert len(found) == 200 * 4
    for side in ("chosen", "rejected"):
        pair = [[row[f"{form}_{side}"] for row in found] for form in ("predicted", "measured")]
        predicted, measured = torch.tensor(pair, dtype=torch.float64)
        assert torch.stack([predicted, measured]).corrcoef()[0, 1] >= 0.999
        assert float(predicted @ measured / (predicted @ predicted)) == pytest.approx(1, abs=0.01)
