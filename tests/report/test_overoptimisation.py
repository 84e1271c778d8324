"""Where quality turns and what warned of it, of runs whose numbers were written by hand."""

import csv
import json

import pytest
from omegaconf import OmegaConf

from spo_lightning.report.charts import Chart
from spo_lightning.report.overoptimisation import blocks
from spo_lightning.report.page import Note, Table
from spo_lightning.report.reading import runs_of
from spo_lightning.report.settings import Sweep

LIKELY = [-10.0, -12.0, -14.0, -16.0, -18.0]  # of the chosen answers, at steps 0, 10 .. 40


def parabola(x):
    return 0.9 - 0.01 * (x + 13) ** 2


def write(room, beta, seed, quality, alarm):
    """A run that was looked at every ten steps; ``alarm``: the step from which it sounds."""
    room.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"seed": seed, "loss": {"beta": beta}}), room / "config.yaml")
    init = {"win_rate": quality[0], "logps/chosen": LIKELY[0]}
    init |= {"entropy/top10": 0.2, "mass/top10": 1.0}
    final = {"win_rate": quality[-1], "logps/chosen": LIKELY[-1]}
    told = {"init": init, "final": final, "choices": {"loss": "dpo"}}
    (room / "metrics.json").write_text(json.dumps(told))
    names = ("win_rate", "logps/chosen", "entropy/top10", "mass/top10")
    with (room / "metrics.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["step", *(f"eval/{n}" for n in (*names, "overoptimisation/alarm"))])
        for n in range(1, 5):
            sounds = float(alarm is not None and 10 * n >= alarm)
            rows.writerow([10 * n, quality[n], LIKELY[n], 0.2 + 0.1 * n, 1 - 0.01 * n, sounds])


@pytest.fixture
def sweep(tmp_path):
    for seed, shift in ((0, 0.0), (1, 0.02)):
        falls = [parabola(x) + shift for x in LIKELY]
        write(tmp_path / f"weak-{seed}", 0.1, seed, falls, 30)
        write(tmp_path / f"strong-{seed}", 1.0, seed, [0.5, 0.5, 0.6, 0.6, 0.7], None)
    return Sweep(runs_of([tmp_path]))


def test_the_table_says_whether_stopping_was_right(sweep):
    (table,) = [block for block in blocks(sweep) if isinstance(block, Table)]
    rows = {row[0]: row[1:] for row in table.rows}
    best, step, alarm, there, end, gained, word = rows["loss.beta=0.1"]
    assert best == pytest.approx(parabola(-12.0) + 0.01) and step == 10
    assert alarm == "30, 30" and word == "right"
    assert there.startswith(f"{parabola(-16.0) + 0.01:.3f}")
    assert end.startswith(f"{parabola(-18.0) + 0.01:.3f}")
    assert gained.startswith(f"{parabola(-16.0) - parabola(-18.0):+.3f}")
    assert rows["loss.beta=1.0"][2:4] == ["none", ""] and rows["loss.beta=1.0"][6] == ""


def test_the_curves_begin_before_training_and_mark_the_alarm(sweep):
    charts = {b.key: b for b in blocks(sweep) if isinstance(b, Chart)}
    over = charts["overoptimisation_likelihood"].data
    weak = next(one for one in over if one["name"] == "loss.beta=0.1")
    assert weak["x"] == LIKELY
    assert weak["y"] == pytest.approx([parabola(x) + 0.01 for x in LIKELY])
    (ring,) = [one for one in over if one["marker"]["symbol"] == "circle-open"]
    assert (ring["x"], ring["y"]) == ([-16.0], pytest.approx([parabola(-16.0) + 0.01]))
    entropy = charts["overoptimisation_entropy_top10"].data[0]
    assert entropy["x"] == [0, 10, 20, 30, 40]
    assert entropy["y"] == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])


def test_a_parabola_fits_a_parabola(tmp_path):
    write(tmp_path / "run", 0.1, 0, [parabola(x) for x in LIKELY], None)
    (note,) = [b for b in blocks(Sweep(runs_of([tmp_path]))) if isinstance(b, Note)]
    assert "through the 5 points" in note.text and "a parabola by 0.000, 100% less" in note.text


def test_runs_that_were_not_followed_have_no_such_section(tmp_path):
    write(tmp_path / "run", 0.1, 0, [0.5] * 5, None)
    (tmp_path / "run/metrics.csv").write_text("step,train/loss\n1,0.7\n2,0.6\n")
    assert blocks(Sweep(runs_of([tmp_path]))) == []
