"""Adaptive weights and the shadow copy against the hand-worked numbers of the quadratic."""

import pytest
import torch
from quadratics import (
    START,
    A,
    F,
    G,
    a,
    b,
    bowl,
    build,
    close,
    direction,
    penalty,
    rows_of,
    single,
    vector,
)  # fmt: skip

from spo_lightning.solvers import penalty as P
from spo_lightning.solvers import values as V
from spo_lightning.solvers import weights as W
from spo_lightning.solvers.products import Exact

MULTIPLIER = 4.497817786  # of the constraint G <= 0.5
CONSTRAINED = vector(0.513245250, 0.008473561)


def run(solver, steps, lr, theta=START):
    state = solver.init((theta,))
    for _ in range(steps):
        found = solver.step(single(theta), state)
        state = found.state
        theta = theta - lr * torch.cat(found.direction)
    return theta, found


@pytest.mark.parametrize(("steps", "gap"), [(1, 0.21), (2, 0.358596875), (3, 0.4637766875)])
def test_value_of_the_shadow_by_hand(steps, gap):
    solver = penalty(value=V.Inner(steps, 0.2, restart=True))
    found = solver.step(single(START), solver.init((START,)))
    close(found.logged["violation"], vector(gap)[0], atol=1e-12)
    assert "shadow" not in found.state


def test_the_shadow_goes_on_from_where_it_stood():
    solver = penalty(value=V.Inner(1, 0.2, restart=False))
    first = solver.step(single(START), solver.init((START,)))
    close(torch.cat(first.state["shadow"]), vector(0.575, 0.05))
    again = solver.step(single(START), first.state)
    close(torch.cat(again.state["shadow"]), vector(0.64, -0.1175))
    close(again.logged["violation"], vector(0.358596875)[0])


def test_dual_ascent_by_hand_and_at_rest():
    solver = penalty(phi=P.Linear(), schedule=W.DualAscent(0.1), weight=0.0, margin=-0.5)
    found = solver.step(single(START), solver.init((START,)))
    assert found.state["weight"] == pytest.approx(0.021875, abs=1e-12)
    slow = penalty(phi=P.Linear(), schedule=W.DualAscent(0.1), weight=0.0, margin=-0.5)
    theta, found = run(slow, 1500, 0.1)
    close(theta, CONSTRAINED, atol=1e-7)
    assert found.state["weight"] == pytest.approx(MULTIPLIER, abs=1e-6)


@pytest.mark.parametrize(
    ("value", "rate", "margin", "weight"),
    [
        (V.Reference(), 1.0, -0.5, 3.553424658),
        (V.Reference(), 0.5, 0.0, 3.676712329),
        (V.Inner(10, 0.2, restart=True), 0.5, 0.0, 3.666746901),
    ],
)
def test_barrier_by_hand(value, rate, margin, weight):
    solver = penalty(
        phi=P.Linear(), schedule=W.SlackBarrier(rate), value=value, margin=margin, weight=1.0
    )
    found = solver.step(single(START), solver.init((START,)))
    assert found.logged["weight"].item() == pytest.approx(weight, abs=1e-8)
    close(torch.cat(found.direction), vector(2.025, -3.075) + weight * vector(-0.375, 1), 1e-8)
    # what it is for: G falls at the rate times the violation
    fall = torch.cat(found.direction) @ vector(-0.375, 1)
    assert fall.item() == pytest.approx(rate * found.logged["violation"].item(), abs=1e-8)


def test_barrier_ends_at_the_constrained_optimum():
    solver = penalty(phi=P.Linear(), schedule=W.SlackBarrier(1.0), margin=-0.5)
    theta, found = run(solver, 1200, 0.05)
    close(theta, CONSTRAINED, atol=1e-7)
    assert found.logged["weight"].item() == pytest.approx(MULTIPLIER, abs=1e-6)


def test_barrier_does_nothing_inside_the_region():
    solver = penalty(phi=P.Linear(), schedule=W.SlackBarrier(1.0), margin=-20.0)
    close(direction(solver, single(START)), vector(2.025, -3.075))


@pytest.mark.parametrize(
    ("xi", "start", "stall"), [(0.01, a + 0.1, 0.079), (0.001, a + 0.01, 0.0080)]
)
def test_bome_collapses_to_the_sft_point(xi, start, stall):
    # its rule vanishes only where grad G does, so F is forgotten; a step xi stalls at O(xi)
    bome = penalty(phi=P.Linear(), schedule=W.SlackBarrier(5.0))
    theta, found = run(bome, 1200, xi, start)
    assert torch.dist(theta, a).item() == pytest.approx(stall, rel=0.05)
    assert found.logged["weight"] > 10 * MULTIPLIER


class SquaredHinge:
    def __call__(self, violation):
        return 0.5 * violation.clamp(min=0).square()

    def slope(self, violation):
        return violation.clamp(min=0)


@pytest.mark.parametrize(
    ("weight", "point"),
    [(0.8, (-0.024586697, 0.994956087)), (5.0, (0.297026696, 0.427196945))],
)
def test_another_phi_is_a_record_with_two_calls(weight, point):
    solver = penalty(phi=SquaredHinge(), weight=weight, margin=-0.5)
    close(direction(solver, single(vector(*point))), vector(0, 0), atol=5e-8)


def test_gradient_norm_penalty_with_a_product():
    # G-PBGD: grad F + gamma H grad G = 0
    point = vector(-0.161923454, 1.458292444).requires_grad_()
    upper, lower = (torch.autograd.grad(it(point), point)[0] for it in (F, G))
    turned = Exact()(single(point.detach()), tuple(point.detach().chunk(2)), lower.chunk(2))
    close(upper + 0.8 * torch.cat(turned), vector(0, 0), atol=5e-8)


def test_hinge_in_one_dimension():
    # A = 2, B = 1, a = 1, b = -1, eps = .25: theta* = .5, mu* = 1.5
    one = torch.eye(2, dtype=torch.float64)
    upper, lower = bowl(one, vector(-1, 0)), bowl(2 * one, vector(1, 0))
    rows = vector(0.0)
    for weight, inside in [(1.5 + 1e-3, True), (1.5 - 1e-3, False)]:
        for side, sign in [(0.5 - 1e-6, -1), (0.5 + 1e-6, 1)]:
            problem = build(
                vector(side, 0), rows_of(upper, rows), rows_of(lower, rows), value=rows
            )
            along = direction(penalty(weight=weight, margin=-0.25), problem)[0]
            if inside:  # both sides push to the border
                assert sign * along > 0
            elif sign < 0:  # the price is below the multiplier: out it goes
                assert along > 0


def test_curve_of_constrained_solutions():
    assert b.tolist() == [-1, 2] and A[0, 1] == 0.5
    for weight in (0.25, 1.0, 4.0, 64.0):
        B = torch.tensor([[1.0, -0.3], [-0.3, 1.5]], dtype=torch.float64)
        point = torch.linalg.solve(B + weight * A, B @ b + weight * A @ a)
        close(direction(penalty(phi=P.Linear(), weight=weight), single(point)), vector(0, 0))
