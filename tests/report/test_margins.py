"""Chosen answers over the margin, of runs whose numbers were written by hand."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from spo_lightning.report.reading import runs_of
from spo_lightning.report.settings import Sweep
from spo_lightning.report.sweep_charts import margins


def write(room, weight, seed, chosen, rejected):
    """A run from -10 and -20 nats, looked at every ten steps."""
    room.mkdir(parents=True)
    OmegaConf.save(
        OmegaConf.create({"seed": seed, "solver": {"weight": weight}}), room / "config.yaml"
    )
    init = {"logps/chosen": -10.0, "logps/rejected": -20.0}
    final = {"logps/chosen": chosen[-1], "logps/rejected": rejected[-1]}
    (room / "metrics.json").write_text(json.dumps({"init": init, "final": final, "choices": {}}))
    with (room / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", "eval/logps/chosen", "eval/logps/rejected"])
        rows.writerows((10 * n, *both) for n, both in enumerate(zip(chosen, rejected), 1))


def test_a_line_per_setting_from_the_start_over_the_mean_of_its_seeds(tmp_path):
    write(tmp_path / "a0", 0.1, 0, [-11.0, -13.0], [-23.0, -30.0])
    write(tmp_path / "a1", 0.1, 1, [-10.0, -12.0], [-22.0, -28.0])
    write(tmp_path / "b0", 1.0, 0, [-9.0, -8.0], [-21.0, -22.0])
    (chart,) = margins(Sweep(runs_of([tmp_path])))
    lines = {one["name"]: one for one in chart.data}
    weak, strong = lines["solver.weight=0.1"], lines["solver.weight=1.0"]
    assert weak["y"] == pytest.approx([0, -0.5, -2.5])
    assert weak["x"] == pytest.approx([0, -0.5 + 2.5, -2.5 + 9])
    assert strong["y"] == pytest.approx([0, 1, 2]) and strong["x"] == pytest.approx([0, 2, 4])
    assert weak["text"][1] == "solver.weight=0.1, step 10"


def test_runs_that_were_not_looked_at_have_no_line(tmp_path):
    write(tmp_path / "a", 0.1, 0, [-11.0], [-23.0])
    (tmp_path / "a/metrics.csv").write_text("step,train/loss\n1,0.5\n2,0.4\n")
    assert margins(Sweep(runs_of([tmp_path]))) == []
