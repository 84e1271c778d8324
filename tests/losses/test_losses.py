"""Each loss against hand-worked numbers, and what single losses promise."""

import math

import pytest
import sources
import torch
from pairs import pairs
from sources import HALF, with_margins

from spo_lightning import losses
from spo_lightning.losses import Moments

# l_w, l_l = -4, -7; r_w, r_l = -5, -6; n_w, n_l = 2, 4
LENGTHS = (2, 4)
REFERENCE = pairs(-5.0, -6.0, *LENGTHS)

# name, hyper-parameters, value, d value / d l_w (None: not given there)
BY_HAND = [
    ("dpo", dict(beta=0.1, label_smoothing=0.0), 0.598138869, -0.045016600),
    ("dpo", dict(beta=0.1, label_smoothing=0.1), 0.618138869, None),
    ("ipo", dict(beta=0.1), 9.0, -6.0),
    ("ipo_norm", dict(beta=0.1), 18.0625, -4.25),
    ("hinge", dict(beta=0.05), 0.9, -0.05),
    ("hinge", dict(beta=0.1), 0.8, -0.1),
    ("sft", dict(beta=0.1), 2.0, -0.5),
    ("simpo", dict(beta=2.0, gamma_beta_ratio=0.5), 1.701413278, -0.817574476),
    ("simpo", dict(beta=2.5, gamma_beta_ratio=0.55), 2.126928011, None),
    ("cpo", dict(beta=0.1, alpha=1.0), 2.554355244, -0.542555748),
    ("orpo", dict(beta=0.1), 2.085175748, None),
    ("dpop", dict(beta=0.3, dpop_lambda=50.0), 0.437487950, -0.106303108),
    ("rdpo", dict(beta=0.1, alpha=0.05), 0.644396660, -0.047502081),
    ("rpo", dict(beta=0.01, eta=0.005), 0.683397180, None),
    ("cal_dpo", dict(beta=0.1, coefficient=0.5), 16.126928011, None),
    ("alpha_dpo", dict(beta=10.0, gamma_beta_ratio=0.4, alpha=0.05), 7.000911466, -4.995444744),
    ("alpha_dpo", dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2), 2.694936200, None),
    ("alpha_dpo", dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.0), 2.237822279, None),
    ("robust", dict(beta=0.1, label_smoothing=0.1), 0.573138869, None),
    ("sigmoid_norm", dict(beta=0.1), 0.656350141, None),
    ("rso_hinge_norm", {}, 0.9, None),
    ("rso_sigmoid_norm", {}, 0.644396660, None),
    ("slic", {}, 0.85, None),
    ("exo_pair", dict(beta=0.1), 2.422014621, None),
    ("dmpo", dict(beta=0.1), 2.422014621, None),  # the same form
    ("nca_pair", dict(beta=0.1), 1.338793320, None),
    ("bco_pair", dict(beta=0.1), 1.288793320, None),
    ("sppo_hard", dict(beta=0.1), 32.0, None),
    ("aot", dict(beta=0.1), 0.598138869, None),
    ("aot_unpaired", dict(beta=0.1), 0.598138869, None),
    ("apo_zero", dict(beta=0.1), 0.950041625, None),
    ("apo_down", dict(beta=0.1), 0.975145190, None),
    ("discopop", dict(beta=0.1, tau=0.05), 0.814763141, None),
    ("kto_pair", dict(beta=0.1), 0.462593408, None),
    ("odpo", dict(beta=0.1), 0.969816904, None),  # scores 2 apart
    ("xpo", dict(beta=0.1, alpha=0.05), 0.248138869, None),  # DPO's, and .05 times -7
    ("tdpo1", dict(beta=0.1), 0.616343773, None),  # divergences 0.3 and 0.7
    ("tdpo2", dict(beta=0.1, alpha=0.5), 0.607191725, None),
    # a row with both answers: the mean of 0.475020813 and 0.475020813
    ("apo_zero_unpaired", dict(beta=0.1), 0.475020813, None),
]


def value(name, chosen, rejected, lengths=LENGTHS, moments=HALF, **knobs):
    policy = with_margins(pairs(chosen, rejected, *lengths), [2.0], (0.15, 0.175))
    return sources.value(name, policy, REFERENCE, moments, **knobs)


