"""Microbatches change nothing, for every solver; state travels as plain data."""

import pytest
import torch
from quadratics import (
    SIZE,
    START,
    TILT,
    VALUE,
    F,
    G,
    build,
    close,
    direction,
    penalty,
    rows_of,
    unrolled,
    vector,
    walk,
)  # fmt: skip

from spo_lightning.solvers import linear as L
from spo_lightning.solvers import penalty as P
from spo_lightning.solvers import values as V
from spo_lightning.solvers import weights as W
from spo_lightning.solvers.alternating import Alternating, Coin, LargerGap
from spo_lightning.solvers.implicit import Implicit
from spo_lightning.solvers.none import NoLower
from spo_lightning.solvers.products import Exact, FiniteDifference
from spo_lightning.solvers.unrolled import Hypergradient, Preconditioned

PROXIMAL = {"gamma": 0.3, "steps": 4, "lower_lr": 0.2}
SOLVERS = [
    NoLower(),
    unrolled(steps=3, lower_lr=0.1),
    penalty(phi=P.Linear(), unit="sequence"),
    penalty(unit="sequence"),
    penalty(phi=P.Softplus(0.1), unit="sequence"),
    penalty(level=P.RunningMean(0.5), margin=0.1, unit="sequence"),
    penalty(value=V.RunningMin(0.5), margin=0.1, schedule=W.Ramp(4)),
    penalty(phi=P.Softplus(0.2), level=P.RunningMean(0.5), value=V.RunningMin(0.5)),
    penalty(value=V.Inner(2, 0.1, restart=False), unit="sequence"),
    penalty(phi=P.Linear(), value=V.Inner(2, 0.1, restart=True), schedule=W.SlackBarrier(0.5)),
    penalty(phi=P.Linear(), level=P.RunningMean(0.5), schedule=W.DualAscent(0.3), weight=0.0),
    unrolled(inner=Preconditioned(0.5, 1e-3), steps=2, lower_lr=0.05),
    unrolled(apply=Hypergradient("first"), steps=2),
    unrolled(apply=Hypergradient("second"), steps=3),
    unrolled(apply=Hypergradient("second"), inner=Preconditioned(0.5, 1e-3), lower_lr=0.05),
    Implicit(**PROXIMAL, solve=L.ConjugateGradient(5, 1e-6), hvp=Exact()),
    Implicit(**PROXIMAL, solve=L.Neumann(5, 0.0), hvp=Exact()),
    Implicit(**PROXIMAL, solve=L.Richardson(5, 0.0, 0.5), hvp=Exact()),
    Alternating(Coin(0), weight=1.0, unit="sequence", beta=0.1),
    Alternating(LargerGap(2, 0.0, 0.0), weight=5.0, unit="token", beta=0.1),
]


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


def test_finite_differences_agree_over_microbatches():
    rows = [slice(0, 1), slice(1, 4), slice(4, 6)]
    solver = unrolled(apply=Hypergradient("second"), hvp=FiniteDifference(None), steps=3)
    whole, parts = (walk(solver, split) for split in (None, [(r, r) for r in rows]))
    torch.testing.assert_close(parts, whole, atol=1e-8, rtol=0)
