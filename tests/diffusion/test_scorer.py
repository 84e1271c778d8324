"""The surrogate against a loop over images and draws, and Diffusion-DPO against its paper."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from denoisers import PLACES, dit, pairs, scheduler, scorer, unet

from spo_lightning import losses
from spo_lightning.diffusion.batch import Draws
from spo_lightning.diffusion.objective import Schedule, constant, min_snr
from spo_lightning.diffusion.scorer import reference_of
from spo_lightning.errors import UserError

KINDS = ("epsilon", "v_prediction", "sample", "flow")


def by_hand(made, given, kind, scale, weights):
    """One image, one draw at a time, with the scheduler's own noising and target."""
    theirs, batch, found = scheduler(kind), given.batch(range(len(given))), []
    for at, pair in enumerate(given.pairs):
        for _, name in pair.images:
            image, total = given.latents[name][None], 0.0
            for k in range(batch.times.shape[1]):
                place, noise = batch.times[at, k], batch.noise[at, k][None]
                if kind == "flow":
                    sigma, time = theirs.sigmas[place].double(), theirs.timesteps[place]
                    noisy, target = (1 - sigma) * image + sigma * noise, noise - image
                else:
                    time = place
                    noisy = theirs.add_noise(image, noise, place[None])
                    targets = {
                        "epsilon": noise,
                        "sample": image,
                        "v_prediction": theirs.get_velocity(image, noise, place[None]),
                    }
                    target = targets[kind]
                told = {n: it[None] for n, it in given.conditions[pair.prompt].items()}
                said = made.model(noisy, time[None], **told).sample[:, :3]
                total += weights[place] * (target - said).square().sum() / image.numel()
            found.append(-scale * total / batch.times.shape[1])
    return torch.stack(found)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", [unet, dit])
