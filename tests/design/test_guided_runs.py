"""A run of guided design: what it leaves, that guidance helps, kills, resumes, refusals."""

import csv
import json
from collections import namedtuple

import pytest
import torch
from conftest import forked
from designs import EXPERIMENT, NETS, TINY, ran
from fitting import config
from hydra import compose, initialize_config_dir
from pairs import CONF
from stops import Killed, ending

from spo_lightning.config import knobs
from spo_lightning.config.build import built
from spo_lightning.config.ranges import RANGES, holds
from spo_lightning.config.studies import goes_on, heeds
from spo_lightning.errors import Interrupted, UserError
from spo_lightning.report.design import markdown, over_seeds, seeded
from spo_lightning.report.reading import read
from spo_lightning.report.run_page import sections
from spo_lightning.report.settings import Setting
from spo_lightning.train import train

Run = namedtuple("Run", "path seed choices init final")  # what a setting reads of one
METHODS = ("data", "unguided", "surrogate", "random")
NAMES = ("hypervolume", "diversity", "spread")
FILES = ("metrics.csv", "metrics.json", "designs.csv", "guidance.csv")
# enough to learn from in two seconds
SHORT = (
    *("problem.variables=6", "problem.generations=20", "study.data.rows=1500"),
    *("study.schedule.times=60", "study.schedule.last=0.25", "study.guidance.samples=64"),
    *(f"study.{net}.width=32" for net in NETS),
    *(f"study.{net}.batch_size=128" for net in NETS),
    *("study.denoiser.steps=300", "study.classifier.steps=300", "study.surrogate.steps=20"),
    *("study.guidance.weight=10", "study.guidance.clamp_every=20"),
)


def left(directory):
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    directory = tmp_path_factory.mktemp("whole")
    ran(directory)
    return directory


@pytest.mark.parametrize(
    "end, at",
    [
        (Interrupted(143, "stopped"), 3),  # the denoiser, before its first checkpoint was due
        (Interrupted(143, "stopped"), 19),  # the classifier
        (Killed(), 3),  # no checkpoint yet
        (Killed(), 12),  # the denoiser has ended
        (Killed(), 28),  # the surrogate
        (Killed(), 45),  # designs are drawn
    ],
)
def test_a_run_that_was_stopped_ends_as_if_it_had_not_been(whole, tmp_path, end, at):
    with pytest.raises(type(end)):
        ran(tmp_path, advance=ending(end, at))
    assert not (tmp_path / "metrics.json").exists()
    ran(tmp_path)
    assert left(tmp_path) == left(whole)
    ends = [torch.load(it / "checkpoints/last.ckpt")["nets"] for it in (tmp_path, whole)]
    for net in NETS:
        same = (torch.equal(a, b) for a, b in zip(*(it[net]["net"].values() for it in ends)))
        assert all(same)


def test_other_seeds_have_other_numbers(whole, tmp_path):
    ran(tmp_path, "seed=1")
    assert all(left(tmp_path)[name] != content for name, content in left(whole).items())


