"""The quadratic test problem of the bilevel solvers, as Problems in float64."""

import io

import torch

from spo_lightning.solvers import Problem, Slope
from spo_lightning.solvers import penalty as P
from spo_lightning.solvers import values as V
from spo_lightning.solvers import weights as W
from spo_lightning.solvers.products import Exact
from spo_lightning.solvers.unrolled import Adapted, Plain, Unrolled


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
        return Problem(at, f, g, lambda t: (f(t), g(t)), known, size[rows[1]], gradient, gradient)

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
        phi=P.Hinge(), level=P.PerPair(), value=V.Reference(), schedule=W.Constant(),
        weight=5.0, margin=0.0, unit="token", beta=0.1,
    )  # fmt: skip
    return P.Penalty(**{**usual, **changed})


def direction(solver, problem, state=None):
    found = solver.step(problem, solver.init(problem.theta) if state is None else state)
    return torch.cat(found.direction)


def close(found, expected, atol=1e-9):
    torch.testing.assert_close(found, expected, atol=atol, rtol=0)


def unrolled(**changed):
    usual = dict(steps=1, lower_lr=0.2, inner=Plain(), apply=Adapted(), hvp=Exact())
    return Unrolled(**{**usual, **changed})


TILT = vector(0.5, -0.2, 0.4, -0.9, 0.3, -0.1)
SIZE = vector(3, 7, 1, 12, 5, 2)
VALUE = vector(0.3, 0.9, 1.4, 0.2, 0.8, 0.7)  # some rows violate, some do not, at START


def uneven(theta=START, split=None, **extra):
    given = {"value": VALUE, "size": SIZE, **extra}
    return build(theta, rows_of(F, TILT), rows_of(G, TILT), split=split, **given)


def reload(state):
    """Through a checkpoint, as plain data."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


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


FLAT = torch.diag(vector(0.0, 0.5, 1.0, 1.5))  # argmin G is a line
SCALES = [0.1, 1.0, 3.0]
a4, b4, START4 = vector(1, -1, 2, 0.5), vector(-2, 1, 0.5, 3), vector(0.3, 0.7, -1.1, 2)


def quadratic4(theta, scale):
    spread = vector(0.3, -0.7, 0.4)
    upper, lower = bowl(torch.eye(4, dtype=torch.float64), b4), bowl(scale * FLAT, a4)
    return build(
        theta, rows_of(upper, spread), rows_of(lower, spread), value=torch.zeros_like(spread)
    )
