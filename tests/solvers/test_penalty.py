"""The penalty and the plain objective against closed forms on quadratics in float64."""

import pytest
import torch
from quadratics import (
    FLAT,
    SCALES,
    SIZE,
    START,
    START4,
    TILT,
    VALUE,
    F,
    G,
    a4,
    b4,
    build,
    close,
    direction,
    penalty,
    quadratic4,
    rows_of,
    single,
    uneven,
    vector,
)  # fmt: skip

from spo_lightning.solvers import penalty as P
from spo_lightning.solvers import values as V
from spo_lightning.solvers import weights as W
from spo_lightning.solvers.none import NoLower


@pytest.mark.parametrize(
    ("phi", "weight", "margin", "expected"),
    [
        (P.Linear(), 0.8, 0.0, (1.725, -2.275)),
        (P.Hinge(), 5.0, -0.5, (0.15, 1.925)),
        (P.Softplus(0.1), 5.0, -0.5, (0.339147418, 1.420606886)),
        (P.Hinge(), 5.0, -0.8, (2.025, -3.075)),  # inside the region: grad F alone
        (P.Hinge(), 5.0, -0.71875, (2.025, -3.075)),  # on its border: the slope is 0
    ],
)
def test_penalty_at_the_start(phi, weight, margin, expected):
    close(
        direction(penalty(phi=phi, weight=weight, margin=margin), single(START)), vector(*expected)
    )


@pytest.mark.parametrize(
    ("phi", "expected"),
    [(P.Hinge(), (0.15, 1.925)), (P.Softplus(0.1), (0.339147418, 1.420606886))],
)
def test_level_mean_judges_by_the_state(phi, expected):
    solver = penalty(phi=phi, level=P.RunningMean(0.9), margin=-0.5)
    outside = {"step": 3, "violation": vector(0.21875)[0]}
    close(direction(solver, single(START), outside), vector(*expected))
    # the batch itself violates, the running mean does not
    inside = {"step": 3, "violation": vector(-9.0)[0]}
    close(direction(solver, single(START), inside), vector(2.025, -3.075))


@pytest.mark.parametrize(
    ("phi", "weight", "margin", "point"),
    [
        (P.Linear(), 0.8, 0.0, (-0.202680067, 1.269681742)),
        (P.Hinge(), 0.8, -0.5, (-0.202680067, 1.269681742)),
        (P.Softplus(0.1), 0.8, -0.5, (-0.202680067, 1.269681742)),
        (P.Softplus(0.1), 5.0, -0.5, (0.456353506, 0.120890662)),
    ],
)
def test_penalty_is_at_rest_at_its_optimum(phi, weight, margin, point):
    there = penalty(phi=phi, weight=weight, margin=margin)
    close(direction(there, single(vector(*point))), vector(0, 0), atol=5e-7)


@pytest.mark.parametrize("weight", [5.0, 20.0])
def test_hinge_is_an_exact_penalty(weight):
    # any weight above mu* = 4.4978 ends on the constrained optimum
    solver, theta = penalty(weight=weight, margin=-0.5), START
    for k in range(1500):
        theta = theta - direction(solver, single(theta)) / (k + 40)
    close(theta, vector(0.513245250, 0.008473561), atol=0.02)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weight", [0.5, 10.0, 1000.0])
def test_linear_penalty_points_at_its_closed_form_optimum(scale, weight):
    stiff = torch.eye(4, dtype=torch.float64) + weight * scale * FLAT
    best = torch.linalg.solve(stiff, b4 + weight * scale * FLAT @ a4)
    solver = penalty(phi=P.Linear(), weight=weight)
    close(direction(solver, quadratic4(START4, scale)), stiff @ (START4 - best))
    close(direction(solver, quadratic4(best, scale)), torch.zeros_like(best))


PHIS = [P.Linear(), P.Hinge(), P.Softplus(0.1)]


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("level", [P.PerPair(), P.RunningMean(0.9)])
@pytest.mark.parametrize("value", [V.Reference(), V.RunningMin(0.9)])
def test_weight_zero_is_none_bitwise(phi, level, value):
    if isinstance(phi, P.Linear):
        level, value = P.PerPair(), V.Reference()
    solver = penalty(phi=phi, level=level, value=value, weight=0.0)
    problem = uneven()
    plain = NoLower().step(problem, {})
    found = solver.step(problem, solver.init(problem.theta))
    for mine, theirs in zip(found.direction, plain.direction):
        assert mine.numpy().tobytes() == theirs.numpy().tobytes()


def test_weight_zero_survives_an_infinite_lower_level():
    problem = build(START, rows_of(F, TILT), lambda t: t.sum() * torch.inf + TILT, value=VALUE)
    assert direction(penalty(phi=P.Linear(), weight=0.0), problem).isfinite().all()


