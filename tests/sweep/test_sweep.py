"""Sweeps as a user runs them: jobs that fail, die, stop and go on; what is recorded and said."""

import csv
import json
import os
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, command, end, start
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.sweep import again, board, jobs, launcher
from spo_lightning.sweep.composing import Checking
from spo_lightning.sweep.jobs import Job, Sweep
from spo_lightning.sweep.objective import score

# seconds of training: a signal comes late to it, and a job looks for its sweep once a second
LONG = ("loss=dpo", "max_steps=300", "checkpoint.every_n_steps=10", "hydra.sweep.dir=sweep")


def record(cwd: Path, where: str = "sweep") -> list[dict]:
    return json.loads((cwd / where / "sweep.json").read_text())["jobs"]


def states(cwd: Path, where: str = "sweep") -> list[str]:
    return [job["state"] for job in record(cwd, where)]


def training(process, directory: Path, step: int) -> int:
    """Wait until the run in ``directory`` has trained so far; its process."""
    while process.poll() is None:
        time.sleep(0.05)
        try:
            status = json.loads((directory / "status.json").read_text())
        except (OSError, ValueError):
            continue
        if status["stage"] == "training" and status["step"] >= step:
            return status["pid"]
    raise AssertionError(process.communicate())


def rows(directory: Path) -> list[str]:
    """metrics.csv without what the clock says."""
    lines = (directory / "metrics.csv").read_text().splitlines()
    timed = [n for n, name in enumerate(lines[0].split(",")) if "time/" in name]
    cells = (line.split(",") for line in lines)
    return [",".join(c for n, c in enumerate(line) if n not in timed) for line in cells]


