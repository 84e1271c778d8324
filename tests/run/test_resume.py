"""An interrupted run goes on and ends as an uninterrupted one: parameters, state, files."""

import csv
import json
import os
import random
import resource
import signal
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from conftest import SMALL, command, end, forked, start
from fitting import SOLVERS
from hydra import compose, initialize_config_dir
from pairs import CONF
from safetensors.torch import load_file

from spo_lightning.errors import UserError
from spo_lightning.records.directory import MetricsCsv, RunDir, cut_after
from spo_lightning.records.resume import resumed
from spo_lightning.train import train

STEPS = 12
SMALL = (*SMALL, "eval.every_n_steps=1", "eval.max_rows=8", "eval.batch_size=8")
# what has no part in going on: Lightning's version, its loops' bookkeeping, and the schedule's own
# settings, among them a max_steps that may grow
ASIDE = ("loops", "pytorch-lightning_version", "hparams_name", "lr_lambdas")
# the weight of a ramp still rises where the run is cut
RAMP = {"ramp": ["solver=penalty", "solver/schedule=ramp", "solver.schedule.steps=9"]}
HALF = ("model.dtype=bfloat16", "hardware.precision=bf16-true")
OBJECTIVES = {
    **{name: ("loss=dpo", *words) for name, words in (SOLVERS | RAMP).items()},
    "running_min": ("loss=spo", "solver/value=running_min", "solver.margin=0.01"),
    "alpha_dpo": ("loss=alpha_dpo",),
    "reward": ("loss=reward", "loss.label_smoothing=0.1"),
    "ranker": ("loss=ranker", "solver=penalty"),
    "beta_dpo": ("loss=beta_dpo", "micro_batch_size=4"),
    "sgdpo": ("loss=sgdpo",),
    "tdpo1": ("loss=tdpo1",),
    "kto": ("loss=kto", "solver=penalty"),
    "bco": ("loss=bco",),
    "own texts": ("loss=spo", "data.sft=own"),
    "adamw_8bit": ("loss=dpo", "optimizer=adamw_8bit"),
    "bf16": ("loss=dpo", *HALF),
    "bf16 master": ("loss=spo", *HALF, "optimizer.bf16=master", "optimizer=rmsprop"),
    "bf16 plain": ("loss=dpo", *HALF, "optimizer.bf16=plain", "optimizer.betas=[0.8,0.9]"),
    "bf16 adamw_8bit": ("loss=dpo", *HALF, "optimizer=adamw_8bit"),
    "adapters": ("loss=dpo", *SOLVERS["inner"], "model.lora.rank=2", "model.lora.merge=true"),
}
# those with a memory or a path of their own; what is like one of them is slow
USUAL = ("none", "inner", "alpha_dpo", "own texts", "bf16")
CUT = [
    pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in OBJECTIVES
]


