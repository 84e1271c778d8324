"""W&B offline, read back with its own reader: names, steps, tables, group, secrets."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, command, end, start

from spo_lightning import dashboard as dashboard_command
from spo_lightning.records import dashboard
from spo_lightning.report.charts import unit

NAMES = {
    *("train/loss", "train/rewards/margins", "train/displacement/rate", "train/grad_norm"),
    *("train/logps/chosen", "train/learning_rate", "train/num_tokens", "train/epoch"),
    *("eval/loss", "eval/nll/chosen", "eval/displacement/chosen", "eval/mass/top10"),
}
KEY, TOKEN = "key-of-wandb-0123456789", "hf_token_0123456789"


BLOCK, HEAD = 32768, 7  # of the file, and of the file and each piece in it


def records(folder):
    """Every record of an offline run. This wandb has its messages in Python and no reader of the
    file: pieces of LevelDB's log (crc, length, kind), none of which crosses a block."""
    from wandb.proto import wandb_internal_pb2

    (path,) = folder.glob("*.wandb")
    data, at, whole = path.read_bytes(), HEAD, b""
    assert data[:4] == b":W&B"
    while at + HEAD <= len(data):
        if BLOCK - at % BLOCK < HEAD:
            at += BLOCK - at % BLOCK
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + HEAD : at + HEAD + length]
        at += HEAD + length
        if kind in (1, 4):  # full, last
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            whole = b""
            yield record


def name_of(item):
    return item.key or "/".join(item.nested_key)


def history(folder):
    rows = [r.history.item for r in records(folder) if r.WhichOneof("record_type") == "history"]
    return [{name_of(item): json.loads(item.value_json) for item in row} for row in rows]


def run_of(folder):
    return next(r.run for r in records(folder) if r.WhichOneof("record_type") == "run")


def summary_of(folder):
    return {
        name_of(item): json.loads(item.value_json)
        for r in records(folder)
        if r.WhichOneof("record_type") == "summary"
        for item in r.summary.update
    }


def exits_of(folder):
    return [r.exit.exit_code for r in records(folder) if r.WhichOneof("record_type") == "exit"]


def written(folder):
    """The same folder, once W&B's own process has written the run's end: on a busy machine that
    may be after the command has ended."""
    until = time.monotonic() + 30
    while not exits_of(folder):
        assert time.monotonic() < until
        time.sleep(0.1)
    return folder