@pytest.mark.parametrize(("name", "knobs", "expected", "slope"), BY_HAND)
def test_hand_worked(name, knobs, expected, slope):
    chosen = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    (found,) = value(name, chosen, -7.0, **knobs)
    assert found.item() == pytest.approx(expected, abs=1e-9)
    if slope is not None:
        (along,) = torch.autograd.grad(found, chosen)
        assert along.item() == pytest.approx(slope, abs=1e-9)


def test_dpop_with_a_fallen_chosen_answer():
    chosen = torch.tensor(-5.5, dtype=torch.float64, requires_grad=True)
    (found,) = value("dpop", chosen, -7.0, beta=0.3, dpop_lambda=50.0)
    (along,) = torch.autograd.grad(found, chosen)
    assert found.item() == pytest.approx(7.350642386, abs=1e-9)
    assert along.item() == pytest.approx(-15.290174651, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("dpo", dict(label_smoothing=0.0), math.log(2)),
        ("dpo", dict(label_smoothing=0.3), math.log(2)),
        ("hinge", {}, 1.0),
        ("ipo", {}, 25.0),
        ("ipo_norm", {}, 25.0),
        ("dpop", dict(dpop_lambda=5.0), math.log(2)),
        ("rpo", dict(eta=0.0), math.log(2)),
        ("cal_dpo", dict(coefficient=0.5), math.log(2) + 25.0),
        ("robust", dict(label_smoothing=0.3), math.log(2)),
        ("sigmoid_norm", {}, math.log(2)),
        ("exo_pair", dict(label_smoothing=1e-3), -math.log(2) - 0.5 * math.log(1e-3 * 0.999)),
        ("dmpo", dict(alpha=1e-3), -math.log(2) - 0.5 * math.log(1e-3 * 0.999)),
        ("nca_pair", {}, 2 * math.log(2)),
        ("bco_pair", {}, 2 * math.log(2)),
        ("sppo_hard", {}, 50.0),
        ("aot", {}, math.log(2)),
        ("aot_unpaired", {}, math.log(2)),
        ("apo_zero", {}, 1.0),
        ("apo_down", {}, 1.0),
        ("discopop", {}, 0.5 * math.log(2) + 0.5),
        ("kto_pair", {}, 0.5),
    ],
)
def test_where_policy_is_reference(name, knobs, expected):
    (found,) = value(name, -5.0, -6.0, beta=0.1, **knobs)
    assert found.item() == pytest.approx(expected, abs=1e-9)


