"""Solvers against closed forms on quadratics in float64, and their yaml."""

import io
import itertools

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from pairs import CONF

from spo_lightning.solvers import Problem, Slope
from spo_lightning.solvers import penalty as P
from spo_lightning.solvers.none import NoLower
from spo_lightning.solvers.unrolled import Adapted, Unrolled


def vector(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


A = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
B = torch.tensor([[1.0, -0.3], [-0.3, 1.5]], dtype=torch.float64)
a, b, START = vector(1, -1), vector(-1, 2), vector(0.5, 0.25)


def bowl(matrix, centre):
    def height(theta):
        return 0.5 * (theta - centre) @ matrix @ (theta - centre)

    return height


F, G = bowl(B, b), bowl(A, a)


def rows_of(height, spread):
    """[N] rows whose mean is ``height``; ``spread`` [N] sums to 0 and tilts them apart."""
    return lambda theta: height(theta) + spread * (1 + theta.sum())


def slope_of_sum(values, leaf):
    """How many rows, and the gradient of their sum."""
    return len(values), torch.autograd.grad(values.sum(), leaf, retain_graph=True)


def row_mean(parts):
    """The gradient of the mean over the rows of all microbatches."""
    count = sum(rows for rows, _ in parts)
    return [sum(along) / count for along in zip(*(slope for _, slope in parts))]


def watched_mean(name, watched):
    values = torch.cat([watch[name] for watch in watched])
    assert not values.requires_grad
    return values.mean()


def build(theta, upper, lower, *, value=None, size=None, split=None):
    """A Problem from functions of the flat theta; ``split`` is [(upper rows, lower rows)].

    theta travels as two tensors, so that a solver that handles only the first is caught.
    """
    flat = torch.cat(theta) if isinstance(theta, tuple) else theta
    theta = tuple(half.detach() for half in flat.chunk(2))
    n = len(lower(flat))
    size = torch.ones(n, dtype=torch.float64) if size is None else size
    everything = (slice(None), slice(None))

    def part(at, rows):
        def f(t):
            return upper(torch.cat(t))[rows[0]]

        def g(t):
            return lower(torch.cat(t))[rows[1]]

        known = None if value is None else value[rows[1]]
        return Problem(at, f, g, lambda t: (f(t), g(t)), known, size[rows[1]], gradient)

    def gradient(closure, at):
        slopes, watched = [], []
        for rows in split or [everything]:
            leaf = tuple(t.detach().requires_grad_() for t in at)
            terms = closure(part(leaf, rows))
            slopes.append([slope_of_sum(values, leaf) for values in terms.minimise])
            watched.append(terms.watch)
        direction = tuple(sum(terms) for terms in zip(*map(row_mean, zip(*slopes))))
        return Slope(direction, {name: watched_mean(name, watched) for name in watched[0]})

    return part(theta, everything)


def single(theta, **extra):
    """F and G, one row each, V = 0."""
    one = vector(0.0)
    return build(theta, rows_of(F, one), rows_of(G, one), value=one, **extra)


def penalty(**changed):
    usual = dict(
        phi=P.Hinge(), level=P.PerPair(), value=P.Reference(), schedule=P.Constant(),
        weight=5.0, margin=0.0, unit="token", beta=0.1,
    )  # fmt: skip
    return P.Penalty(**{**usual, **changed})


def direction(solver, problem, state=None):
    found = solver.step(problem, solver.init(problem.theta) if state is None else state)
    return torch.cat(found.direction)


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


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
    for k in range(4000):
        theta = theta - direction(solver, single(theta)) / (k + 100)
    close(theta, vector(0.513245250, 0.008473561), atol=0.02)


FLAT = torch.diag(vector(0.0, 0.5, 1.0, 1.5))  # argmin G is a line
SCALES = [0.1, 1.0, 3.0]
a4, b4, START4 = vector(1, -1, 2, 0.5), vector(-2, 1, 0.5, 3), vector(0.3, 0.7, -1.1, 2)


def quadratic4(theta, scale):
    spread = vector(0.3, -0.7, 0.4)
    upper, lower = bowl(torch.eye(4, dtype=torch.float64), b4), bowl(scale * FLAT, a4)
    return build(
        theta, rows_of(upper, spread), rows_of(lower, spread), value=torch.zeros_like(spread)
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("weight", [0.5, 10.0, 1000.0])
def test_linear_penalty_points_at_its_closed_form_optimum(scale, weight):
    stiff = torch.eye(4, dtype=torch.float64) + weight * scale * FLAT
    best = torch.linalg.solve(stiff, b4 + weight * scale * FLAT @ a4)
    solver = penalty(phi=P.Linear(), weight=weight)
    close(direction(solver, quadratic4(START4, scale)), stiff @ (START4 - best))
    close(direction(solver, quadratic4(best, scale)), torch.zeros_like(best))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("steps", [1, 3])
def test_unrolled_closed_form(scale, steps):
    solver = Unrolled(steps=steps, lower_lr=0.3, apply=Adapted())
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
    found = Unrolled(steps=steps, lower_lr=0.2, apply=Adapted()).step(single(START), {})
    close(START + torch.cat(found.displacement), vector(*ahead))
    close(torch.cat(found.direction), vector(*expected))


@pytest.mark.parametrize(
    ("shrink", "outer", "inner"),
    [
        (1.0, (-0.369314790, 1.559533022), (-0.077542176, 1.184557897)),
        (0.1, (-0.217474009, 1.295686308), None),
        (0.01, (-0.204143077, 1.272255720), None),
    ],
)
def test_unrolled_adapted_fixed_point(shrink, outer, inner):
    solver, theta = Unrolled(steps=1, lower_lr=0.2 * shrink, apply=Adapted()), START
    for _ in range(int(80 / shrink)):
        found = solver.step(single(theta), {})
        ahead = theta + torch.cat(found.displacement)
        theta = ahead - 0.25 * shrink * torch.cat(found.direction)
    close(theta, vector(*outer), atol=2e-9)
    if inner:
        close(ahead, vector(*inner), atol=2e-9)


TILT = vector(0.5, -0.2, 0.4, -0.9, 0.3, -0.1)
SIZE = vector(3, 7, 1, 12, 5, 2)
VALUE = vector(0.3, 0.9, 1.4, 0.2, 0.8, 0.7)  # some rows violate, some do not, at START


def uneven(theta=START, split=None, **extra):
    given = {"value": VALUE, "size": SIZE, **extra}
    return build(theta, rows_of(F, TILT), rows_of(G, TILT), split=split, **given)


PHIS = [P.Linear(), P.Hinge(), P.Softplus(0.1)]


@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("level", [P.PerPair(), P.RunningMean(0.9)])
@pytest.mark.parametrize("value", [P.Reference(), P.RunningMin(0.9)])
def test_weight_zero_is_none_bitwise(phi, level, value):
    if isinstance(phi, P.Linear):
        level, value = P.PerPair(), P.Reference()
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


SOLVERS = [
    NoLower(),
    Unrolled(steps=3, lower_lr=0.1, apply=Adapted()),
    penalty(phi=P.Linear(), unit="sequence"),
    penalty(unit="sequence"),
    penalty(phi=P.Softplus(0.1), unit="sequence"),
    penalty(level=P.RunningMean(0.5), margin=0.1, unit="sequence"),
    penalty(value=P.RunningMin(0.5), margin=0.1, schedule=P.Ramp(4)),
    penalty(phi=P.Softplus(0.2), level=P.RunningMean(0.5), value=P.RunningMin(0.5)),
]


def walk(solver, split, count=4):
    theta, state, seen = START, solver.init((START,)), []
    for _ in range(count):
        found = solver.step(uneven(theta, split), state)
        state = reload(found.state)
        theta = theta - 0.1 * torch.cat(found.direction)
        if found.displacement is not None:
            theta = theta + torch.cat(found.displacement)
        seen.append([theta, *found.logged.values()])
    return seen


def reload(state):
    """Through a checkpoint, as plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("solver", SOLVERS, ids=str)
def test_microbatches_change_nothing(solver):
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]
    whole, parts = (walk(solver, split) for split in (None, [(r, r) for r in rows]))
    torch.testing.assert_close(parts, whole, atol=1e-12, rtol=0)


def test_other_lower_rows_than_pairs():
    # 2 pairs, 6 SFT rows, in two microbatches of 1 + 4 and 1 + 2 rows
    upper, lower = rows_of(F, vector(0.4, -0.4)), rows_of(G, TILT)
    split = [(slice(0, 1), slice(0, 4)), (slice(1, 2), slice(4, 6))]
    problem = build(START, upper, lower, value=VALUE * 0, size=SIZE, split=split)
    found = direction(penalty(phi=P.Linear(), weight=0.8), problem)
    close(found, vector(1.725, -2.275))


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
    steps = advance(penalty(value=P.RunningMin(0.5)), 2.0, 1.0, 3.0, 0.5)
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
    steps = advance(penalty(schedule=P.Ramp(4), value=P.RunningMin(0.5)), *[1.0] * 6)
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
        (lambda: penalty(phi=P.Linear(), value=P.RunningMin(0.9)), "running_min.*linear"),
        (lambda: penalty(phi=P.Linear(), level=P.RunningMean(0.9)), "level=mean.*linear"),
        (lambda: P.Ramp(0), "steps"),
        (lambda: P.Softplus(0.0), "temperature"),
        (lambda: P.RunningMean(1.0), "level=mean.*decay"),
        (lambda: P.RunningMin(-0.1), "running_min.*decay"),
        (lambda: Unrolled(steps=0, lower_lr=0.1, apply=Adapted()), "steps"),
        (lambda: Unrolled(steps=1, lower_lr=0.0, apply=Adapted()), "lower_lr"),
    ],
)
def test_refusals(refused, named):
    with pytest.raises(ValueError, match=named):
        refused()


def test_reference_value_must_exist():
    problem = uneven(value=None)
    with pytest.raises(ValueError, match="running_min"):
        direction(penalty(), problem)


PRIMARY = f"""
hydra: {{searchpath: ["file://{CONF}"]}}
defaults:
  - solver: none
  - loss: dpo
  - _self_
"""


@pytest.fixture
def composed(tmp_path):
    tmp_path.joinpath("primary.yaml").write_text(PRIMARY)

    def of(*overrides):
        with initialize_config_dir(str(tmp_path), version_base="1.3"):
            return compose("primary", list(overrides))

    return of


def options(group):
    return sorted(path.stem for path in CONF.joinpath(group).glob("*.yaml"))


NESTED = ["phi", "level", "value", "schedule"]
LINEAR_REFUSES = {"mean", "running_min"}


@pytest.mark.parametrize("solver", options("solver"))
def test_every_solver_yaml_steps(solver, composed):
    built = instantiate(composed(f"solver={solver}").solver)
    problem = uneven()
    found = built.step(problem, built.init(problem.theta))
    assert torch.cat(found.direction).isfinite().all()


@pytest.mark.parametrize(
    "chosen", itertools.product(*(options(f"solver/{group}") for group in NESTED))
)
def test_every_combination_of_penalty_yaml(chosen, composed):
    overrides = [f"solver/{group}={option}" for group, option in zip(NESTED, chosen)]
    node = composed("solver=penalty", *overrides).solver
    if chosen[0] == "linear" and LINEAR_REFUSES & set(chosen):
        with pytest.raises(HydraException, match="linear"):
            instantiate(node)
        return
    solver = instantiate(node)
    assert isinstance(solver, P.Penalty)
    assert len(walk(solver, None)) == 4


def test_spo_and_its_knobs_on_the_command_line(composed):
    spo = instantiate(composed("loss=spo").solver)
    assert spo == P.Penalty(
        phi=P.Hinge(), level=P.PerPair(), value=P.Reference(), schedule=P.Constant(),
        weight=1.0, margin=0.0, unit="sequence", beta=0.1,
    )  # fmt: skip
    cfg = composed(
        "loss=spo", "loss.beta=0.3", "solver.weight=3", "solver/phi=softplus",
        "solver.phi.temperature=0.2", "solver/value=running_min", "solver/schedule=ramp",
        "solver.schedule.steps=50",
    )  # fmt: skip
    assert cfg.loss == composed("loss=dpo", "loss.beta=0.3").loss
    assert instantiate(cfg.solver) == penalty(
        phi=P.Softplus(0.2), value=P.RunningMin(0.9), schedule=P.Ramp(50),
        weight=3, unit="sequence", beta=0.3,
    )  # fmt: skip


def test_the_unit_follows_the_loss(composed):
    simpo = instantiate(composed("loss=simpo", "solver=penalty", "solver.weight=3").solver)
    assert (simpo.unit, simpo.beta, simpo.weight) == ("token", 2.0, 3)
    assert instantiate(composed("loss=spo", "solver=unrolled").solver) == Unrolled(
        steps=1, lower_lr=0.1, apply=Adapted()
    )


@pytest.mark.parametrize(
    "overrides",
    [
        ["loss=spo", "solver.phi.temperature=0.2"],  # the hinge has none
        ["loss=spo", "solver.wieght=2"],
        ["loss=spo", "solver.schedule.steps=3"],
        ["loss=simpo", "loss.label_smoothing=0.1"],
        ["solver=none", "solver.weight=1"],
        ["solver=none", "solver/phi=softplus"],
    ],
)
def test_knobs_that_are_not_there_are_refused(overrides, composed):
    with pytest.raises(HydraException):
        composed(*overrides)