@pytest.mark.slow
def test_an_offline_run_read_back(tmp_path, cache):
    """Of a sweep's job; nothing in its files is a secret."""
    words = (*SMALL, cache, "loss=dpo,spo", "max_steps=4", "eval.every_n_steps=2", "logger=wandb")
    more = ("-m", "hydra.sweep.dir=asked", f"logger.wandb.tags=[mine,{TOKEN}]")
    secrets = {"HF_TOKEN": TOKEN, "WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}
    done = command(tmp_path, *more, *words, **secrets)
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "asked/0/wandb").glob("offline-run-*")
    run = run_of(written(folder))
    assert (run.run_group, run.job_type, run.display_name) == ("asked", "train", "0")
    assert {"mine", "data:slips", "loss:dpo", "solver:none"} <= {*run.tags}
    rows = history(folder)
    seen = {name for row in rows for name in row}
    assert seen >= NAMES
    logged = [row["trainer/global_step"] for row in rows if "train/loss" in row]
    assert logged == [1, 2, 3, 4]
    csv = (tmp_path / "asked/0/metrics.csv").read_text().splitlines()
    at = csv[0].split(",").index("train/loss")
    losses = [float(line.split(",")[at]) for line in csv[1:]]
    assert [row["train/loss"] for row in rows if "train/loss" in row] == losses
    name = "displacement/pairs/values"
    (counts,) = [row[name] for row in rows if name in row]
    samples = (tmp_path / "asked/0/samples.jsonl").read_text().splitlines()
    scored = [row for row in map(json.loads, samples) if row["chosen_delta"] is not None]
    assert sum(counts) == len(scored) > 0
    (table,) = folder.glob("files/media/table/samples*.json")
    kept = json.loads(table.read_text())
    first = json.loads(samples[0])
    assert dict(zip(kept["columns"], kept["data"][0])) == first
    assert len(kept["data"]) == len(samples)
    summary = summary_of(folder)
    numbers = json.loads((tmp_path / "asked/0/metrics.json").read_text())
    assert summary["final/exact_match"] == numbers["final"]["exact_match"]
    assert exits_of(folder) == [0]
    # of SPO's run: whatever a panel shows is there, but for what slips have no judge for
    (folder,) = (tmp_path / "asked/1/wandb").glob("offline-run-*")
    kept = {name for row in history(folder) for name in row} | summary.keys()
    kept |= {name.rpartition("/")[0] for name in kept}  # of a table, of a histogram
    assert dashboard.names() - kept == {"final/win_rate"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert KEY.encode() not in text and TOKEN.encode() not in text, path


def test_page_and_dashboard_name_the_same_units():
    # top-k entropy is a sum of p log2 p, see test_top_against_a_hand_worked_distribution
    assert unit("eval/entropy/top10") == "bits"
    told = {}
    for title, names in (panel for panels in dashboard.LINES.values() for panel in panels):
        word = title.split(", ")[-1]
        told |= dict.fromkeys(names if word in ("nats", "bits") else (), word)
    assert "eval/entropy/top10" in told
    for name, word in told.items():
        assert word in unit(name), name


def test_the_dashboards_definitions(tmp_path, monkeypatch, capsys):
    for name in ("WANDB_API_KEY", "HOME", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    path = tmp_path / "made.json"
    monkeypatch.setattr("sys.argv", ["dashboard", "--project", "mine", "--output", str(path)])
    dashboard_command.main()
    assert (
        capsys.readouterr().out == f"No W&B login (wandb login): the definitions are in {path}\n"
    )
    found = json.loads(path.read_text())
    sections = found["workspace"]["spec"]["section"]["panelBankConfig"]["sections"]
    wanted = [*dashboard.LINES, "Before and after", "beta by weight", "Samples"]
    assert [section["name"] for section in sections if section["panels"]] == wanted
    for text in map(json.dumps, (found["workspace"], found["report"])):
        for name in dashboard.names():
            assert name.removeprefix("final/") in text
    assert found["report"]["project"]["name"] == "mine"


AGENTS = sorted((Path(__file__).parents[2] / "sweeps/wandb").glob("*.agent.yaml"))


@pytest.mark.slow
@pytest.mark.parametrize("path", AGENTS, ids=lambda path: path.stem)
def test_the_command_that_an_agent_runs(tmp_path, cache, path):
    """One run with the first values of its grid, or the middle of its ranges."""
    asked = yaml.safe_load(path.read_text())
    values = {
        name: given["values"][0] if "values" in given else (given["min"] + given["max"]) / 2
        for name, given in asked["parameters"].items()
    }
    filled = {"${interpreter}": [sys.executable], "${program}": [asked["program"]]}
    filled["${args_no_hyphens}"] = [f"{name}={value}" for name, value in values.items()]
    words = [part for word in asked["command"] for part in filled.get(word, [word])]
    assert words[:3] == [sys.executable, "-m", "spo_lightning.train"]
    more = (*SMALL, cache, "max_steps=2", "hydra.run.dir=run")
    done = command(tmp_path, *words[3:], *more, WANDB_MODE="offline")
    assert done.code == 0, done.err
    (folder,) = (tmp_path / "run/wandb").glob("offline-run-*")
    config = {name_of(item): json.loads(item.value_json) for item in run_of(folder).config.update}
    assert config["loss"]["beta"] == values["loss.beta"]
    metric = asked["metric"]["name"].replace("win_rate", "exact_match")  # slips have no judge
    assert any(
        name_of(item) == metric
        for r in records(folder)
        if r.WhichOneof("record_type") == "summary"
        for item in r.summary.update
    )


@pytest.mark.slow
def test_a_run_that_goes_on_keeps_its_id(tmp_path, cache):
    """Stopped after some steps: the two directories together hold every step once."""
    words = (*SMALL, cache, "loss=dpo", "max_steps=400", "eval.every_n_steps=0", "logger=wandb")
    more = ("hydra.run.dir=run", "checkpoint.every_n_steps=7", "eval.max_rows=4")
    process = start(tmp_path, *words, *more, WANDB_MODE="offline")
    until = time.monotonic() + 100
    while not (tmp_path / "run/wandb/logged.json").exists():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    assert end(process).code == 143
    (first,) = (tmp_path / "run/wandb").glob("offline-run-*")
    assert exits_of(first) == [143]
    again = ("ckpt_path=last", "hydra.run.dir=run")
    done = command(tmp_path, *words, *more[1:], *again, WANDB_MODE="offline")
    assert done.code == 0, done.err
    assert f"wandb sync {first}" in done.out
    both = sorted((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len({run_of(folder).run_id for folder in both}) == 1 and len(both) == 2
    steps = [row["trainer/global_step"] for f in both for row in history(f) if "train/loss" in row]
    assert steps == list(range(1, 401))


@pytest.mark.slow
def test_a_run_of_two_processes_has_its_summary(tmp_path, cache):
    """The first of them logs, from the first step to the summary."""
    words = (*SMALL, cache, "loss=dpo", "max_steps=3", "logger=wandb", "hydra.run.dir=run")
    more = ("hardware=ddp", "hardware.accelerator=cpu")
    done = command(tmp_path, *words, *more, timeout=300, WANDB_MODE="offline")
    assert done.code == 0, done.err
    folders = list((tmp_path / "run/wandb").glob("offline-run-*"))
    assert len(folders) == 1
    rows = [row for folder in folders for row in history(folder)]
    assert [r["trainer/global_step"] for r in rows if "train/loss" in r] == [1, 2, 3]
    assert any("samples/ncols" in row or "samples/nrows" in row for row in rows), rows
    numbers = json.loads((tmp_path / "run/metrics.json").read_text())
    told = {name: value for folder in folders for name, value in summary_of(folder).items()}
    assert told["final/exact_match"] == numbers["final"]["exact_match"]
    assert [exits_of(folder) for folder in folders] == [[0]]
