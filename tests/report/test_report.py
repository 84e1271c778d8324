"""The report command: what it draws of runs, how it tells repetitions, what it refuses."""

import json
import re

import pytest
from conftest import SMALL, command
from omegaconf import OmegaConf

from spo_lightning.report.__main__ import main as report_main
from spo_lightning.report.paper import jobs, parts
from spo_lightning.report.reading import runs_of
from spo_lightning.report.settings import Sweep

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
    wanted = "error: no run (status.json, metrics.json or metrics.csv) and no eval.json in study"
    assert done.err.strip() == wanted
    assert (tmp_path / "study/table.md").read_text() == "mine"


def runs(top, configs):
    for number, config in enumerate(configs):
        room = top / str(number)
        room.mkdir()
        OmegaConf.save(OmegaConf.create(config), room / "config.yaml")
        numbers = {"init": {}, "final": {"exact_match": 0.5}, "choices": {"loss": "dpo"}}
        (room / "metrics.json").write_text(json.dumps(numbers))
    return {setting.name: setting.seeds for setting in Sweep(runs_of([top])).settings}


def test_keys_that_follow_the_seed_do_not_tell_settings_apart(tmp_path):
    """solver=alternating has a coin of its own, seeded by the run's seed."""
    configs = [
        {"seed": s, "solver": {"pick": {"seed": s}}, "beta": b} for s in (3, 4) for b in (0.1, 0.3)
    ]
    found = runs(tmp_path, configs)
    assert set(found) == {"beta=0.1", "beta=0.3"}
    assert all(seeds == {3, 4} for seeds in found.values())


def test_keys_that_follow_another_are_not_named(tmp_path):
    """solver.beta is the loss's."""
    configs = [{"seed": 0, "loss": {"beta": b}, "solver": {"beta": b}} for b in (0.1, 0.5)]
    assert list(runs(tmp_path, configs)) == ["loss.beta=0.1", "loss.beta=0.5"]


def test_a_seed_of_its_own_tells_settings_apart(tmp_path):
    found = runs(tmp_path, [{"seed": s, "data": {"seed": d}} for s in (0, 1) for d in (0, 7)])
    assert set(found) == {"data.seed=0", "data.seed=7"}


JOBS = [  # words; init and final exact match, then win rate
    ("loss=dpo solver=none seed=0", (0.9, 0.2), (0.5, 0.8)),
    ("loss=dpo solver=none seed=1", (0.8, 0.4), (0.4, 0.7)),
    ("loss=dpo solver=penalty seed=1", (0.8, 0.7), (0.4, 0.9)),
    ("loss=dpo solver=penalty seed=0", (0.9, 0.9), (0.5, 0.8)),
    ("loss=sft solver=none seed=0", (0.9, 0.9), (0.5, 0.6)),
    ("loss=sft solver=none seed=1", (0.8, 0.8), (0.4, 0.6)),
    ("loss=sft solver=alternating solver.weight=1e9 data.sft=own seed=0", (0.9, 1), (0.5, 0.5)),
    ("loss=dpo solver=penalty optimizer.lr=3e-5 solver.weight=3 seed=0", (0.9, 0.8), (0.5, 0.7)),
]


def jobs_table(path):
    names = ("exact_match", "win_rate", "displacement/rate", "displacement/chosen")
    head = [f"{when}/{name}" for when in ("init", "final") for name in names]
    lines = [",".join(["config", "words", *head])]
    for number, (words, match, won) in enumerate(JOBS):
        cells = [match[0], won[0], 0, 0, match[1], won[1], 0.5, -1]
        lines.append(",".join(map(str, [number, f"data=a {words}", *cells])))
    path.write_text("\n".join(lines) + "\n")
    return path