@contextmanager
def address_space(size: int):
    """Commands begun inside can map so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.slow
def test_what_ends_one_job_leaves_the_others_alone(tmp_path, cache):
    """A bad value, a kill and a lack of memory; then all that can be completed is."""
    sizes = "model.config.intermediate_size=48,100000000"  # 12 GB a matrix
    words = ("-m", *SMALL, cache, *LONG, "loss.beta=0.1,-1", sizes)
    with address_space(8 * 2**30):
        process = start(tmp_path, *words)
    os.kill(training(process, tmp_path / "sweep/0", 20), signal.SIGKILL)
    done = end(process)
    assert done.code == 3, done.err
    assert states(tmp_path) == ["died", "failed", "failed", "failed"]
    died, bad, starved, _ = record(tmp_path)
    assert died["error"].startswith("killed by SIGKILL")
    assert starved["error"].startswith("out of memory: ")
    assert bad["error"] == "loss.beta=-1: it must be above 0"
    for job in (died, starved, bad):  # a line of the table, one of the log, one at the end
        assert f" {job['state']} " in done.out and job["error"] in done.out
        assert job["error"] in done.err
    assert not (tmp_path / "sweep/1/metrics.csv").exists()
    with address_space(8 * 2**30):
        process = start(tmp_path, "sweep.resume=sweep")
    assert end(process).code == 3
    assert states(tmp_path) == ["finished", "failed", "failed", "failed"]
    assert "Going on from outer step" in (tmp_path / "sweep/0/train.log").read_text()
    plain = command(tmp_path, *SMALL, cache, *LONG[:-1], "hydra.run.dir=plain")
    assert plain.code == 0 and rows(tmp_path / "plain") == rows(tmp_path / "sweep/0")


@pytest.mark.slow
def test_stopped_and_gone_on_with(tmp_path, cache):
    words = ("-m", *SMALL, cache, *LONG, "seed=0,1,2", "sweep.parallel=2")
    process = start(tmp_path, *words)
    training(process, tmp_path / "sweep/1", 20)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130 and "sweep.resume=" in done.err
    assert states(tmp_path) == ["interrupted", "interrupted", "waiting"]
    assert record(tmp_path)[1]["error"] == "stopped by SIGINT"
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = command(elsewhere, f"sweep.resume={tmp_path / 'sweep'}", "sweep.parallel=1")
    assert done.code == 0, done.err
    assert states(tmp_path) == ["finished"] * 3 and "1 at a time" in done.out
    written = (tmp_path / "sweep/0/metrics.json").stat().st_mtime_ns
    done = command(tmp_path, "sweep.resume=sweep")  # nothing is left to do
    assert done.code == 0 and "3 jobs, 3 of them finished before" in done.out
    assert (tmp_path / "sweep/0/metrics.json").stat().st_mtime_ns == written
    assert not list(elsewhere.iterdir())
    numbers = record(tmp_path)[2]["numbers"]["final"]
    assert f"{numbers['exact_match']:.4f}" in done.out


@pytest.mark.slow
def test_jobs_end_with_their_sweep(tmp_path, cache):
    process = start(tmp_path, "-m", *SMALL, cache, *LONG, "seed=0,1")
    pid = training(process, tmp_path / "sweep/0", 20)
    process.kill()
    end(process)
    patience = time.monotonic() + 20
    while Path(f"/proc/{pid}").exists() and time.monotonic() < patience:
        time.sleep(0.1)
    status = json.loads((tmp_path / "sweep/0/status.json").read_text())
    assert (status["state"], status["error"][:18]) == ("interrupted", "stopped by SIGTERM")
    done = command(tmp_path, "sweep.resume=sweep")
    assert done.code == 0 and states(tmp_path) == ["finished"] * 2


@pytest.mark.slow
def test_two_sweeps_at_once_train_one_warm_start(tmp_path):
    words = ("-m", *SMALL, f"cache.dir={tmp_path / 'cache'}", "loss=dpo", "max_steps=1")
    both = [start(tmp_path, *words, "loss.beta=0.1,0.2", f"hydra.sweep.dir={n}") for n in "ab"]
    for process in both:
        assert end(process).code == 0
    logs = [(tmp_path / n / job / "train.log").read_text() for n in "ab" for job in "01"]
    assert sorted("Warm start: taken from" in log for log in logs) == [False, True, True, True]
    starts = [path for path in (tmp_path / "cache/warm_starts").iterdir() if path.is_dir()]
    assert len(starts) == 1 and (starts[0] / "model.safetensors").exists()
    final = [record(tmp_path, n)[0]["numbers"]["final"] for n in "ab"]
    assert final[0] == final[1]


@pytest.mark.parametrize(
    "words, says",
    [
        (("-m", "sweep.parallel=0"), "sweep.parallel=0: it must be at least 1"),
        (("sweep.parallel=2",), "sweep.parallel has no effect: this is one run"),
        (("sweep.resume=absent",), "absent/sweep.json: no sweep to go on with"),
        (("-m", "seed=0,1", "hydra.sweep.subdir=one"), "jobs 0 and 1 (seed=1) have one directory"),
        (("-m", "seed=0,1", "loss=nosuch"), "nosuch"),
    ],
)
def test_refused_in_one_line(tmp_path, words, says):
    done = command(tmp_path, *words)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.rglob("sweep.json"))


@pytest.mark.slow
def test_a_directory_holds_one_sweep(tmp_path):
    words = ("-m", "seed=-1,-2", "hydra.sweep.dir=sweep")
    assert command(tmp_path, *words).code == 3
    done = command(tmp_path, *words)
    assert done.code == 2 and "holds a sweep: go on with sweep.resume=" in done.err
    # the numbers of one job are not another's
    done = command(tmp_path, "sweep.resume=sweep", "seed=-1,-3")
    assert done.code == 2 and "is another one than it was (seed=-2 seed=-3)" in done.err


def test_a_sweep_that_runs_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(launcher, "PATIENCE_SECONDS", 0.5)
    held = launcher.alone(tmp_path)
    with pytest.raises(UserError, match="a sweep is running there"):
        launcher.alone(tmp_path)
    child = os.fork()
    if not child:  # a job whose sweep was killed
        time.sleep(0.3)
        os._exit(0)
    held.close()
    began = time.monotonic()
    launcher.alone(tmp_path).close()
    assert time.monotonic() - began > 0.1
    os.waitpid(child, 0)


@pytest.mark.slow
def test_a_stopped_job_fails_its_sweep(tmp_path, cache):
    """As by a daemon that guards the memory."""
    process = start(tmp_path, "-m", *SMALL, cache, *LONG, "seed=0,1")
    os.kill(training(process, tmp_path / "sweep/0", 10), signal.SIGTERM)
    done = end(process)
    assert done.code == 3 and "stopped by SIGTERM" in done.err
    assert states(tmp_path) == ["interrupted", "finished"]


@pytest.mark.slow
def test_a_whole_tree_is_stopped_once(tmp_path, cache):
    process = start(tmp_path, "-m", *SMALL, cache, *LONG, "seed=0,1")
    job = training(process, tmp_path / "sweep/0", 10)
    for pid in (job, process.pid):
        os.kill(pid, signal.SIGTERM)
    done = end(process)
    assert done.code == 143 and states(tmp_path) == ["interrupted", "waiting"]
    assert (tmp_path / "sweep/0/checkpoints/last.ckpt").exists()


@pytest.mark.slow
def test_studies_are_swept_and_gone_on_with(tmp_path):
    words = ("-m", "experiment=solvers_on_a_quadratic", "sweep.parallel=2", "seed=0,1")
    done = command(tmp_path, *words, "hydra.sweep.dir=sweep")
    assert done.code == 0, done.err
    done = command(tmp_path, "sweep.resume=sweep")
    assert done.code == 0 and "2 of them finished before" in done.out


def test_one_job_stands_for_those_without_a_new_word():
    composed = []

    class Loader:
        def load_sweep_config(self, master_config, sweep_overrides):
            composed.append(sweep_overrides)

        def get_group_options(self, key):
            return ["dpo", "ipo"] if key == "loss" else []

    checking = Checking(Loader())
    for loss in ("dpo", "ipo"):
        for beta in (0.1, 0.2, 0.3):
            for seed in range(4):
                words = [f"loss={loss}", f"loss.beta={beta}", f"seed={seed}"]
                checking.load_sweep_config(None, words)
    assert len(composed) == 2 * (4 + 2)  # every seed once, and every further beta, for each loss
    assert {(w[0], word) for w in composed for word in w[1:]} == {
        (f"loss={loss}", word)
        for loss in ("dpo", "ipo")
        for word in (
            "loss.beta=0.1",
            "loss.beta=0.2",
            "loss.beta=0.3",
            *(f"seed={n}" for n in range(4)),
        )
    }
    assert checking.options(["+loss@x=dpo", "seed=1"]) == ("+loss@x=dpo",)


def test_a_word_of_the_last_job_is_refused_before_the_first(tmp_path):
    words = ("-m", "loss.beta=0.1,0.2", "seed=0,1", "+solver.nosuch=1,2", "solver.weigth=1,2")
    done = command(tmp_path, *words, "hydra.sweep.dir=sweep")
    assert done.code == 2 and "solver.weigth" in done.err and done.err.count("\n") == 1
    done = command(tmp_path, "-m", "seed=0,1", "model=llama,nosuch", "hydra.sweep.dir=sweep")
    assert done.code == 2 and "nosuch" in done.err
    assert not list(tmp_path.rglob("sweep.json"))


def test_a_path_of_any_letters():
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parser = OverridesParser.create()
    for name in ("/a/b.c", "/a b/=c", "/it's", "/a,b", "/back\\slash", "/é[1]"):
        (found,) = parser.parse_overrides([f"sweep.resume={again.quoted(Path(name))}"])
        assert found.value() == name and not found.is_sweep_override()


def test_questions_are_found_by_name(tmp_path):
    for path in (Path(__file__).parents[2] / "sweeps").glob("*.yaml"):
        first, second = path.read_text().splitlines()[:2]
        assert first.startswith("# Question: ") and first.endswith("?")
        assert path.stem in second
    done = command(
        tmp_path, "--config-name", "two_axes", "--cfg", "hydra", "-p", "hydra.sweep.dir"
    )
    assert done.code == 0 and done.out.strip() == "outputs/two_axes"


def test_the_sweep_of_losses_has_them_all():
    """But for those that it names; a new yaml is among them."""
    root = Path(__file__).parents[2]
    params = yaml.safe_load((root / "sweeps/losses.yaml").read_text())["hydra"]["sweeper"][
        "params"
    ]
    with initialize_config_dir(str(root / "conf"), version_base="1.3"):
        parser = OverridesParser.create(GlobalHydra.instance().config_loader())
        (swept,) = parser.parse_overrides([f"loss={params['loss']}"])
        found = [*swept.sweep_string_iterator()]
    left_out = swept.value().exclude  # pyright: ignore
    every = {path.stem for path in (root / "conf/loss").glob("*.yaml")}
    assert {*left_out} < every and sorted([*found, *left_out]) == sorted(every)


@pytest.mark.slow
def test_a_table_is_made_in_pieces(tmp_path, cache):
    """What has its row is left out, whatever names no number; what changes one has another row."""
    words = ("-m", *SMALL, cache, "loss=dpo", "max_steps=1", "sweep.table=docs/table.csv")
    done = command(tmp_path, *words, "seed=0,1", "hydra.sweep.dir=a")
    assert done.code == 0, done.err
    done = command(tmp_path, *words, "seed=1,2", "hydra.sweep.dir=b", "log.every_n_steps=7")
    assert done.code == 0 and "2 jobs, 1 of them finished before" in done.out
    assert not (tmp_path / "b/0").exists() and (tmp_path / "b/1/metrics.json").exists()
    with (tmp_path / "docs/table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["words"].split()[-1] for row in rows] == ["seed=0", "seed=1", "seed=2"]
    final = json.loads((tmp_path / "a/1/metrics.json").read_text())["final"]
    for name in ("exact_match", "displacement/chosen"):
        assert float(rows[1][f"final/{name}"]) == final[name]
    names = {path.name for path in (tmp_path / "docs").iterdir()}
    assert names == {"table.csv", ".table.csv.lock"}
    assert record(tmp_path, "b")[0]["numbers"]["final"]["exact_match"] == final["exact_match"]
    more = (*words, "seed=0", "hydra.sweep.dir=c", "sweep.numbers=[answers/refused]")
    done = command(tmp_path, *more)
    assert done.code == 2 and "sweep.numbers differ in final/answers/refused" in done.err
    done = command(tmp_path, *more, "sweep.table=docs/more.csv", "hydra.sweep.dir=d")
    assert done.code == 0, done.err
    assert "final/answers/refused" in (tmp_path / "docs/more.csv").read_text().splitlines()[0]
    (tmp_path / "docs/table.csv").write_text("a,b\n1,2\n")
    done = command(tmp_path, *words, "seed=0,1", "hydra.sweep.dir=e")
    assert done.code == 2 and "not a table of jobs" in done.err and done.err.count("\n") == 1


@pytest.mark.slow
def test_a_job_of_two_processes(tmp_path, cache):
    """The ranks run the job, not the sweep again."""
    words = ("hardware=ddp", "hardware.accelerator=cpu", "loss=dpo", "max_steps=2")
    small = [word for word in SMALL if word != "hardware=cpu"]
    done = command(tmp_path, "-m", *small, cache, *words, "seed=0,1", "hydra.sweep.dir=sweep")
    assert done.code == 0, done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep"]
    assert states(tmp_path) == ["finished"] * 2 and len(record(tmp_path)) == 2


# -- without a process


def swept(*ends: tuple[str, float]) -> Sweep:
    made = [
        Job(n, ["loss=dpo", f"seed={n}"], f"/{n}", state, seconds)
        for n, (state, seconds) in enumerate(ends)
    ]
    return Sweep(Path("/"), [], "/", made)


def test_the_table_by_hand():
    sweep = swept(("finished", 61.4), ("failed", 2.0), ("waiting", 0.0))
    sweep.jobs[0].numbers = {"final": {"win_rate": 0.5, "loss": 1.0}}
    sweep.jobs[1].error = "no such file"
    assert sweep.table().splitlines() == [
        " job          state       seconds  win_rate",
        "   0  seed=0  finished         61    0.5000",
        "   1  seed=1  failed            2  no such file",
        "   2  seed=2  waiting           0",
    ]


def test_time_left():
    assert board.left(swept(("running", 5.0), ("waiting", 0.0)).jobs, 1) is None
    ended = swept(("finished", 10.0), ("failed", 20.0), ("running", 5.0), ("waiting", 0.0))
    assert board.left(ended.jobs, 1) == 10 + 15
    assert board.left(ended.jobs, 2) == 12.5
    late = swept(("finished", 10.0), ("running", 50.0))
    assert board.left(late.jobs, 1) == 1.0  # it is taken to be near its end
    assert [board.span(s) for s in (None, 59.9, 61, 3661)] == ["", "0:59", "1:01", "1:01:01"]


def test_what_a_search_maximises():
    numbers = {
        "init": {"exact_match": 0.9, "win_rate": 0.5},
        "final": {"exact_match": 0.885, "win_rate": 0.8},
    }
    rule = {"maximise": "win_rate", "keep": "exact_match", "within": 0.02}
    assert score(numbers, **rule) == 0.8
    assert score(numbers, **rule | {"within": 0.01}) == pytest.approx(-0.005)  # .885 - .89
    assert score(numbers, **rule | {"keep": None}) == 0.8
    assert knobs.RANGES["sweep.objective"][0](rule)
    assert not knobs.RANGES["sweep.objective"][0]({"maximise": "win_rate"})
    with pytest.raises(UserError, match="names rouge1"):
        score(numbers, **rule | {"maximise": "rouge1"})


def test_the_words_that_go_on(tmp_path, monkeypatch, capsys):
    assert again.words(["-m", "seed=0,1"]) == ["-m", "seed=0,1"]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "begun").mkdir()
    (tmp_path / "sweep").mkdir()
    command_line = ["-m", "seed=0,1", "hydra.sweep.dir=old"]
    Sweep(tmp_path / "sweep", command_line, str(tmp_path / "begun")).write()
    found = again.words(["sweep.resume=sweep", "sweep.parallel=2", "seed=0,1"])
    place = tmp_path / "sweep"
    assert found == [
        *("-m", "seed=0,1", "sweep.parallel=2"),
        *(f"hydra.sweep.dir={place}", f"sweep.resume={place}"),
    ]
    assert Path.cwd() == tmp_path / "begun"
    assert "Going on with: -m seed=0,1 sweep.parallel=2" in capsys.readouterr().out


def test_a_secret_word_is_asked_for_again(tmp_path, capsys):
    inside = "+logger.x={api_key: abcdefgh, mode: a}"
    Sweep(tmp_path, ["-m", "logger.wandb.api_key=abcdefgh", inside], "/").write()
    assert "abcdefgh" not in (tmp_path / "sweep.json").read_text()
    Sweep(tmp_path, ["-m", "logger.wandb.api_key=abcdefgh"], "/").write()
    with pytest.raises(UserError, match="give it again"):
        again.words([f"sweep.resume={tmp_path}"])
    key = "logger.wandb.api_key=12345678"
    assert key in again.words([f"sweep.resume={tmp_path}", key])
    assert "12345678" not in capsys.readouterr().out


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"jobs": [{"number": 1}]}'])
def test_a_record_of_no_sweep(tmp_path, text):
    (tmp_path / "sweep.json").write_text(text)
    with pytest.raises(UserError, match="no record of a sweep"):
        jobs.read(tmp_path)
