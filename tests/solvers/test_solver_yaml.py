"""Every solver yaml builds what it says and refuses what it does not read."""

import itertools

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from hydra.utils import instantiate
from pairs import CONF
from quadratics import penalty, uneven, unrolled, walk

from spo_lightning.solvers import penalty as P
from spo_lightning.solvers import values as V
from spo_lightning.solvers import weights as W
from spo_lightning.solvers.products import Automatic

PRIMARY = f"""
seed: 0
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
LINEAR_REFUSES = {"mean", "running_min", "inner"}
FOLLOWS = {"dual", "barrier"}  # weights that follow the violation, of phi=linear only


def refused(phi, *rest):
    if FOLLOWS & set(rest):
        return phi != "linear"
    return phi == "linear" and bool(LINEAR_REFUSES & set(rest))


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
    if refused(*chosen):
        with pytest.raises(HydraException, match="linear"):
            instantiate(node)
        return
    solver = instantiate(node)
    assert isinstance(solver, P.Penalty)
    assert len(walk(solver, None)) == 4


VARIANTS = {
    "unrolled": ["inner", "apply", "hvp"],
    "implicit": ["solve", "hvp"],
    "alternating": ["pick"],
}


@pytest.mark.parametrize("solver", VARIANTS)
def test_every_variant_of_the_other_solvers(solver, composed):
    groups = VARIANTS[solver]
    for chosen in itertools.product(*(options(f"solver/{group}") for group in groups)):
        overrides = [f"solver/{group}={option}" for group, option in zip(groups, chosen)]
        built = instantiate(composed(f"solver={solver}", *overrides).solver)
        assert torch.isfinite(torch.cat([seen[0] for seen in walk(built, None)])).all()


def test_spo_and_its_knobs_on_the_command_line(composed):
    spo = instantiate(composed("loss=spo").solver)
    assert spo == P.Penalty(
        phi=P.Hinge(), level=P.PerPair(), value=V.Reference(), schedule=W.Constant(),
        weight=1.0, margin=0.0, unit="sequence", beta=0.1,
    )  # fmt: skip
    cfg = composed(
        "loss=spo", "loss.beta=0.3", "solver.weight=3", "solver/phi=softplus",
        "solver.phi.temperature=0.2", "solver/value=running_min", "solver/schedule=ramp",
        "solver.schedule.steps=50",
    )  # fmt: skip
    assert cfg.loss == composed("loss=dpo", "loss.beta=0.3").loss
    assert instantiate(cfg.solver) == penalty(
        phi=P.Softplus(0.2), value=V.RunningMin(0.9), schedule=W.Ramp(50),
        weight=3, unit="sequence", beta=0.3,
    )  # fmt: skip


def test_the_unit_follows_the_loss(composed):
    simpo = instantiate(composed("loss=simpo", "solver=penalty", "solver.weight=3").solver)
    assert (simpo.unit, simpo.beta, simpo.weight) == ("token", 2.0, 3)
    assert instantiate(composed("loss=spo", "solver=unrolled").solver) == unrolled(
        lower_lr=0.1, hvp=Automatic(None)
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
        ["solver=unrolled", "solver.apply.order=second"],  # adapted has no order
        ["solver=implicit", "solver.solve.step=0.1"],  # nor has cg a step
        ["solver=alternating", "solver.pick.every=5"],  # nor does the coin look
    ],
)
def test_knobs_that_are_not_there_are_refused(overrides, composed):
    with pytest.raises(HydraException):
        composed(*overrides)
