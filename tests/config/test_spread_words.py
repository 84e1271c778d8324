"""What does not go with hardware=fsdp is refused before anything is loaded, by its key."""

import pytest
from fitting import SOLVERS, config

from spo_lightning.config.sharded import SHARDED, check_sharded
from spo_lightning.errors import UserError
from spo_lightning.run.job import refuse_processes
from spo_lightning.world import World

SPREAD = "hardware=fsdp"
REFUSED = {
    "model.quantize": ("model.quantize=nf4",),
    "hardware.compile": ("hardware.compile=true",),
    "data.tokens_per_batch": ("data.tokens_per_batch=512",),
    "diagnostics.geometry.every_n_steps": ("diagnostics.geometry.every_n_steps=5",),
    "diagnostics.evolution.every_n_steps": ("diagnostics.evolution.every_n_steps=5",),
    "solver.hvp._target_": ("solver=implicit", "solver/hvp=exact"),
    "optimizer._target_": ("optimizer=adamw_8bit",),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_does_not_go_is_refused_by_its_key(key):
    with pytest.raises(UserError, match="does not go with hardware=fsdp") as told:
        check_sharded(config(SPREAD, *REFUSED[key]))
    assert str(told.value).startswith(f"{key}=") and "\n" not in str(told.value)
    check_sharded(config("hardware=ddp", *REFUSED[key]))


def test_every_rule_has_its_case():
    assert {key for key, *_ in SHARDED} == REFUSED.keys()


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_goes(solver):
    check_sharded(config(SPREAD, *SOLVERS[solver]))


@pytest.mark.parametrize("words", [("hardware.strategy=fsdp",), (SPREAD, "hardware.strategy=ddp")])
def test_the_strategy_comes_with_its_keys(words):
    with pytest.raises(UserError, match="take hardware=fsdp or hardware=ddp"):
        check_sharded(config(*words))


def test_processes_are_several_and_have_equally_many_pairs():
    with pytest.raises(UserError, match="and here is one"):
        refuse_processes(config(SPREAD, "batch_size=8"), World())
    with pytest.raises(UserError, match="make it a multiple"):
        refuse_processes(config(SPREAD, "batch_size=9"), World(0, 2))
    refuse_processes(config(SPREAD, "batch_size=8"), World(0, 2))
    refuse_processes(config("hardware=ddp", "batch_size=9"), World(0, 2))
