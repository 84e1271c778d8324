"""Unrolled inner steps against closed forms on quadratics in float64."""

import pytest
import torch
from quadratics import (
    FLAT,
    SCALES,
    START,
    START4,
    a4,
    b4,
    bowl,
    close,
    quadratic4,
    single,
    unrolled,
    vector,
)  # fmt: skip


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_closed_form(scale, steps):
    solver = unrolled(steps=steps, lower_lr=0.3)
    found = solver.step(quadratic4(START4, scale), {})
    one = torch.eye(4, dtype=torch.float64) - 0.3 * scale * FLAT
    ahead = a4 + torch.linalg.matrix_power(one, steps) @ (START4 - a4)
    close(START4 + torch.cat(found.displacement), ahead)
    close(torch.cat(found.direction), ahead - b4)
    lower = bowl(scale * FLAT, a4)
    close(found.logged["lower_before"], lower(START4))
    close(found.logged["lower_ahead"], lower(ahead))
    close(found.logged["upper_ahead"], 0.5 * (ahead - b4).square().sum())


@pytest.mark.parametrize(
    ("steps", "ahead", "expected"),
    [(1, (0.575, 0.05), (2.16, -3.3975)), (3, (0.69575, -0.258), (2.37315, -3.895725))],
)
def test_unrolled_hand_worked(steps, ahead, expected):
    found = unrolled(steps=steps).step(single(START), {})
    close(START + torch.cat(found.displacement), vector(*ahead))
    close(torch.cat(found.direction), vector(*expected))


@pytest.mark.parametrize(
    ("shrink", "outer", "inner"),
    [
        (1.0, (-0.369314790, 1.559533022), (-0.077542176, 1.184557897)),
        (0.1, (-0.217474009, 1.295686308), None),
        pytest.param(0.01, (-0.204143077, 1.272255720), None, marks=pytest.mark.slow),
    ],
)
def test_unrolled_adapted_fixed_point(shrink, outer, inner):
    solver, theta = unrolled(lower_lr=0.2 * shrink), START
    for _ in range(int(80 / shrink)):
        found = solver.step(single(theta), {})
        ahead = theta + torch.cat(found.displacement)
        theta = ahead - 0.25 * shrink * torch.cat(found.direction)
    close(theta, vector(*outer), atol=2e-9)
    if inner:
        close(ahead, vector(*inner), atol=2e-9)
