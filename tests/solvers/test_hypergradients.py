"""Hypergradients and linear solves against closed forms, in float64."""

import itertools

import pytest
import torch
from quadratics import (
    FLAT,
    START,
    START4,
    a4,
    b4,
    bowl,
    build,
    close,
    direction,
    penalty,
    quadratic4,
    rows_of,
    single,
    unrolled,
    vector,
)  # fmt: skip

from spo_lightning.errors import Diverged
from spo_lightning.solvers import linear as L
from spo_lightning.solvers import penalty as P
from spo_lightning.solvers.alternating import Alternating, Coin, LargerGap
from spo_lightning.solvers.implicit import Implicit
from spo_lightning.solvers.none import NoLower
from spo_lightning.solvers.products import Automatic, Exact, FiniteDifference
from spo_lightning.solvers.unrolled import Hypergradient, Preconditioned

CONDITIONS = [1.0, 10.0, 1e2, 1e3, 1e4]
HEIGHTS = [0.05, 1.0, 20.0]
SIZE = 20
EYE = torch.eye(SIZE, dtype=torch.float64)
CG = L.ConjugateGradient(200, 1e-13)


def spread_out(condition, height, generator):
    """A random symmetric positive definite matrix with largest eigenvalue ``height``."""
    basis, _ = torch.linalg.qr(torch.randn(SIZE, SIZE, generator=generator, dtype=torch.float64))
    values = height * torch.logspace(0, -torch.log10(torch.tensor(condition)), SIZE).double()
    return (basis * values) @ basis.T


class Case:
    """One random quadratic, its Problem, and its closed forms."""

    def __init__(self, condition, height, seed=0):
        generator = torch.Generator().manual_seed(seed)
        self.A = spread_out(condition, height, generator)
        self.A = (self.A + self.A.T) / 2
        self.B = spread_out(30.0, 1.5, generator)
        self.B = (self.B + self.B.T) / 2
        draw = torch.randn(3, SIZE, generator=generator, dtype=torch.float64)
        self.a, self.b, self.theta = draw
        self.top = height
        tilt = vector(0.4, -0.9, 0.5)
        upper, lower = bowl(self.B, self.b), bowl(self.A, self.a)
        rows = [slice(0, 1), slice(1, 3)]
        self.problem = build(
            self.theta, rows_of(upper, tilt), rows_of(lower, tilt), value=0 * tilt,
            split=[(r, r) for r in rows],
        )  # fmt: skip

    def shift(self, lr, steps):
        return torch.linalg.matrix_power(EYE - lr * self.A, steps)


CASES = [pytest.param(c, h, id=f"condition{c:.0f}-scale{h}") for c in CONDITIONS for h in HEIGHTS]


def relative(found, expected, tolerance):
    assert torch.dist(found, expected) <= tolerance * expected.norm()


@pytest.mark.parametrize(("condition", "height"), CASES)
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_on_random_quadratics(condition, height, steps):
    case = Case(condition, height)
    lr = 0.4 / case.top
    M = case.shift(lr, steps)
    ahead = case.a + M @ (case.theta - case.a)
    outer = case.B @ (ahead - case.b)
    ways = {"steps": steps, "lower_lr": lr}
    adapted = unrolled(**ways).step(case.problem, {})
    relative(case.theta + torch.cat(adapted.displacement), ahead, 1e-8)
    relative(torch.cat(adapted.direction), outer, 1e-8)
    first = unrolled(**ways, apply=Hypergradient("first"))
    relative(direction(first, case.problem), outer, 1e-8)
    second = unrolled(**ways, apply=Hypergradient("second"))
    relative(direction(second, case.problem), M @ outer, 1e-8)
    rough = unrolled(**ways, apply=Hypergradient("second"), hvp=FiniteDifference(None))
    relative(direction(rough, case.problem), M @ outer, 1e-5)