def test_what_a_run_leaves(tmp_path):
    numbers = train(config(EXPERIMENT, "problem=dtlz2", *TINY), tmp_path, {"problem": "dtlz2"})
    assert json.loads((tmp_path / "metrics.json").read_text()) == numbers
    assert set(numbers["init"]) == set(NAMES)
    assert set(numbers["final"]) == {*NAMES, *(f"{n}/{m}" for n in NAMES for m in METHODS)}
    assert numbers["init"]["hypervolume"] == numbers["final"]["hypervolume/unguided"]
    with (tmp_path / "designs.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert {row["weight"] for row in rows if row["method"] == "guided"} == {"0.0", "3.0", "10.0"}
    assert all(-1 <= float(row["x10"]) <= 1 and float(row["f3"]) >= 0 for row in rows)
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "finished"
    for name in ("methods.md", "figures/fronts.png", "figures/hypervolume_by_weight.svg"):
        assert (tmp_path / name).stat().st_size
    charts = {
        c.key: c
        for s in sections(read(tmp_path, "run", {}))
        for c in s.blocks
        if hasattr(c, "key")
    }
    assert {one["type"] for one in charts["fronts"].data} == {"scatter3d"}
    assert [row[0] for row in charts["methods"].rows][:2] == ["best that was known", "guided"]
    assert {"hypervolume_by_weight", "other_classifier_accuracy"} <= charts.keys()


def test_over_seeds_guided_stands_beside_each_other_method(tmp_path):
    """Paired by seed, and each problem by itself: volumes of two say nothing of one another."""
    runs = []
    for seed, (guided, data) in enumerate([(4.0, 3.0), (6.0, 4.0)]):
        (tmp_path / str(seed)).mkdir()
        # at 0 there is none, 10 has the largest mean
        text = f"weight,hypervolume\n0,{data}\n10,{guided}\n20,{guided - 1}\n"
        (tmp_path / str(seed) / "guidance.csv").write_text(text)
        final = {"hypervolume": guided, "hypervolume/data": data}
        runs.append(Run(tmp_path / str(seed), seed, {"problem": "zdt1"}, {}, final))
    other = Run(tmp_path, 0, {"problem": "zdt2"}, {}, {"hypervolume": 9.0})
    settings = [Setting({"problem": "zdt1"}, runs), Setting({"problem": "zdt2"}, [other])]
    (row,) = over_seeds(settings)
    assert row[:3] == ["problem=zdt1", 2, "5.000 ± 12.706"]
    assert row[3:] == ["+1.500 ± 6.353", "", "", "", 10.0]
    (title,) = (section.title for section in seeded(settings))
    assert title == "Guided against the others" and seeded(settings[1:]) == []
    assert "| problem=zdt1 | 2 | 5.000" in markdown(settings)


@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
def test_guidance_raises_the_hypervolume(seed, tmp_path):
    numbers = ran(tmp_path, *SHORT, f"seed={seed}", checkpoint_every=0)
    guided, bare = numbers["final"]["hypervolume"], numbers["init"]["hypervolume"]
    assert guided > bare + 0.03, (guided, bare)


# -- settings


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "problem").glob("*.yaml")))
def test_every_problem_composes(name):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose(f"problem/{name}", ["++problem.name=zdt2"] if name == "pymoo" else [])
    problem = built(cfg.problem)
    found = problem.measured(torch.zeros(2, problem.width).numpy())
    assert found.shape[0] == 2 and found.shape[1] >= 2


@pytest.mark.parametrize(
    "key, value",
    [
        *((f"study.{net}.steps", 0) for net in NETS),
        ("study.guidance.weight", -1),
        ("study.guidance.weights", [1, -1]),
        ("study.data.left_out", 1.0),
        ("study.schedule.last", 1.5),
        ("problem.amateur", 1),
    ],
)
def test_ranges_of_settings(key, value):
    assert not holds(RANGES[key][0], value)


def test_keys_that_it_does_not_heed_are_refused():
    cfg = config(EXPERIMENT)
    assert goes_on(cfg) and heeds(cfg, "problem.variables") and heeds(cfg, "log.every_n_steps")
    for key in ("max_steps", "loss", "checkpoint.monitor"):
        with pytest.raises(UserError, match=f"^{key} has no effect: this experiment trains no"):
            knobs.check_study(cfg, [key])
    assert not goes_on(config("experiment=probability_evolution"))


def test_another_checkpoint_is_refused(tmp_path):
    cfg = config(EXPERIMENT, *TINY, "ckpt_path=mine.ckpt")
    with pytest.raises(
        UserError, match="^ckpt_path=mine.ckpt: this experiment goes on in its own"
    ):
        train(cfg, tmp_path)
    assert not (tmp_path / "config.yaml").exists()


# -- the command


@pytest.mark.slow
def test_the_command_goes_on_and_refuses(tmp_path):
    words = (EXPERIMENT, *TINY, "log.every_n_steps=4", "hydra.run.dir=run")
    done = forked(tmp_path, *words, "problem=pymoo", "problem.name=nope")
    assert done.code == 2
    (line,) = done.err.strip().splitlines()
    assert line.startswith("error: problem.name=nope: pymoo has no such problem")
    assert not (tmp_path / "run/config.yaml").exists()
    done = forked(tmp_path, *words)
    assert done.code == 0, done.err
    before = left(tmp_path / "run")
    assert "hypervolume" in done.out and (tmp_path / "run/report.html").stat().st_size
    done = forked(tmp_path, *words)
    assert (done.code, "holds a run: go on with ckpt_path=last" in done.err) == (2, True)
    done = forked(tmp_path, EXPERIMENT, "hydra.run.dir=run", "ckpt_path=last")
    assert done.code == 0, done.err
    assert left(tmp_path / "run") == before


@pytest.mark.slow
def test_a_sweep_shows_the_hypervolume(tmp_path):
    words = ("problem=zdt1,dtlz2", "seed=0,1", "sweep.table=table.csv", "hydra.sweep.dir=sweep")
    done = forked(tmp_path, "-m", EXPERIMENT, *TINY, *words, timeout=300)
    assert done.code == 0, done.err
    with (tmp_path / "table.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert len(rows) == 4 and all(float(row["final/hypervolume/data"]) > 0 for row in rows)
    page = (tmp_path / "sweep/report.html").read_text()
    assert "problem=dtlz2" in page and "hypervolume" in page
