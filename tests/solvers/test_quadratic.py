"""Where every solver ends on the quadratic, as the documentation's picture shows it."""

import json

import pytest
import torch
from fitting import config

from spo_lightning.config.build import built


@pytest.fixture(scope="module")
def numbers(tmp_path_factory):
    study = built(config("experiment=solvers_on_a_quadratic").study)
    where = tmp_path_factory.mktemp("quadratic")
    steps = []
    found = study.run(where, lambda: steps.append(1))
    assert len(steps) == study.total
    assert json.loads((where / "numbers.json").read_text()) == json.loads(json.dumps(found))
    written = study.report(where)
    assert {path.name for path in written} == {"table.md", "solvers.svg", "solvers.png"}
    assert all(path.stat().st_size > 500 for path in written)
    return {end["path"]: torch.tensor([end["x"], end["y"]]) for end in found["ends"]}


@pytest.mark.parametrize(
    ("path", "place", "within"),
    [
        ("none", (-1.0, 2.0), 1e-3),
        ("penalty, linear", (-0.202680067, 1.269681742), 1e-3),
        ("penalty, hinge", (0.513245250, 0.008473561), 0.02),
        ("penalty, barrier", (0.513245250, 0.008473561), 1e-3),
        ("penalty, BOME", (1.0, -1.0), 0.2),
        ("alternating, coin", (-0.202680067, 1.269681742), 0.15),
        ("unrolled, adapted", (-0.202680067, 1.269681742), 0.1),
        ("unrolled, hypergradient", (-1.765957447, 2.404255319), 1e-3),
        ("implicit", (-1.625, 2.5), 1e-2),  # b + gamma A (b - a), gamma .25
    ],
)
def test_where_each_solver_ends(numbers, path, place, within):
    assert torch.dist(numbers[path], torch.tensor(place)).item() < within
