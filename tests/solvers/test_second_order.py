"""Hypergradients of a real Llama in float64 against finite differences of the whole objective."""

import pytest
import torch
from fitting import fitted, objective, scored
from lightning import Callback
from tiny import in_float64, policy

from spo_lightning.errors import Diverged
from spo_lightning.models import scorer as models
from spo_lightning.solvers import BLOCK, dot, lower_terms, moved
from spo_lightning.solvers import linear as L
from spo_lightning.solvers.implicit import Implicit
from spo_lightning.solvers.products import Exact, FiniteDifference
from spo_lightning.solvers.unrolled import Hypergradient, Plain, Preconditioned, Unrolled
from spo_lightning.training import microbatch
from spo_lightning.training.observation import Observation

DIRECTIONS = 20
STEP = 1e-7  # of the finite difference of the whole


@pytest.fixture(autouse=True)
def whole_precision(monkeypatch):
    in_float64(monkeypatch)


def second(steps, hvp=None, inner=None, lower_lr=0.05):
    return Unrolled(steps, lower_lr, inner or Plain(), Hypergradient("second"), hvp or Exact())


def implicit(hvp=None, solve=None):
    return Implicit(0.01, 40, 0.01, solve or L.ConjugateGradient(60, 1e-12), hvp or Exact())


def unrolled_point(solver, problem, theta, scale):
    """theta_K, written out."""
    for _ in range(solver.steps):
        slope = problem.gradient(lower_terms, theta).direction
        slope = slope if scale is None else tuple(p * s for p, s in zip(scale, slope))
        theta = moved(theta, slope, -solver.lower_lr)
    return theta


def proximal_point(solver, problem, theta, scale):
    """The proximal optimum by plain gradient descent on G + |phi - theta|^2 / 2 gamma."""
    point = theta
    for _ in range(90):
        slope = problem.gradient(lower_terms, point).direction
        pull = [(p.detach() - t.detach()) / solver.gamma for p, t in zip(point, theta)]
        point = moved(point, tuple(s + q for s, q in zip(slope, pull)), -0.006)
    return point


class Compare(Callback):
    """On the first batch: the solver's direction beside the slope of the composed objective."""

    def __init__(self, solver, point, directions=DIRECTIONS):
        self.solver, self.point, self.directions = solver, point, directions

    def on_train_batch_start(self, trainer, module, batch, index):
        problem = module._problem(batch, Observation(0.1, False, False))
        theta = tuple(p.detach().clone() for p in problem.theta)
        # P of the inner steps is a constant of the outer step: any will do
        squares = tuple(torch.rand_like(t) * 1e-3 for t in theta)
        state = {"squares": squares}
        slope = problem.gradient(lower_terms, theta).direction
        scale = getattr(self.solver, "inner", Plain()).scale(state, slope)
        found = self.solver.step(problem, state).direction

        def whole(at):
            point = self.point(self.solver, problem, at, scale)
            with torch.no_grad():
                return problem.upper(point).mean()

        self.off = []
        generator = torch.Generator().manual_seed(1)
        for _ in range(self.directions):
            along = tuple(torch.randn(t.shape, generator=generator).double() for t in theta)
            ahead, back = (whole(moved(theta, along, sign * STEP)) for sign in (1, -1))
            expected = ((ahead - back) / (2 * STEP)).item()
            self.off.append(abs(dot(found, along).item() - expected) / abs(expected))


def worst(solver, point, directions=DIRECTIONS, micro=3):
    made = policy("llama")
    compare = Compare(solver, point, directions)
    shifted = scored(
        made.lm, shift=lambda number, r: 0.1 * torch.cos(torch.arange(len(r)) + number)
    )
    fitted(
        made, objective("loss=dpo", "loss.beta=0.5", "solver=none"), shifted, steps=1,
        batch_size=6, micro=micro, callbacks=[compare],
    )  # fmt: skip
    return max(compare.off)