def test_methods_of_a_table_of_jobs(tmp_path, monkeypatch, capsys):
    path = jobs_table(tmp_path / "t.csv")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report_main()
    text = capsys.readouterr().out
    assert text == path.with_suffix(".md").read_text()
    rows = {
        cells[0]: cells[1:]
        for line in text.splitlines()
        if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) > 2
    }
    order = ["init", "SFT on chosen", "SFT on the SFT set", "DPO", "DPO + SPO"]
    assert [name for name in rows if name in order] == order
    # two values' interval: 12.706 * half their difference
    assert rows["init"][:3] == ["2", "0.850 ± 0.635", "0.450 ± 0.635"]
    assert rows["SFT on the SFT set"][:3] == ["1", "1.000", "0.500"]
    assert rows["DPO + SPO"][:3] == ["2", "0.800 ± 1.271", "0.850 ± 0.635"]
    # by seed .9 - .2, .7 - .4 and .8 - .8, .9 - .7; of SFT 0, -.1 and .2, .3
    assert rows["DPO + SPO"][5:7] == ["+0.500 ± 2.541", "+0.100 ± 1.271"]
    assert rows["DPO + SPO"][7:] == ["-0.050 ± 0.635", "+0.250 ± 0.635"]
    assert rows["DPO"][5:] == ["", "", "", ""]
    assert rows["DPO + SPO, lr 3e-5, weight 3"][:3] == ["1", "0.800", "0.700"]
    assert rows["DPO + SPO, default"][:3] == rows["DPO + SPO"][:3]
    # one weight for all: nothing varies
    assert "SFT on the SFT set, weight 1e9" not in rows
    for kind in ("png", "svg"):
        assert path.with_suffix(f".{kind}").stat().st_size > 5000


def test_a_front_along_one_word_and_a_rate_that_is_a_method_s_own(tmp_path):
    weights = [f"loss=dpo solver=penalty solver.weight={w} seed=0" for w in ("0.1", "0.03", "3")]
    betas = ["loss=rpo solver=none loss.eta=0.1 seed=0", "loss=rpo solver=none seed=0"]
    rates = [f"loss=simpo solver=none optimizer.lr=1e-4 seed={seed}" for seed in (0, 1)]
    held = ("loss=sft solver=none seed=0", "loss=dpo solver=none seed=0")
    rows = [{"words": words} for words in (*weights, *betas, *rates, *held)]
    (main,), (front,) = parts(jobs(rows))
    assert list(main.methods) == ["SFT on chosen", "DPO", "SimPO", "RPO"]
    assert main.methods["SimPO"].seeds == {0, 1}
    assert list(front.methods) == [
        *("SFT on chosen", "DPO"),
        *("DPO + SPO, weight 0.03", "DPO + SPO, weight 0.1", "DPO + SPO, weight 3"),
        *("RPO, default", "RPO, eta 0.1"),
    ]


def test_a_task_is_the_capability_where_no_answer_is_right(tmp_path, monkeypatch, capsys):
    """What ``sweep.numbers`` names has a column."""
    path = tmp_path / "t.csv"
    head = ["config", "words"]
    for when in ("init", "final"):
        names = ("exact_match", "win_rate", "tasks/arc/acc", "answers/refused")
        head += [f"{when}/{name}" for name in names]
    rows = [
        ["0", "loss=dpo solver=none seed=0", "", 0.5, 0.3, 0.1, "", 0.4, 0.1, 0.9],
        ["1", "loss=dpo solver=penalty seed=0", "", 0.5, 0.3, 0.1, "", 0.6, 0.3, 0.2],
    ]
    path.write_text("\n".join(",".join(map(str, row)) for row in (head, *rows)) + "\n")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    report_main()
    found = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("|") and "---" not in line
    ]
    assert found[0][:5] == ["method", "seeds", "arc/acc", "win rate", "answers/refused"]
    assert found[1][:5] == ["init", "1", "0.300", "0.500", "0.100"]
    assert found[2][:5] == ["DPO", "1", "0.100", "0.400", "0.900"]
    assert found[3][:5] == ["DPO + SPO", "1", "0.300", "0.600", "0.200"]
    assert found[3][5] == "+0.200"


def test_a_page_of_the_user_s_is_not_written_over(tmp_path, monkeypatch, capsys):
    path = jobs_table(tmp_path / "t.csv")
    path.with_suffix(".md").write_text("# Mine\n")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as ended:
        report_main()
    assert ended.value.code == 2 and "t.md is no table of jobs" in capsys.readouterr().err
    assert path.with_suffix(".md").read_text() == "# Mine\n"


def test_a_csv_of_a_study_s_jobs(tmp_path, monkeypatch, capsys):
    """Designs have hypervolumes, and no objective that stands beside another."""
    path = tmp_path / "t.csv"
    path.write_text("config,words,final/hypervolume\na1,problem=zdt1 seed=0,4.8\n")
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as ended:
        report_main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.count("\n") == 1
    assert "no job has both capability and preference" in told
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "config,words\n"])
def test_a_csv_of_no_jobs(tmp_path, monkeypatch, capsys, text):
    path = tmp_path / "t.csv"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["report", str(path)])
    with pytest.raises(SystemExit) as ended:
        report_main()
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told == (
        f"error: {path}: no row of a job: name a file that sweep.table wrote\n"
    )