@pytest.mark.parametrize("margin", [0.0, 0.2])
@pytest.mark.parametrize("unit", ["sequence", "token"])
def test_units_of_the_hinge(unit, margin):
    # by hand: weight * beta * relu(r_w - l_w + margin * n_w), or per token without beta
    solver = penalty(weight=3.0, beta=0.4, unit=unit, margin=margin)
    theta = START.clone().requires_grad_()
    lw, rw = -rows_of(G, TILT)(theta) * SIZE, -VALUE * SIZE
    if unit == "sequence":
        price = 3.0 * 0.4 * torch.relu(rw - lw + margin * SIZE)
    else:
        price = 3.0 * torch.relu((rw - lw) / SIZE + margin)
    assert 0 < (price > 0).sum() < len(price)
    (expected,) = torch.autograd.grad(F(theta) + price.mean(), theta)
    problem = uneven()
    close(direction(solver, problem), expected)
    logged = solver.step(problem, solver.init(problem.theta)).logged
    assert logged["active"].item() == pytest.approx((price > 0).double().mean().item())
    close(logged["violation"], ((rw - lw) / SIZE + margin).mean().detach())
    close(logged["value"], VALUE.mean())
    assert logged["weight"].item() == 3.0 and all(it.dim() == 0 for it in logged.values())


def advance(solver, *lower):
    """The state after outer steps on which the mean of G was each of ``lower``."""
    state, steps = solver.init((START,)), []
    for height in lower:
        problem = build(START, rows_of(F, TILT), lambda t, h=height: h + 0 * t.sum() + TILT)
        found = solver.step(problem, state)
        state = found.state
        steps.append((found, state))
    return steps


def test_running_min_smooths_then_keeps_the_lowest():
    steps = advance(penalty(value=V.RunningMin(0.5)), 2.0, 1.0, 3.0, 0.5)
    # smoothed 2, 1.5, 2.25, 1.375
    assert [s["value"].item() for _, s in steps] == pytest.approx([2.0, 1.5, 1.5, 1.375])
    # V in force is the one of the steps before; at first it is each row's own G
    assert [f.logged["value"].item() for f, _ in steps] == pytest.approx([2.0, 2.0, 1.5, 1.5])
    assert [f.logged["violation"].item() for f, _ in steps] == pytest.approx([0, -1, 1.5, -1])
    assert steps[0][0].logged["active"].item() == 0
    assert [s["step"] for _, s in steps] == [1, 2, 3, 4]


def test_running_mean_of_the_violation_starts_at_the_margin():
    solver = penalty(level=P.RunningMean(0.9), margin=0.1)
    problem = single(START)  # G = 0.71875, V = 0
    once = solver.step(problem, solver.init(problem.theta))
    assert once.state["violation"].item() == pytest.approx(0.9 * 0.1 + 0.1 * 0.81875)
    close(torch.cat(once.direction), vector(0.15, 1.925))  # 0.1 > 0: judged outside
    still = penalty(level=P.RunningMean(0.9))  # a margin of 0: on the border
    close(direction(still, problem), vector(2.025, -3.075))


def test_ramp_starts_at_zero_and_ends_at_the_weight():
    steps = advance(penalty(schedule=W.Ramp(4), value=V.RunningMin(0.5)), *[1.0] * 6)
    weights = [found.logged["weight"].item() for found, _ in steps]
    assert weights == pytest.approx([0, 1.25, 2.5, 3.75, 5, 5])


def test_softplus_tends_to_the_hinge_and_its_slope_is_its_derivative():
    violation = vector(-30.0, -0.3, 0.0, 0.02, 0.3, 30.0).requires_grad_()
    for phi in PHIS[1:]:
        (slope,) = torch.autograd.grad(phi(violation).sum(), violation)
        close(phi.slope(violation.detach()), slope, atol=1e-14)
    close(P.Softplus(1e-4)(violation), P.Hinge()(violation), atol=1e-4)
    assert P.Softplus(1e-4)(vector(1e4)).isfinite().all()


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (lambda: penalty(weight=-1.0), "weight"),
        (lambda: penalty(weight=float("inf")), "weight"),
        (lambda: penalty(weight=float("nan")), "weight"),
        (lambda: penalty(unit="word"), "unit"),
        (lambda: penalty(phi=P.Linear(), margin=0.1), "margin.*linear"),
        (lambda: penalty(phi=P.Linear(), value=V.RunningMin(0.9)), "running_min.*linear"),
        (lambda: penalty(phi=P.Linear(), level=P.RunningMean(0.9)), "level=mean.*linear"),
        (lambda: W.Ramp(0), "steps"),
        (lambda: P.Softplus(0.0), "temperature"),
        (lambda: P.RunningMean(1.0), "level=mean.*decay"),
        (lambda: V.RunningMin(-0.1), "running_min.*decay"),
        (lambda: penalty(phi=P.Linear(), value=V.Inner(1, 0.1, False)), "inner.*linear"),
        (lambda: penalty(schedule=W.DualAscent(1.0)), "phi=linear"),
        (lambda: penalty(phi=P.Softplus(0.1), schedule=W.SlackBarrier(1.0)), "phi=linear"),
        (lambda: W.DualAscent(0.0), "rate"),
        (lambda: W.SlackBarrier(-1.0), "rate"),
        (lambda: V.Inner(0, 0.1, False), "steps"),
        (lambda: V.Inner(1, 0.0, False), "lower_lr"),
    ],
)
def test_refusals(refused, named):
    with pytest.raises(ValueError, match=named):
        refused()


def test_reference_value_must_exist():
    problem = uneven(value=None)
    with pytest.raises(ValueError, match="running_min"):
        direction(penalty(), problem)