def test_torchtune_case():
    policy = pairs([-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0], [1, 9, 3], [2, 5, 7])
    reference = pairs([-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1], [1, 9, 3], [2, 5, 7])
    found = losses.dpo(policy, reference, beta=0.1, label_smoothing=0.0)
    expected = torch.tensor([0.693147, 0.313262, 0.126928], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_alpha_dpo_takes_no_gradient_through_its_target():
    # at the same target SimPO has the same gradient
    z, chosen = 1.0, torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    (shifted,) = value("alpha_dpo", chosen, -7.0, beta=2.5, gamma_beta_ratio=0.3, alpha=0.2)
    (plain,) = value("simpo", chosen, -7.0, beta=2.5, gamma_beta_ratio=0.3 + 0.2 * z)
    found, expected = (torch.autograd.grad(it, chosen)[0] for it in (shifted, plain))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


def test_orpo_survives_a_certain_answer():
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (found,) = value("orpo", chosen, -7.0, beta=0.1)
    (along,) = torch.autograd.grad(found, chosen)
    assert found.isfinite() and along.isfinite()


def test_label_smoothing_of_a_half_is_symmetric():
    here = value("dpo", -4.0, -7.0, beta=0.4, label_smoothing=0.5)
    mirrored = value("dpo", -6.0, -5.0, beta=0.4, label_smoothing=0.5)  # margin -2 instead of 2
    torch.testing.assert_close(here, mirrored, rtol=1e-14, atol=0)


def test_moments_before_and_after_updates():
    assert losses.moments_of({})[:2] == (0.0, 1.0)
    once = losses.update({}, **seen(3.0, 0.5))
    assert losses.moments_of(once)[:2] == pytest.approx((3.0, 0.5))  # the bias is corrected
    twice = losses.update(once, **seen(1.0, 1.5))
    moments = losses.moments_of(twice)
    assert moments[:2] == pytest.approx(((0.9 * 3 + 1) / 1.9, (0.45 + 1.5) / 1.9))
    assert moments[2:4] == pytest.approx(((0.9 * 30 + 10) / 1.9, (4.5 + 15) / 1.9))
    assert (moments.weight, moments.steps) == (pytest.approx(0.19), 2)
    assert losses.update(twice, **seen(1.0, math.nan)) == twice  # one pair has no deviation


def seen(mean, spread):
    """Of one batch, whose summed margins are ten times those per token."""
    summed = {"summed_mean": 10 * mean, "summed_spread": 10 * spread}
    return {"mean": mean, "spread": spread, **summed}


def test_a_batch_counts_before_it_is_in_the_state():
    margins = torch.tensor([1.0, 2.0, 6.0], dtype=torch.float64)
    state = losses.update({}, **seen(0.4, 0.1))
    after = {"summed_mean": 3.0, "summed_spread": margins.std().item()}
    whole = losses.moments_of(losses.update(state, mean=0.0, spread=0.0, **after))
    ahead = losses.moments_of(state).with_batch(margins)
    assert ahead == pytest.approx((whole.summed_mean, whole.summed_spread))
    assert losses.moments_of({}).with_batch(margins) == pytest.approx((3.0, margins.std().item()))


def test_beta_dpo_by_hand():
    """M = 0.5 with this pair in it: beta is 0.1 (1 + 0.6 (2 - 0.5)) = 0.19."""
    before = Moments(0.0, 1.0, summed_mean=0.3 / 0.9, summed_spread=1.0, weight=1.0)
    (found,) = value("beta_dpo", -4.0, -7.0, moments=before, beta=0.1)
    assert found.item() == pytest.approx(0.521089614, abs=1e-9)


def test_beta_dpo_draws_the_pairs_it_keeps():
    """By the step and nothing else; near pairs rather; what is kept counts for all."""
    margins = torch.tensor([0.0, 0.1, -0.1, 0.2, 5.0], dtype=torch.float64)
    zeros, ones = torch.zeros(5, dtype=torch.float64), torch.ones(5).long()
    both = [pairs(chosen, zeros - 1, ones, ones) for chosen in (margins - 1, zeros - 1)]
    kept = torch.zeros(5)
    for step in range(200):
        moments = Moments(0.0, 1.0, 0.0, 1.0, weight=0.999, steps=step)
        found = sources.value("beta_dpo", *both, moments, filtered=0.4)
        again = sources.value("beta_dpo", *both, moments, filtered=0.4)
        assert torch.equal(found, again) and int((found > 0).sum()) == 3
        kept += (found > 0).float()
    assert kept[4] < 0.1 * kept[:4].min()
    assert kept[:4].max() < 200  # a draw, not the nearest
    assert found[found > 0].max() < math.log(2) * 5 / 3 * 1.1


def test_alpha_dpo_floors_the_spread():
    knobs = dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2)
    still = value("alpha_dpo", -4.0, -7.0, moments=Moments(0.75, 0.0), **knobs)
    plain = value("simpo", -4.0, -7.0, beta=2.5, gamma_beta_ratio=0.6)
    torch.testing.assert_close(still, plain)  # the margin is the mean, whatever the spread
    assert value("alpha_dpo", -4.0, -7.0, moments=Moments(0.0, 0.0), **knobs).isfinite().all()


def test_aot_on_a_batch_of_two():
    policy, reference = (pairs(*it, [2, 3], [4, 1]) for it in TWO)
    hand = {"aot": 0.745643025, "aot_unpaired": 0.744396660, "dpo": 0.755577061}
    for name, expected in hand.items():
        found = sources.value(name, policy, reference, beta=0.1).mean()
        assert found.item() == pytest.approx(expected, abs=1e-9), name


# sums of chosen and rejected answers under policy and reference, methods 3.7
TWO = (([-4.0, -6.0], [-7.0, -5.0]), ([-5.0, -4.0], [-6.0, -7.0]))


def test_two_sided_turns_back_in_the_middle():
    """At the margin halfway between its two bounds the slopes cancel."""
    chosen = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)  # margin 2
    (found,) = value("two_sided", chosen, -7.0, beta=0.1, lower=-1.0, upper=5.0)
    assert torch.autograd.grad(found, chosen)[0].item() == pytest.approx(0.0, abs=1e-12)


def test_smooth_hinge_anchors_the_chosen_answer():
    (found,) = value("smooth_hinge", -4.0, -7.0, beta=1.0, alpha=2.0)
    # gap -2 + 1.75 a token; log-ratio of the chosen answer 0.5 a token
    assert found.item() == pytest.approx(1.25 + 2 * math.log1p(math.exp(0.5)), abs=1e-12)
