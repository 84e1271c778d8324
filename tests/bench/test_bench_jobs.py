"""what=jobs: one job end to end, and its arithmetic. Never how long it took."""

import json
import sys

import pytest
from benches import SHORT, TINY, bench_config, measured, refused
from conftest import command

from spo_lightning.bench import asked, jobs
from spo_lightning.bench.contestants import CONTESTANTS
from spo_lightning.errors import Diverged
from spo_lightning.records.progress import silent

JOBS = (*("what=jobs", *TINY, *SHORT), "betas=[0.1]", "weights=[1]", "steps=2", "pairs=8")


@pytest.mark.slow
def test_one_job(tmp_path):
    if not CONTESTANTS["trl"].installed:
        pytest.skip("needs TRL")
    words = ("hydra.run.dir=run",)
    done = command(tmp_path, *JOBS, *words, module=("-m", "spo_lightning.bench"), timeout=500)
    assert (done.code, done.err) == (0, "")
    left = {path.name for path in (tmp_path / "run").iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md", "bench.log"}
    numbers = json.loads((tmp_path / "run/bench.json").read_text())
    (row,) = numbers["jobs"]
    assert (row["beta"], row["weight"]) == (0.1, 1) and row["stages"]["training"] > 0
    assert numbers["totals"]["ours"]["seconds"] == row["ours"] > numbers["imports"]["ours"] * 0.5
    assert numbers["totals"]["trl_over"] == row["trl"] / row["ours"]
    text = (tmp_path / "run/table.md").read_text()
    assert text in done.out and "imports of ours" in text and "jobs 4/4" in done.out


@pytest.mark.slow
def test_jobs_that_ended_are_kept(tmp_path):
    with pytest.raises(Diverged, match="solver.weight=inf: it must be finite"):
        measured(tmp_path / "run", *JOBS, "peer=false", "weights=[1,inf]")
    numbers = json.loads((tmp_path / "run/bench.json").read_text())
    (row,) = numbers["jobs"]
    assert row["weight"] == 1 and numbers["totals"]["ours"]["seconds"] == row["ours"]


@pytest.mark.parametrize(
    "word, says",
    [
        ("betas=[0]", "betas=[0]: it must be above 0"),
        ("weights=[]", "name at least one"),
        ("pairs=0", "pairs=0: it must be at least 1"),
        ("model.revision=x", "model.revision has no effect"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *JOBS, word)


@pytest.fixture
def made(tmp_path):
    cfg = bench_config(*JOBS, 'train=["log.every_n_steps=50"]')
    return jobs.Jobs(cfg, asked.cell_of(cfg), tmp_path, silent())


def test_both_sides_are_told_the_same(made):
    ours, trl = made.ours("0", 0.3, 10.0, 7), made.trl("0", 0.3, 7)
    said = dict(word.split("=", 1) for word in ours[1:])
    theirs = json.loads(trl[1])
    settings = theirs["settings"]
    assert (said["loss.beta"], settings["beta"]) == ("0.3", 0.3)
    assert settings["torch_compile"] is False
    assert (said["max_steps"], settings["max_steps"]) == ("7", 7)
    assert (said["optimizer.lr"], settings["learning_rate"]) == ("0.0001", 0.0001)
    assert (said["batch_size"], settings["per_device_train_batch_size"]) == ("2", 2)
    assert (said["data.path"], said["model.pretrained"]) == (theirs["rows"], theirs["model"])
    assert (said["solver.weight"], said["loss"]) == ("10.0", "spo")
    assert ours[-1] == "log.every_n_steps=50"
    assert len((made.room / "pairs.jsonl").read_text().splitlines()) == 8
    assert made.environment["OMP_NUM_THREADS"] == "1"


def test_a_process_that_fails_ends_it_in_one_line(made):
    assert made.run([sys.executable, "-c", "pass"], "nothing") > 0
    code = "print('a'); import sys; sys.exit('no such thing')"
    with pytest.raises(Diverged, match="^ours: its run ended with 1: no such thing$"):
        made.run([sys.executable, "-c", code], "ours")


def test_totals():
    rows = [
        {"beta": 0.1, "weight": w, "ours": 2.0, "trl": t, "stages": {"training": 1.0}}
        for w, t in ((1.0, 6.0), (3.0, 10.0))
    ]
    found = jobs.totals(rows, {"ours": 1.0, "trl": 2.0}, ["ours", "trl"])
    assert found["ours"] == {"seconds": 4.0, "import_share": 0.5}
    assert found["trl"] == {"seconds": 16.0, "import_share": 0.25}
    assert found["trl_over"] == 4 and found["trl_over_job"] == {"min": 3, "max": 5}
    setting = {"device": "cpu", "threads": 1, "precision": "32-true", "parameters": 10}
    setting |= {"vocabulary": 512, "pairs": 8, "steps": 2, "batch_size": 2, "train": []}
    setting |= {"prompt": [4, 9], "completion": [3, 6]}
    numbers = {"setting": setting, "imports": {"ours": 1.0, "trl": 2.0}, "jobs": rows}
    text = jobs.table({**numbers, "totals": found})
    assert "| all  |        | 4.0     | 16.0   | 4.00       |" in text
    assert "imports of TRL: 2.00 s a run, 25.0% of its total" in text
    for row in rows:
        row.pop("trl")
    alone = jobs.totals(rows, {"ours": 1.0}, ["ours"])
    assert "TRL" not in jobs.table({**numbers, "totals": alone})
