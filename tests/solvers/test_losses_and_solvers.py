"""Every loss with every solver: two steps, finite, and the parameters move on the second."""

from dataclasses import replace

import pytest
import torch
from fitting import Watch, config, fitted, objective, scored
from pairs import CONF
from tiny import policy, random_pairs

from spo_lightning.errors import UserError
from spo_lightning.run.job import refuse_processes
from spo_lightning.world import World

LOSSES = sorted(path.stem for path in CONF.joinpath("loss").glob("*.yaml"))
SOLVERS = sorted(path.stem for path in CONF.joinpath("solver").glob("*.yaml"))
PARTS = ["loss.parts.dpo.weight=1", "loss.parts.sft.weight=0.1"]
SECOND = ["solver/apply=hypergradient", "solver.apply.order=second"]
# the others are of the same kinds, and take minutes
ONE_OF_A_KIND = ("slic", "alpha_dpo", "aot", "odpo", "kto")


def cases():
    for loss in LOSSES:
        for solver in SOLVERS:
            marks = [] if loss in ONE_OF_A_KIND else [pytest.mark.slow]
            yield pytest.param(loss, [f"solver={solver}"], marks=marks, id=f"{loss}-{solver}")
    yield pytest.param("aot", ["solver=unrolled", *SECOND], id="aot-second")


def words(loss, solver):
    # spo names its solver itself, and is refused without
    solver = ["solver=penalty"] if loss == "spo" and solver == ["solver=none"] else solver
    return [f"loss={loss}", *solver, *(PARTS if loss == "mixture" else [])]


def given(made):
    """Pairs with a reference that is not the policy, and with score differences."""
    found = scored(made.lm, shift=lambda number, r: 0.03 if number % 2 else -0.02)
    some = [
        replace(p, margin=0.5 + n, sentences=(1, len(p.chosen)), reference_side=float(n % 2))
        for n, p in enumerate(found.pairs)
    ]
    return replace(found, pairs=some)


def answers(made):
    """Rows of one answer each, of which few are good ones; some batches have none of them."""
    rows = [
        replace(p, rejected=()) if n in (1, 6) else replace(p, chosen=())
        for n, p in enumerate(random_pairs(12))
    ]
    return scored(made.lm, rows, shift=lambda number, r: 0.03 if number % 2 else -0.02)


@pytest.mark.parametrize(("loss", "solver"), cases())
def test_a_loss_trains_with_a_solver(loss, solver):
    made, line = policy("gpt2"), words(loss, solver)
    whole = config(*line).loss.get("whole_batch", False)
    watch = Watch(keep=True)
    how = {"steps": 2, "micro": 8 if whole else 3, "whole_batch": whole, "watch": watch}
    rows = answers(made) if config(*line).loss.get("unpaired") else given(made)
    fit = fitted(made, objective(*line), rows, **how)
    for row in fit.numbers:
        assert all(torch.tensor(v).isfinite() for v in row.values()), row
    moved = [(a - b).abs().max() for a, b in zip(*(w.values() for w in watch.parameters))]
    assert max(moved) > 0


def test_a_whole_batch_is_never_read_in_parts():
    """One step of second order keeps a graph where it fits, and reads other losses in parts."""
    ahead = {}
    for hvp, whole in (("auto", True), ("finite_difference", True), ("auto", False)):
        made = policy("gpt2")
        # a graph of the chosen answers alone is small beside these rows
        long = [replace(p, rejected=p.rejected * 6) for p in random_pairs(12)]
        found = scored(made.lm, long, shift=lambda number, r: 0.03 if number % 2 else -0.02)
        chosen = objective("loss=aot_unpaired", "solver=unrolled", *SECOND, f"solver/hvp={hvp}")
        fit = fitted(made, chosen, found, steps=1, whole_batch=whole)
        ahead[hvp, whole] = fit.numbers[0]["train/solver/upper_ahead"]
    whole = ahead["finite_difference", True]
    assert ahead["auto", True] == pytest.approx(whole, rel=1e-9)
    assert ahead["auto", False] != pytest.approx(whole, rel=1e-4)


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "kto_pair", "beta_dpo"])
def test_a_whole_batch_is_never_shared(loss):
    with pytest.raises(UserError, match="needs all pairs of an outer step in one process"):
        refuse_processes(config(f"loss={loss}"), World(0, 2))
    refuse_processes(config(f"loss={loss}"), World())
    refuse_processes(config("loss=dpo"), World(0, 2))