def test_the_surrogate_is_the_loop(make, kind):
    weight = partial(min_snr, gamma=5.0)
    made, given = scorer(make, kind, weight=weight), pairs(make)
    got = made(given.batch(range(3)))
    assert got.sums.shape == (3, 2) and (got.counts == 1).all()
    wanted = by_hand(made, given, kind, 30.0, weight(made.schedule).double())
    torch.testing.assert_close(got.logps, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow"])
def test_min_snr_is_the_papers(kind):
    schedule = Schedule.of(scheduler(kind))
    ratio = (schedule.image / schedule.noise) ** 2
    # in errors of the image every target counts min(SNR, gamma)
    wanted = {
        "epsilon": ratio.clamp(max=5) / ratio,
        "v_prediction": ratio.clamp(max=5) / (ratio + 1),
        "flow": ratio.clamp(max=5) * schedule.noise**2,
    }[kind]
    seen = schedule.image > 0  # all noise has no signal
    torch.testing.assert_close(min_snr(schedule, gamma=5.0)[seen], wanted[seen], rtol=1e-4, atol=0)


def test_diffusion_dpo_is_the_papers():
    """-log sigmoid(-beta T w (d_w - d_l)) of squared errors at the same draws."""
    beta, given = 0.7, pairs()
    policy, reference = scorer(seed=0), scorer(seed=1)
    batch = given.batch(range(3))
    theirs = {name: made(batch) for name, made in (("p", policy), ("r", reference))}
    loss = losses.dpo(theirs["p"], theirs["r"], beta=beta, label_smoothing=0.0)
    errors = {name: -it.sums / 30.0 for name, it in theirs.items()}
    d = errors["p"] - errors["r"]
    wanted = -torch.log(torch.sigmoid(-beta * 30.0 * (d[:, 0] - d[:, 1])))
    torch.testing.assert_close(loss, wanted)


def test_the_check_number():
    """beta T w = 10, d_w = -0.1, d_l = 0.05: u = 1.5."""
    given = pairs(count=1)
    made = scorer(scale=1.0)(given.batch([0]))
    errors = {
        "policy": torch.tensor([0.4, 0.55], dtype=torch.float64),
        "reference": torch.tensor([0.5, 0.5], dtype=torch.float64),
    }
    sides = {name: replace(made, logps=-100 * it) for name, it in errors.items()}
    loss = losses.dpo(**sides, beta=0.1, label_smoothing=0.0)
    assert loss.item() == pytest.approx(0.201413278, abs=1e-8)


def test_where_policy_is_reference_it_is_ln_2():
    made, batch = scorer(), pairs().batch(range(3))
    reference = reference_of(made)
    loss = losses.dpo(made(batch), reference(batch), beta=0.1, label_smoothing=0.0)
    torch.testing.assert_close(loss, torch.full((3,), math.log(2)).double())


def test_a_better_denoised_image_is_likelier():
    made, batch = scorer(), pairs().batch(range(3))
    before = made(batch)
    optimizer = torch.optim.Adam(made.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        (-made(batch).chosen.mean()).backward()
        optimizer.step()
    assert (made(batch).chosen > before.chosen).all()


def test_adapters_alone_learn_and_the_reference_is_without_them():
    from peft import LoraConfig, inject_adapter_in_model

    made, batch = scorer(), pairs().batch(range(3))
    plain = made(batch).sums.detach()
    settings = LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=True)
    inject_adapter_in_model(settings, made.model)
    reference = reference_of(made)
    training = {name for name, p in made.named_parameters() if p.requires_grad}
    assert training and all("lora_" in name for name in training)
    torch.testing.assert_close(reference(batch).sums, plain)
    assert {name for name, p in made.named_parameters() if p.requires_grad} == training
    loss = losses.dpo(made(batch), reference(batch), beta=0.1, label_smoothing=0.0).mean()
    loss.backward()
    assert math.isclose(loss.item(), math.log(2), rel_tol=1e-9)
    moved = {name for name, p in made.named_parameters() if p.grad is not None}
    assert moved == training
    assert any(p.grad.abs().max() > 0 for p in made.parameters() if p.grad is not None)
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name in training:
                p.add_(0.1)
    assert not torch.allclose(made(batch).sums, plain)
    torch.testing.assert_close(reference(batch).sums, plain)


def test_a_frozen_copy_stays():
    made, batch = scorer(), pairs().batch(range(3))
    reference, before = reference_of(made), made(batch).sums.detach()
    with torch.no_grad():
        for p in made.parameters():
            p.add_(0.01)
    torch.testing.assert_close(reference(batch).sums, before)
    assert all(p.requires_grad for p in made.parameters())


def test_draws_are_of_seed_step_and_row():
    given = replace(pairs(count=4), draws=None)
    draws, whole = Draws(0, 3, PLACES), given.batch(range(4))
    at_once = draws.of(whole, 5)
    apart = [draws.of(given.batch([at]), 5) for at in range(4)]
    assert torch.equal(at_once.noise, torch.cat([one.noise for one in apart]))
    assert torch.equal(at_once.times, torch.cat([one.times for one in apart]))
    for other in (draws.of(whole, 6), Draws(1, 3, PLACES).of(whole, 5)):
        assert not torch.equal(at_once.noise, other.noise)
    assert not torch.equal(at_once.noise[0], at_once.noise[1])


def test_times_are_spread_evenly():
    given = replace(pairs(count=3), draws=None)
    times = torch.cat([Draws(0, 4, PLACES).of(given.batch([0]), n).times for n in range(400)])
    assert times.min() >= 0 and times.max() < PLACES
    quarter = PLACES // 4
    assert (times // quarter == torch.arange(4)).all()  # one in each
    counts = times.flatten().bincount(minlength=PLACES).double() / times.numel() * PLACES
    assert (counts - 1).abs().max() < 0.5


def test_chosen_only_keeps_the_draws():
    made, batch = scorer(), pairs().batch(range(3))
    torch.testing.assert_close(made(batch.chosen_only).chosen, made(batch).chosen)
    assert (made(batch.chosen_only).counts[:, 1] == 0).all()


def test_what_has_no_schedule_is_refused():
    from diffusers import EDMEulerScheduler

    with pytest.raises(UserError, match="EDMEulerScheduler has neither"):
        Schedule.of(EDMEulerScheduler())
    strange = scheduler("epsilon")
    strange.register_to_config(prediction_type="score")
    with pytest.raises(UserError, match="predicts score"):
        Schedule.of(strange)


def test_every_time_counts_one():
    assert torch.equal(constant(Schedule.of(scheduler("epsilon"))), torch.ones(PLACES))


def test_a_large_margin_is_finite():
    made = scorer()(pairs(count=1).batch([0]))
    far = replace(made, logps=torch.tensor([0.0, -1e6]).double())
    near = replace(made, logps=torch.zeros(2).double())
    loss = losses.dmpo(far, near, beta=0.1, alpha=1e-3)
    assert torch.isfinite(loss).all()