@pytest.fixture(params=["apart", "kept"])
def micro(request, monkeypatch):
    """Pairs per forward: two parts, or one, in which one inner step keeps its graph."""
    if request.param == "apart":
        yield 3
        return
    monkeypatch.setattr(models, "ROOM", 99)
    products = []
    whole = microbatch.linearized_at

    def noted(*arguments):
        products.append(1)
        return whole(*arguments)

    monkeypatch.setattr(microbatch, "linearized_at", noted)
    yield 6
    assert len(products) == (request.node.callspec.params.get("steps") == 1)


@pytest.mark.parametrize("steps", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_unrolled_second_order(steps, micro):
    assert worst(second(steps), unrolled_point, micro=micro) < 1e-5


@pytest.mark.parametrize("steps", [1, 2])
def test_unrolled_second_order_preconditioned(steps, micro):
    solver = second(steps, inner=Preconditioned(0.9, 1e-2), lower_lr=0.02)
    assert worst(solver, unrolled_point, micro=micro) < 1e-5


def test_finite_difference_products():
    # this model is strongly curved; the size that float32 asks for errs by 3e-4 here
    assert worst(second(2, FiniteDifference(1e-8)), unrolled_point) < 1e-5


@pytest.mark.slow
def test_implicit():
    assert worst(implicit(), proximal_point, micro=6) < 1e-5


def exact(problem, theta, vector):
    return Exact()(problem, theta, vector)


BROKEN = {
    "sign": lambda p, t, v: tuple(-x for x in exact(p, t, v)),
    "scale": lambda p, t, v: tuple(1.05 * x for x in exact(p, t, v)),
    "none": lambda p, t, v: tuple(torch.zeros_like(x) for x in v),
    "sum in place of mean": lambda p, t, v: tuple(6 * x for x in exact(p, t, v)),
    "first tensor only": lambda p, t, v: (
        exact(p, t, v)[0], *(torch.zeros_like(x) for x in v[1:])
    ),
    "another batch's point": lambda p, t, v: exact(p, moved(t, v, 0.5), v),
}  # fmt: skip


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_product_is_caught_in_unrolled(how):
    assert worst(second(1, BROKEN[how]), unrolled_point, directions=3) > 1e-4


def test_products_at_the_wrong_point_of_the_path_are_caught():
    def at_the_start(problem, theta, vector):
        return exact(problem, problem.theta, vector)

    assert worst(second(3, at_the_start), unrolled_point, directions=3) > 1e-4


@pytest.mark.parametrize(
    "how", ["sign", *(pytest.param(how, marks=pytest.mark.slow) for how in ("scale", "none"))]
)
def test_a_broken_product_is_caught_in_implicit(how):
    try:
        assert worst(implicit(BROKEN[how]), proximal_point, directions=2, micro=6) > 1e-4
    except Diverged as refused:  # the wrong sign makes the largest eigenvalue a negative one
        assert how == "sign" and "curvature" in str(refused)


def test_a_broken_precondition_is_caught():
    class Doubled(Preconditioned):
        def scale(self, state, slope):
            return tuple(2 * p for p in super().scale(state, slope))

    solver = second(1, inner=Doubled(0.9, 1e-2), lower_lr=0.02)

    def point(solver, problem, theta, scale):
        return unrolled_point(solver, problem, theta, tuple(p / 2 for p in scale))

    assert worst(solver, point, directions=3) > 1e-4


def test_an_inner_product_in_blocks_is_that_of_the_whole():
    draw = torch.Generator().manual_seed(0)
    shapes = [(3, BLOCK + 1), (7,), ()]
    one, two = (
        tuple(torch.randn(shape, generator=draw).bfloat16() for shape in shapes) for _ in range(2)
    )
    whole = sum((x.double() * y.double()).sum() for x, y in zip(one, two))
    torch.testing.assert_close(dot(one, two), whole, rtol=1e-12, atol=0)