def composed(*words: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", list(words))


def rows(directory: Path) -> list[dict]:
    with (directory / "metrics.csv").open(newline="") as file:
        return [
            {k: v for k, v in row.items() if "/time/" not in k} for row in csv.DictReader(file)
        ]


def status(directory: Path) -> dict:
    return json.loads((directory / "status.json").read_text())


def numbers(directory: Path) -> dict:
    found = json.loads((directory / "metrics.json").read_text())
    return {name: value for name, value in found.items() if name != "seconds"}


def assert_same(one, two, where="last.ckpt"):
    """Bit for bit, down to every tensor."""
    assert type(one) is type(two), where
    if isinstance(one, dict):
        one, two = ({k: v for k, v in it.items() if k not in ASIDE} for it in (one, two))
        assert one.keys() == two.keys(), where
        for key in one:
            assert_same(one[key], two[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), where
        for number, pair in enumerate(zip(one, two)):
            assert_same(*pair, f"{where}[{number}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype and torch.equal(one, two), where
    else:
        assert one == two, where


def assert_same_run(whole: Path, parts: Path):
    weights = [load_file(place / "model/model.safetensors") for place in (whole, parts)]
    assert_same(*weights, "model.safetensors")
    files = [place / "checkpoints/last.ckpt" for place in (whole, parts)]
    assert_same(*(torch.load(file, weights_only=False) for file in files))
    assert rows(whole) == rows(parts)
    assert [int(row["step"]) for row in rows(parts)] == list(range(1, STEPS + 1))
    assert numbers(whole) == numbers(parts)
    assert (whole / "samples.jsonl").read_bytes() == (parts / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("name", CUT)
def test_two_parts_equal_one_whole(tmp_path, cache, name):
    """max_steps may grow under a constant schedule, so the first part simply ends at step 5."""
    words = (*SMALL, *OBJECTIVES[name], cache, "checkpoint.every_n_steps=5")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(composed(*words, f"max_steps={STEPS}"), whole)
    train(composed(*words, "max_steps=5"), parts)
    assert len(rows(parts)) == 5
    done = train(composed(*words, f"max_steps={STEPS}", "ckpt_path=last"), parts)
    assert done["steps"] == STEPS
    state = torch.load(parts / "checkpoints/last.ckpt", weights_only=False)
    assert state["spo_lightning"]["outer_step"] == state["global_step"] == STEPS
    assert state["spo_lightning"]["pairs_seen"] == STEPS * 4
    assert_same_run(whole, parts)


COMMAND = (*SMALL, "loss=spo", "solver/value=running_min", "optimizer.schedule=cosine")
COMMAND = (*COMMAND, f"max_steps={STEPS}", "checkpoint.every_n_steps=1")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> str:
    """Of this file alone: a reference scored among other rows differs in its last digit."""
    return f"cache.dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache) -> Path:
    place = tmp_path_factory.mktemp("whole")
    done = forked(place, *COMMAND, cache, "hydra.run.dir=run")
    assert (done.code, done.err) == (0, "")
    return place / "run"


def begun(cwd: Path, cache: str, *words: str, steps: int):
    """A run in ``cwd``/run that has written ``steps`` rows."""
    process = start(cwd, *COMMAND, cache, "hydra.run.dir=run", *words)
    path = cwd / "run/metrics.csv"
    until = time.monotonic() + 90
    while not path.exists() or path.read_text().count("\n") <= steps:
        assert process.poll() is None and time.monotonic() < until, "over before the signal"
        time.sleep(0.002)
    return process


def gone_on(cwd: Path, *words: str):
    """Nothing of the first command line is repeated: the directory's config.yaml holds it."""
    done = forked(cwd, "ckpt_path=last", "hydra.run.dir=run", *words)
    assert (done.code, done.err) == (0, "")
    assert status(cwd / "run")["state"] == "finished"
    return done


STOPS = [
    (signal.SIGTERM, 143),
    *(
        pytest.param(number, code, marks=pytest.mark.slow)
        for number, code in ((signal.SIGUSR1, 143), (signal.SIGUSR2, 143), (signal.SIGINT, 130))
    ),
]


@pytest.mark.parametrize("number, code", STOPS)
def test_a_signal_stops_after_the_step_and_saves(tmp_path, cache, whole, number, code):
    process = begun(tmp_path, cache, "checkpoint.every_n_steps=0", steps=2)
    process.send_signal(number)
    done = end(process)
    assert done.code == code
    (line,) = done.err.splitlines()
    assert line.startswith(f"stopped by {number.name}. Go on with: ")
    assert "ckpt_path=last" in line and "hydra.run.dir=" in line
    run = tmp_path / "run"
    said = status(run)
    assert (said["state"], said["error"]) == ("interrupted", line)
    written = len(rows(run))
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=False)["spo_lightning"]
    assert 2 <= written < STEPS and saved["outer_step"] == written == said["step"]
    gone_on(tmp_path, "log.every_n_steps=1")
    assert_same_run(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("attempt", range(3))
def test_a_kill_at_any_step(tmp_path, cache, whole, attempt):
    random.seed(attempt)
    process = begun(tmp_path, cache, steps=random.randrange(1, STEPS - 3))
    time.sleep(random.random() * 0.05)
    process.kill()
    assert end(process).code == -signal.SIGKILL
    assert status(tmp_path / "run")["state"] == "running"
    gone_on(tmp_path)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_second_signal_quits_at_once(tmp_path, cache):
    process = begun(tmp_path, cache, steps=1)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive within one step
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    assert end(process).code in (130, 143)
    assert status(tmp_path / "run")["state"] == "running"


@pytest.mark.slow
def test_an_end_that_was_announced_waits_for_the_save(tmp_path, cache, whole):
    """A scheduler warns, and then comes its SIGTERM, and another warning: none of them quits."""
    process = begun(tmp_path, cache, "checkpoint.every_n_steps=0", steps=1)
    os.kill(process.pid, signal.SIGSTOP)  # all arrive within one step
    for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGUSR1):
        process.send_signal(number)
    os.kill(process.pid, signal.SIGCONT)
    assert end(process).code == 143
    assert status(tmp_path / "run")["state"] == "interrupted"
    gone_on(tmp_path)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_signal_in_the_warm_start(tmp_path, cache, whole):
    """There is no checkpoint yet, so the run starts from the beginning and says so."""
    own = f"cache.dir={tmp_path / 'cache'}"
    process = start(tmp_path, *COMMAND, own, "sft.max_steps=2000", "hydra.run.dir=run")
    until = time.monotonic() + 60
    while not (tmp_path / "run/status.json").exists() or (
        status(tmp_path / "run")["stage"] != "warm start (SFT)"
    ):
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    done = end(process)
    assert done.code == 130 and done.err.startswith("stopped by SIGINT. Go on with: ")
    assert not list((tmp_path / "cache").rglob("*.safetensors"))
    fresh = tmp_path / "run/config.yaml"
    fresh.write_text(fresh.read_text().replace("max_steps: 2000", "max_steps: 20"))
    assert "No checkpoint yet" in gone_on(tmp_path).out
    assert rows(whole) == rows(tmp_path / "run")


@pytest.mark.slow
def test_a_finished_run_goes_on_to_nothing(tmp_path, cache, whole):
    done = command(whole.parent, "ckpt_path=last", "hydra.run.dir=run", "hardware=cpu")
    assert (done.code, done.err) == (0, "")
    assert len(rows(whole)) == STEPS and numbers(whole)["steps"] == STEPS


def finished(tmp_path: Path, *words: str) -> Path:
    """A directory as a run with these words leaves it."""
    from omegaconf import OmegaConf

    head = '# choices: {"loss": "dpo", "solver": "none", "hardware": "cpu"}\n'
    words = ("loss=dpo", *words)
    (tmp_path / "config.yaml").write_text(
        head + OmegaConf.to_yaml(composed(*words), resolve=True), encoding="utf-8"
    )
    return tmp_path


def going_on(directory: Path, *words: str, **choices: str):
    touched = [word.split("=")[0].replace("/", ".") for word in words]
    chosen = {"loss": "spo", "solver": "penalty", "hardware": "auto", **choices}
    return resumed(composed(*words, "ckpt_path=last"), directory, touched, chosen)


def test_without_overrides_the_directory_decides(tmp_path):
    cfg, choices = going_on(finished(tmp_path, "loss.beta=0.3", "seed=5"))
    assert (cfg.loss.beta, cfg.seed, cfg.ckpt_path) == (0.3, 5, "last")
    assert choices == {"loss": "dpo", "solver": "none", "hardware": "cpu"}


@pytest.mark.parametrize(
    "words, says",
    [
        (("loss.beta=0.5",), "loss.beta is 0.1 in"),
        (("seed=1",), "seed is 0 in"),
        (("model.config.hidden_size=32",), "model.config.hidden_size is 96 in"),
        (("solver.weight=3",), "solver.weight is None in"),
        (("loss=spo",), "loss is 'dpo' in"),
        (("model.pretrained=x",), "model.pretrained is None in"),
    ],
)
def test_a_differing_key_is_refused_by_name(tmp_path, words, says):
    with pytest.raises(UserError, match=says) as caught:
        going_on(finished(tmp_path), *words)
    assert "leave the override out or start a new run" in str(caught.value)


@pytest.mark.parametrize(
    "words", [("log.every_n_steps=3",), ("hardware.threads=2",), ("max_steps=200",), ("seed=0",)]
)
def test_what_may_differ(tmp_path, words):
    cfg, _ = going_on(finished(tmp_path), *words)
    key, _, value = words[0].partition("=")
    from omegaconf import OmegaConf

    assert str(OmegaConf.select(cfg, key)) == value


def test_how_fast_a_judge_is_asked_may_differ(tmp_path):
    judge = ("judge=pairwise", "judge.model=m")
    place = finished(tmp_path, *judge, "judge.timeout=9") / "config.yaml"
    place.write_text(place.read_text().replace('"cpu"', '"cpu", "judge": "pairwise"', 1))
    paced = ("judge.base_url=http://b/v1", "judge.concurrency=32")
    cfg, _ = going_on(tmp_path, *judge, *paced, judge="pairwise")
    found = (cfg.judge.base_url, cfg.judge.concurrency, cfg.judge.timeout)
    assert found == ("http://b/v1", 32, 9)
    for word in ("judge.model=another", "judge.temperature=0.5"):
        with pytest.raises(UserError, match=f"{word.split('=')[0]} is"):
            going_on(tmp_path, *judge, word, judge="pairwise")


def test_a_layout_that_was_found_is_kept(tmp_path):
    """A run that names none goes on by what config.yaml has; another one is refused."""
    data = ("data=pairs", "data.path=a.jsonl")
    run = RunDir(finished(tmp_path, *data))
    before = (tmp_path / "config.yaml").read_text()
    run.keep("data.layout", "hh")
    assert (tmp_path / "config.yaml").read_text() == before.replace("layout: null", "layout: hh")
    for words in (data, (*data, "data.layout=null"), (*data, "data.layout=hh")):
        cfg, _ = going_on(tmp_path, *words)
        assert cfg.data.layout == "hh"
    with pytest.raises(UserError, match="data.layout is 'hh' in"):
        going_on(tmp_path, *data, "data.layout=trl")


def test_another_option_that_may_differ(tmp_path):
    cfg, choices = going_on(finished(tmp_path), "hardware=ddp", hardware="ddp")
    assert cfg.hardware.devices == 2 and choices["hardware"] == "ddp"


@pytest.mark.parametrize("word", ["optimizer.schedule=cosine", "optimizer.warmup=0.1"])
def test_max_steps_stays_where_the_rate_depends_on_it(tmp_path, word):
    with pytest.raises(UserError, match="max_steps is 100 in"):
        going_on(finished(tmp_path, word), "max_steps=200")


def test_a_removed_secret_is_given_again(tmp_path):
    """config.yaml holds <removed> in its place."""
    place = finished(tmp_path) / "config.yaml"
    target = "spo_lightning.data.tasks.arithmetic.arithmetic"
    place.write_text(place.read_text().replace(target, "<removed>"))
    cfg, _ = going_on(tmp_path, "data._target_=secret")
    assert cfg.data._target_ == "secret"


def test_rows_after_the_checkpoint_are_cut(tmp_path):
    path = tmp_path / "metrics.csv"
    written = MetricsCsv(path, ["step", "a"])
    for step in (1, 5, 10, 15):
        written.write({"step": step, "a": step / 3})
    whole = path.read_text()
    path.write_text(whole + "20,1.")  # a kill in mid-row
    cut_after(path, 10)
    assert path.read_text().splitlines() == whole.splitlines()[:4]
    assert MetricsCsv(path, ["another"]).header == ["step", "a"]


def test_a_new_run_never_writes_over_an_old_one(tmp_path, cache):
    words = (*SMALL, cache, "loss=dpo", "max_steps=1")
    train(composed(*words), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="holds a run: go on with ckpt_path=last"):
        train(composed(*words, "seed=1"), tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_a_checkpoint_of_another_width(tmp_path, cache):
    words = (*SMALL, cache, "loss=dpo", "max_steps=1")
    train(composed(*words), tmp_path / "one")
    path = tmp_path / "one/checkpoints/last.ckpt"
    other = composed(*words, "model.config.hidden_size=48", f"ckpt_path={path}")
    with pytest.raises(UserError, match="belongs to another architecture: scorer.model"):
        train(other, tmp_path / "two")
    assert {p.name for p in (tmp_path / "two").iterdir()} == {"status.json"}


def test_a_truncated_checkpoint_gives_one_line(tmp_path, cache):
    words = (*SMALL, cache, "loss=dpo", "max_steps=1")
    train(composed(*words), tmp_path)
    for name in ("last", "best"):
        path = tmp_path / f"checkpoints/{name}.ckpt"
        path.write_bytes(path.read_bytes()[:2000])
    done = forked(tmp_path, "ckpt_path=last", "hydra.run.dir=.")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "last.ckpt: no whole checkpoint of ours (File is not a zip file), and no" in done.err
    assert numbers(tmp_path)["steps"] == 1  # what the run had stays


@pytest.mark.slow
def test_a_cut_checkpoint_costs_the_steps_since_the_one_before(tmp_path, cache, whole):
    """As after a kill, which leaves both."""
    process = begun(tmp_path, cache, "checkpoint.every_n_steps=2", steps=6)
    process.kill()
    end(process)
    kept = tmp_path / "run/checkpoints"
    former, last = kept / "previous.ckpt", kept / "last.ckpt"
    if not last.exists():  # killed between the two names
        former.rename(last)
    if not former.exists():  # killed while it made room for the next
        former.write_bytes(last.read_bytes())
    last.write_bytes(last.read_bytes()[:5000])
    done = gone_on(tmp_path)
    (line,) = [text for text in done.out.splitlines() if "no whole checkpoint" in text]
    assert line.endswith("in its place") and "taking previous.ckpt of outer step" in line
    assert {path.name for path in kept.iterdir()} == {"last.ckpt", "best.ckpt"}
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_a_run_directory_has_one_writer(tmp_path, cache, whole):
    """The second is told who the first is and touches nothing; the first ends as if alone."""
    process = begun(tmp_path, cache, steps=2)
    os.kill(process.pid, signal.SIGSTOP)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words in (("ckpt_path=last",), ("loss=dpo",)):
        done = forked(tmp_path, *words, "hydra.run.dir=run")
        assert done.code == 2 and done.err.count("\n") == 1
        assert f"run is written by process {process.pid} on " in done.err
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before == after
    os.kill(process.pid, signal.SIGCONT)
    assert end(process).code == 0
    assert_same_run(whole, tmp_path / "run")
    assert not (tmp_path / "run/writer.lock").exists()


@contextmanager
def files_of_at_most(size: int):
    """Commands begun inside can write no larger file: as a quota, or a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.slow
def test_no_room_for_a_checkpoint(tmp_path, cache, whole):
    process = begun(tmp_path, cache, steps=3)
    process.kill()
    end(process)
    kept = tmp_path / "run/checkpoints"
    with files_of_at_most((whole / "checkpoints/last.ckpt").stat().st_size // 2):
        done = command(tmp_path, "ckpt_path=last", "hydra.run.dir=run")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "error: cannot write " in done.err and "MiB wanted, " in done.err
    assert "the last.ckpt before it is whole, and ckpt_path=last goes on from there" in done.err
    said = status(tmp_path / "run")
    assert said["state"] == "failed" and f"error: {said['error']}\n" == done.err
    assert not list(kept.glob("*.tmp"))
    gone_on(tmp_path)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("harm", ["version", "target"])
def test_a_run_of_another_version_is_refused(tmp_path, cache, harm):
    train(composed(*SMALL, cache, "loss=dpo", "max_steps=1"), tmp_path)
    if harm == "version":
        told = status(tmp_path)
        (tmp_path / "status.json").write_text(json.dumps({**told, "version": "0.1.4"}))
        says = "is a run of spo_lightning 0.1.4, and this is "
    else:
        path = tmp_path / "config.yaml"
        path.write_text(
            path.read_text().replace("spo_lightning.losses.dpo", "spo_lightning.old.dpo")
        )
        says = "it names spo_lightning.old.dpo, which is not there any more"
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="go on with the version that began it") as caught:
        going_on(tmp_path)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_signal_ends_a_sweep(tmp_path, cache):
    """The job in hand saves; the jobs after it do not start."""
    words = (*COMMAND, cache, "seed=0,1", "sft.seed=0", "hydra.sweep.dir=sweep")
    process = start(tmp_path, "-m", *words)
    path, until = tmp_path / "sweep/0/metrics.csv", time.monotonic() + 90
    while not path.exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    done = end(process)
    job, sweep = done.err.splitlines()
    assert done.code == 143 and job == "job 0 (seed=0) interrupted: stopped by SIGTERM"
    assert sweep.startswith("stopped by SIGTERM. Go on with: ")
    assert status(tmp_path / "sweep/0")["state"] == "interrupted"
    assert not (tmp_path / "sweep/1").exists()
