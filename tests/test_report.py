"""The report command: what it draws of runs, how it tells repetitions, what it refuses."""

import json
import re

import pytest
from conftest import SMALL, command
from omegaconf import OmegaConf

from spo_lightning.report.table import finished, settings

MODULE = ("-m", "spo_lightning.report")


@pytest.fixture(scope="module")
def run(tmp_path_factory, cache):
    room = tmp_path_factory.mktemp("report")
    words = (*SMALL, "loss=dpo", "diagnostics.evolution.every_n_steps=1", cache)
    done = command(room, *words, "hydra.run.dir=run")
    assert done.code == 0, done.err
    return room / "run"


def marks(svg):
    """Points of the scatter plots."""
    groups = re.findall(r'<g id="PathCollection_\d+">.*?\n   </g>', svg, re.S)
    return sum(group.count("<use ") for group in groups)


@pytest.mark.slow
def test_steps_are_drawn_where_evolution_was_watched(run, tmp_path):
    done = command(tmp_path, str(run), module=MODULE)
    assert done.code == 0 and "exact_match" in done.out
    assert (run / "steps.png").read_bytes().startswith(b"\x89PNG")
    pairs = len((run / "evolution.csv").read_text().splitlines()) - 1
    assert marks((run / "steps.svg").read_text()) == 2 * pairs > 0  # one per pair and side


def test_a_directory_without_a_finished_run_is_refused_and_kept(tmp_path):
    (tmp_path / "study").mkdir()
    (tmp_path / "study/table.md").write_text("mine")
    done = command(tmp_path, "study", module=MODULE)
    assert (done.code, done.out) == (2, "")
    assert done.err.strip() == "error: no finished run (metrics.json) in study"
    assert (tmp_path / "study/table.md").read_text() == "mine"


def runs(top, configs):
    for number, config in enumerate(configs):
        room = top / str(number)
        room.mkdir()
        OmegaConf.save(OmegaConf.create(config), room / "config.yaml")
        numbers = {"init": {}, "final": {"exact_match": 0.5}, "choices": {"loss": "dpo"}}
        (room / "metrics.json").write_text(json.dumps(numbers))
    return settings(finished([top]))


def test_keys_that_follow_the_seed_do_not_tell_settings_apart(tmp_path):
    """solver=alternating has a coin of its own, seeded by the run's seed."""
    configs = [
        {"seed": s, "solver": {"pick": {"seed": s}}, "beta": b} for s in (3, 4) for b in (0.1, 0.3)
    ]
    found = runs(tmp_path, configs)
    assert set(found) == {"beta=0.1", "beta=0.3"}
    assert all(set(seeds) == {3, 4} for seeds in found.values())


def test_a_seed_of_its_own_tells_settings_apart(tmp_path):
    found = runs(tmp_path, [{"seed": s, "data": {"seed": d}} for s in (0, 1) for d in (0, 7)])
    assert set(found) == {"data.seed=0", "data.seed=7"}
