"""The nets of guided design: noise of a Gaussian, the gradient by differences, steps by hand."""

import math

import pytest
import torch

from spo_lightning.design.guided import sampled
from spo_lightning.design.preference import gradient, log_preferred
from spo_lightning.studies.denoiser import Schedule, Timed, loss
from spo_lightning.studies.fitting import Learning

MIDDLE, WIDE = torch.tensor([0.3, -0.2]), torch.tensor([0.1, 0.3])  # of a Gaussian
SCHEDULE = Schedule(times=60, first=1e-3, last=0.25)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(denoiser, **more):
    how = {"count": 4000, "weight": 0.0, "clamp_every": 1000, "draws": seeded()}
    return sampled(denoiser, None, SCHEDULE, torch.zeros(2), **{**how, **more})


def exact(noised, times):
    """E[noise | x_t]: x_t is normal around sqrt(kept) m with variance kept s^2 + 1 - kept."""
    kept = SCHEDULE.kept[times].float().unsqueeze(1)
    variance = kept * WIDE**2 + 1 - kept
    return (1 - kept).sqrt() * (noised - kept.sqrt() * MIDDLE) / variance


def test_the_steps_back_of_a_gaussian_end_in_it():
    found = drawn(exact)
    torch.testing.assert_close(found.mean(0), MIDDLE, atol=0.02, rtol=0)
    # the variance of a step, beta, is that of a wide design: a narrow one ends a little wide
    torch.testing.assert_close(found.std(0), WIDE, atol=0.03, rtol=0)


def test_a_net_learns_the_noise_of_a_gaussian():
    draws = seeded(1)
    designs = MIDDLE + WIDE * torch.randn(2000, 2, generator=draws)
    net = Learning(32, 2, 300, 128, 3e-3, 0.0).net(2, 2, 0)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    for _ in range(300):
        batch = designs[torch.randint(len(designs), (128,), generator=draws)]
        optimizer.zero_grad()
        loss(net, SCHEDULE, batch, draws).backward()
        optimizer.step()
    with torch.no_grad():
        times, noise = SCHEDULE.drawn(designs, draws)
        noised = SCHEDULE.noised(designs, times, noise)
        away = (net(noised, times) - exact(noised, times)).square().mean()
        assert away < 0.02 < (noise - exact(noised, times)).square().mean()
    found = drawn(net, count=2000)
    torch.testing.assert_close(found.mean(0), MIDDLE, atol=0.06, rtol=0)
    torch.testing.assert_close(found.std(0), WIDE, atol=0.08, rtol=0)


def test_the_gradient_is_that_of_differences():
    net = Timed(3, 1, 8, 2).double()
    draws = seeded(2)
    noised, other = torch.randn(2, 5, 3, generator=draws, dtype=torch.float64)
    times = torch.arange(5)
    found, step = gradient(net, noised, other, times), 1e-5
    for column in range(3):
        along = torch.zeros(3, dtype=torch.float64)
        along[column] = step
        with torch.no_grad():
            ends = [log_preferred(net, noised + s * along, other, times) for s in (1, -1)]
        torch.testing.assert_close(
            found[:, column], (ends[0] - ends[1]) / (2 * step), atol=1e-9, rtol=1e-6
        )


def test_the_two_answers_about_a_pair_add_to_one():
    net, draws = Timed(3, 1, 8, 1), seeded(3)
    one, other = torch.randn(2, 5, 3, generator=draws)
    both = (log_preferred(net, *pair, torch.arange(5)) for pair in ((one, other), (other, one)))
    torch.testing.assert_close(sum(it.exp() for it in both), torch.ones(5))


@pytest.mark.parametrize("weight", [0.0, 2.0])
def test_two_guided_steps_by_hand(weight):
    """A denoiser that sees no noise and a score a x: grad log p = sigma(a (ref - x)) a. The
    reference is the known design at the first step and what x was at the second."""
    schedule, slope, known = Schedule(times=2, first=0.1, last=0.2), 1.5, torch.tensor([0.25])
    found = sampled(
        lambda x, t: torch.zeros_like(x),
        lambda x, t: slope * x,
        schedule,
        known,
        count=3,
        weight=weight,
        clamp_every=5,
        draws=seeded(4),
    )
    draws = seeded(4)
    first, noise = (torch.randn(3, 1, generator=draws) for _ in range(2))

    def along(x, reference):
        return weight * torch.sigmoid(slope * (reference - x)) * slope

    second = first / math.sqrt(0.8) + math.sqrt(0.2) * noise + 0.2 * along(first, known)
    last = second / math.sqrt(0.9) + 0.1 * along(second, first)
    torch.testing.assert_close(found, last.clamp(-1, 1))


def test_nets_do_not_disturb_the_global_draws():
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    one, other = (Learning(8, 1, 1, 1, 1e-3, 0.0).net(2, 1, 7) for _ in range(2))
    assert torch.equal(torch.rand(2), expected)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters()))