@pytest.mark.parametrize(("condition", "height"), CASES)
def test_preconditioned_inner_steps_on_random_quadratics(condition, height):
    case = Case(condition, height)
    before = torch.rand(SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    before[0] = 0.0  # it had no gradient so far: its step must stay of the others' size
    squares = 0.9 * before + 0.1 * (case.A @ (case.theta - case.a)).square()
    scale = 1 / (squares.sqrt() + 1e-3)
    lr = 0.4 / (case.top * scale.max())
    ahead, jacobian = case.theta, EYE
    for _ in range(3):
        ahead = ahead - lr * scale * (case.A @ (ahead - case.a))
        jacobian = (EYE - lr * scale[:, None] * case.A) @ jacobian
    solver = unrolled(
        steps=3, lower_lr=float(lr), inner=Preconditioned(0.9, 1e-3), apply=Hypergradient("second")
    )
    found = solver.step(case.problem, {"squares": before.chunk(2)})
    expected = jacobian.T @ case.B @ (ahead - case.b)
    relative(torch.cat(found.direction), expected, 1e-8)
    relative(torch.cat(found.state["squares"]), squares, 1e-12)


def solves(gamma, top):
    yield CG, 1e-8
    yield L.Neumann(60, 0.0), (gamma * top) ** 61
    yield L.Richardson(400, 0.0, 2 / (2 + gamma * top)), 1e-8


@pytest.mark.parametrize(("condition", "height"), CASES)
def test_implicit_on_random_quadratics(condition, height):
    case = Case(condition, height)
    gamma = 0.5 / case.top
    phi = torch.linalg.solve(EYE + gamma * case.A, case.theta + gamma * case.A @ case.a)
    expected = torch.linalg.solve(EYE + gamma * case.A, case.B @ (phi - case.b))
    for solve, tolerance in solves(gamma, case.top):
        solver = Implicit(gamma, 80, 1 / case.top, solve, Exact())
        relative(direction(solver, case.problem), expected, max(tolerance, 1e-8))
    rough = Implicit(gamma, 80, 1 / case.top, CG, FiniteDifference(None))
    relative(direction(rough, case.problem), expected, 1e-5)


@pytest.mark.parametrize(("condition", "height"), CASES)
def test_first_order_solvers_on_random_quadratics(condition, height):
    case = Case(condition, height)
    upper, lower = case.B @ (case.theta - case.b), case.A @ (case.theta - case.a)
    relative(direction(NoLower(), case.problem), upper, 1e-8)
    linear = penalty(phi=P.Linear(), weight=3.0)
    relative(direction(linear, case.problem), upper + 3 * lower, 1e-8)
    for seed in range(4):
        solver = Alternating(Coin(seed), weight=1.0, unit="token", beta=0.1)
        found = solver.step(case.problem, solver.init(case.problem.theta))
        expected = lower if found.logged["lower_turn"] else upper
        relative(torch.cat(found.direction), expected, 1e-8)


@pytest.mark.parametrize(
    ("order", "steps", "expected"),
    [
        ("second", 1, (1.63575, -2.934)),
        ("first", 1, (2.16, -3.3975)),
        ("second", 3, (1.140526425, -2.4339165)),
        ("first", 3, (2.37315, -3.895725)),
    ],
)
def test_hypergradient_by_hand(order, steps, expected):
    solver = unrolled(steps=steps, apply=Hypergradient(order))
    close(direction(solver, single(START)), vector(*expected))


@pytest.mark.parametrize("order", ["first", "second"])
@pytest.mark.parametrize(
    ("steps", "point"),
    [(1, (-1.765957447, 2.404255319)), (3, (-4.981333616, 2.949028635))],
)
def test_pulled_back_it_ends_where_the_lower_level_has_no_say(order, steps, point):
    solver = unrolled(steps=steps, apply=Hypergradient(order))
    close(direction(solver, single(vector(*point))), vector(0, 0), atol=2e-8)


def implicit(gamma, solve=CG, hvp=None):
    return Implicit(gamma, 400, 0.4, solve, hvp or Exact())


@pytest.mark.parametrize(
    ("gamma", "iterations", "expected"),
    [
        (0.5, 1, (1.604161357, -2.579888369)),
        (0.5, 2, (1.469986419, -2.679040290)),
        (0.25, 2, (1.686265094, -2.897366005)),
    ],
)
def test_implicit_by_hand(gamma, iterations, expected):
    solver = implicit(gamma, L.ConjugateGradient(iterations, 0.0))
    close(direction(solver, single(START)), vector(*expected))


def test_implicit_ends_where_the_lower_level_has_no_say():
    close(direction(implicit(0.5), single(vector(-2.25, 3))), vector(0, 0))


@pytest.mark.parametrize(
    ("terms", "error"), [(1, 0.189044), (2, 0.079764), (5, 0.012677), (10, 6.4829e-4)]
)
def test_neumann_error_by_hand(terms, error):
    found = direction(implicit(0.25, L.Neumann(terms, 0.0)), single(START))
    exact = vector(1.686265094, -2.897366005)
    assert torch.dist(found, exact).item() == pytest.approx(error, rel=1e-4)


def test_neumann_refuses_to_diverge():
    with pytest.raises(Diverged, match=r"solver.gamma below 0\.\d+, now 0\.5"):
        direction(implicit(0.5, L.Neumann(200, 0.0)), single(START))


def test_richardson_refuses_to_diverge():
    with pytest.raises(Diverged, match="solver.solve.step"):
        direction(implicit(0.5, L.Richardson(50, 0.0, 1.5)), single(START))


def test_conjugate_gradients_refuse_negative_curvature():
    dented = vector(1.0, -4.0, 2.0, 1.0)
    slope = vector(1.0, 1.0, 1.0, 1.0).chunk(2)

    def product(vectors):
        return (dented * torch.cat(vectors)).chunk(2)

    with pytest.raises(Diverged, match="curvature"):
        CG(product, 0.5, slope)
    # I + gamma H is positive definite for a smaller gamma
    solved = CG(product, 0.2, slope)
    close(torch.cat(solved.vector), 1 / (1 + 0.2 * dented))
    assert solved.residual < 1e-12 and solved.products <= 4


def test_a_zero_right_side_needs_no_products():
    zero = (torch.zeros(2, dtype=torch.float64),)
    for solve in (CG, L.Neumann(3, 0.0), L.Richardson(3, 0.0, 0.5)):
        solved = solve(lambda v: pytest.fail("asked for a product"), 0.5, zero)
        assert (solved.products, solved.residual) == (0, 0.0)
        close(solved.vector[0], zero[0])


@pytest.mark.parametrize("scale", [0.1, 1.0, 3.0])
def test_products_are_the_hessian_times_the_vector(scale):
    problem, along = quadratic4(START4, scale), vector(0.3, -1.0, 2.0, 0.7)
    for products, tolerance in [(Exact(), 1e-12), (FiniteDifference(None), 1e-8)]:
        found = products(problem, problem.theta, along.chunk(2))
        close(torch.cat(found), scale * FLAT @ along, atol=tolerance)
    zeros = FiniteDifference(None)(problem, problem.theta, (0 * along).chunk(2))
    close(torch.cat(zeros), 0 * along)


def test_auto_says_what_it_took(caplog):
    from spo_lightning.solvers import products

    problem, along = quadratic4(START4, 1.0), START4.chunk(2)
    products._say.cache_clear()
    with caplog.at_level("INFO"):
        exact = torch.cat(Automatic(None)(problem, problem.theta, along))
        blind = problem.__class__(**{**vars(problem), "twice": None})
        rough = torch.cat(Automatic(None)(blind, problem.theta, along))
    close(rough, exact, atol=1e-8)
    assert "exact" in caplog.text and "finite differences" in caplog.text
    with pytest.raises(ValueError, match="finite_difference"):
        Exact()(blind, problem.theta, along)
    half = tuple(t.bfloat16() for t in problem.theta)
    with pytest.raises(ValueError, match="float32"):
        FiniteDifference(None)(problem, half, along)


@pytest.mark.parametrize(
    ("share", "point"),
    [
        (0.25, (0.362275449, 0.303393214)),
        (0.5, (-0.108579088, 1.128686327)),
        (0.75, (-0.526335040, 1.670811997)),
    ],
)
def test_the_coin_is_at_rest_on_the_curve_in_the_mean(share, point):
    weight = (1 - share) / share
    problem, taken = single(vector(*point)), {}
    turns = 2000
    solver = Alternating(Coin(3), weight=weight, unit="token", beta=0.1)
    lower = 0
    for step in range(turns):
        turn = solver.pick.lower(weight, {"step": step})
        lower += turn
        if turn not in taken:
            taken[turn] = direction(solver, problem, {"step": step})
    assert lower / turns == pytest.approx(1 - share, abs=4 * (0.25 / turns) ** 0.5)
    close(share * taken[False] + (1 - share) * taken[True], vector(0, 0), atol=2e-8)


@pytest.mark.parametrize(
    ("share", "point"),
    [
        (0.25, (0.278747031, 0.461435814)),
        (0.5, (0.037639635, 0.891536336)),
        (0.75, (-0.204311727, 1.272038518)),
    ],
)
@pytest.mark.parametrize("every", [1, 10])
def test_the_larger_gap_ends_where_the_gaps_are_equal(share, point, every):
    solver = Alternating(
        LargerGap(every, 0.0, 0.0), weight=(1 - share) / share, unit="token", beta=0.1
    )
    theta, state = START, solver.init((START,))
    for k in range(1500):
        found = solver.step(single(theta), state)
        state = found.state
        theta = theta - torch.cat(found.direction) / (k + 20)
    close(theta, vector(*point), atol=0.02)


def test_stale_values_between_looks():
    solver = Alternating(LargerGap(3, 0.0, 0.0), weight=1.0, unit="token", beta=0.1)
    state = {"step": 1, "upper": vector(1.0)[0], "lower": vector(9.0)[0]}
    found = solver.step(single(START), state)  # the lower level, by what was known
    assert found.logged["lower_turn"] == 1
    assert found.state["upper"] == 1.0 and found.state["lower"].item() == pytest.approx(0.71875)
    looked = solver.step(single(START), {**state, "step": 3}).state
    assert looked["upper"].item() == pytest.approx(4.209375)


def test_one_set_of_weights_for_every_solver():
    """theta(mu) is where the penalty, the coin and the adapted unroll end."""
    for weight, scale in itertools.product([0.5, 2.0], [0.1, 1.0]):
        stiff = torch.eye(4, dtype=torch.float64) + weight * scale * FLAT
        point = torch.linalg.solve(stiff, b4 + weight * scale * FLAT @ a4)
        problem = quadratic4(point, scale)
        close(direction(penalty(phi=P.Linear(), weight=weight), problem), 0 * point)
        tiny = unrolled(lower_lr=1e-6 * weight)
        found = tiny.step(problem, {})
        moved = torch.cat(found.displacement) - 1e-6 * torch.cat(found.direction)
        close(moved / 1e-6, 0 * point, atol=1e-4)


@pytest.mark.parametrize(
    ("refused", "named"),
    [
        (lambda: unrolled(steps=0), "steps"),
        (lambda: unrolled(lower_lr=0.0), "lower_lr"),
        (lambda: Hypergradient("third"), "order"),
        (lambda: Preconditioned(1.0, 1e-8), "decay"),
        (lambda: Preconditioned(0.9, 0.0), "eps"),
        (lambda: implicit(0.0), "gamma"),
        (lambda: Implicit(0.1, 0, 0.1, CG, Exact()), "steps"),
        (lambda: Implicit(0.1, 1, -1.0, CG, Exact()), "lower_lr"),
        (lambda: L.ConjugateGradient(0, 0.0), "iterations"),
        (lambda: L.Neumann(1, float("nan")), "tolerance"),
        (lambda: L.Richardson(1, 0.0, 0.0), "step"),
        (lambda: FiniteDifference(0.0), "size"),
        (lambda: LargerGap(0, 0.0, 0.0), "every"),
        (lambda: Alternating(Coin(0), weight=-1.0, unit="token", beta=0.1), "weight"),
        (lambda: Alternating(Coin(0), weight=1.0, unit="word", beta=0.1), "unit"),
    ],
)
def test_refusals(refused, named):
    with pytest.raises(ValueError, match=named):
        refused()
