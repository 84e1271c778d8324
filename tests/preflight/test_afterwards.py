"""What was foreseen beside what came: by hand, and by the commands themselves."""

import json

import pytest
from conftest import SMALL, forked

from spo_lightning.errors import UserError
from spo_lightning.preflight import afterwards
from spo_lightning.preflight.afterwards import Ahead, Came, report, row
from spo_lightning.preflight.asked import telling

RUN = {
    "loss": {"_target_": "spo_lightning.losses.dpo"},
    "solver": {"_target_": "spo_lightning.solvers.penalty.Penalty", "weight": 0.3},
    "optimizer": {"lr": 5e-5},
    "seed": 2,
}


def test_a_row_by_hand():
    """Three pairs in common; the pilot's mean is -1, four steps of one are four of it."""
    measured = {1: -2.0, 2: -1.0, 3: 0.0}
    one = Ahead(RUN, 1, 2, {1: 0.1, 2: 0.3, 3: 0.2, 9: 5.0}, measured, measured, measured)
    cells = dict(zip(afterwards.HEAD, row(one, Came(RUN, 4, {1: -8.0, 2: -5.0, 3: 1.0, 4: 9.0}))))
    assert cells["run"] == "dpo + Penalty 0.3, lr 5e-05" and cells["seed"] == 2
    assert cells["pairs"] == 3 and cells["step"] == 4 and cells["of steps"] == 1
    assert cells["pilots"] == 2
    assert cells["score ranks"] == pytest.approx(0.5) and cells["pilots rank"] == pytest.approx(1)
    assert cells["first ranks"] == pytest.approx(1)
    # all of it first order: -4 +- 1.96 * 4 / sqrt(3)
    assert cells["foreseen"] == "-8.53 to +0.53"
    assert cells["measured"] == pytest.approx(-4) and cells["inside"] == "yes"
    assert cells["displaced"] == "67%" and cells["displaced, foreseen"] == "67% to 67%"
    far = dict(zip(afterwards.HEAD, row(one, Came(RUN, 5, {1: -8.0, 2: -5.0, 3: 1.0}))))
    assert far["inside"] == far["foreseen"] == "" and far["score ranks"] == pytest.approx(0.5)
    wrong = row(one, Came(RUN, 2, {1: 8.0, 2: 5.0, 3: 1.0}))
    assert dict(zip(afterwards.HEAD, wrong))["inside"] == "no"


def test_a_run_on_its_way_has_not_come_to_anything(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 2\n")
    (tmp_path / "metrics.json").write_text('{"init": {"logps/chosen": -3.0}, "final": null}')
    assert afterwards.ended(tmp_path) is None
    (tmp_path / "metrics.json").write_text('{"init": {}, "final": {"logps/chosen": -3.0}}')
    with pytest.raises(UserError, match="no config.yaml, metrics.json and pairs.jsonl of a run"):
        afterwards.ended(tmp_path)


def test_a_text_with_a_separator_of_lines_is_read(tmp_path):
    told = '{"row": 3, "logps/chosen": -2.0, "reference/chosen": -3.0, "text": "a\u2028b\x85c"}\n'
    (tmp_path / "config.yaml").write_text("seed: 2\n")
    (tmp_path / "metrics.json").write_text('{"final": {"nll/chosen": 1.0}, "steps": 2}')
    (tmp_path / "pairs.jsonl").write_text(told, encoding="utf-8")
    found = afterwards.ended(tmp_path)
    assert found is not None and found.changes == {3: 1.0}


def test_the_layout_that_a_run_found_is_no_other_data():
    """A preflight keeps the words, a run what it read them as."""
    asked = {"data": {"path": "a.jsonl", "layout": None}, "seed": 1}
    assert telling(asked) == telling({**asked, "data": {"path": "a.jsonl", "layout": "hh"}})
    assert telling(asked) != telling({**asked, "data": {"path": "b.jsonl", "layout": None}})
    assert telling(telling(asked)) == telling(asked)


@pytest.mark.slow
def test_a_run_and_a_pilot_as_long_as_it_are_the_same(tmp_path, cache):
    words = (*SMALL, cache, "loss=spo", "seed=3", "max_steps=4", "eval.max_rows=6")
    few = ("preflight.max_pairs=6", "preflight.weights=[]")
    for steps in (2, 4):
        place = (f"preflight.pilot_steps={steps}", f"hydra.run.dir={tmp_path / str(steps)}")
        ahead = forked(tmp_path, *words, *few, *place, module=("-m", "spo_lightning.preflight"))
        assert ahead.code == 0, ahead.err
    run = forked(tmp_path, *words, f"hydra.run.dir={tmp_path / 'r'}")
    assert run.code == 0, run.err
    other = forked(tmp_path, *words, "loss.beta=0.7", f"hydra.run.dir={tmp_path / 'other'}")
    assert other.code == 0, other.err
    text = report([tmp_path], tmp_path / "out")
    head, _, first, second = text.splitlines()
    assert first == second and "| 2 | 4 | 6 |" in first and head.startswith("| run | seed |")
    assert (tmp_path / "out/afterwards.html").stat().st_size > 10_000
    names = {path.name for path in (tmp_path / "out/figures").iterdir()}
    assert names == {
        f"{what}_0.{kind}" for what in ("score", "measured") for kind in ("png", "svg")
    }


def test_what_does_not_belong_together_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no such directory"):
        report([tmp_path / "none"], tmp_path / "out")
    found = {
        "run": RUN,
        "pilot_steps": 2,
        "pilots": [{}],
        "pairs": [{"row": 1, "score": 1.0, "measured": 2.0}],
    }
    (tmp_path / "a").mkdir()
    (tmp_path / "a/preflight.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="preflight.json: not as a preflight writes it"):
        report([tmp_path], tmp_path / "out")
    found["pairs"][0] |= {"first": 1.0, "alone": 2.0}
    (tmp_path / "a/preflight.json").write_text(json.dumps(found))
    with pytest.raises(UserError, match="no preflight stands beside a run"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "a/metrics.json").write_text("{}")
    with pytest.raises(UserError, match="no config.yaml, metrics.json and pairs.jsonl of a run"):
        report([tmp_path], tmp_path / "out")
