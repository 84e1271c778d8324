"""The report page: what it says of run directories, what it refuses to be harmed by."""

import csv
import json
import os
import shutil
import subprocess
import threading
import urllib.request
from html.parser import HTMLParser
from itertools import product

import pytest
from omegaconf import OmegaConf

from spo_lightning.records.directory import CHOICES
from spo_lightning.report import page, paper, sweep_charts, sweep_page
from spo_lightning.report.__main__ import main as report_main
from spo_lightning.report.build import build, content, found
from spo_lightning.report.charts import spread
from spo_lightning.report.page import Note, Table, visible
from spo_lightning.report.reading import POINTS, read, runs_of
from spo_lightning.report.watch import serve

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
COLUMNS = (
    *("train/logps/chosen", "train/logps/rejected", "train/rewards/margins", "train/loss"),
    *("train/displacement/chosen", "train/displacement/rate", "train/displacement/alarm"),
    *("train/learning_rate", "train/ches/mean", "eval/mass/top10", "eval/displacement/chosen"),
    "eval/loss",
)
HOSTILE = {
    "script": "</script><script>window.harmed=1</script><img src=x onerror=harmed=1>",
    "long": "x" * 100_000,
    "turned": "\u202eright to left\u2066",
    "arabic": "\u0645\u0631\u062d\u0628\u0627",
    "emoji": "\U0001f600",
    "nul": "a\0b\x1b[31m",
    "surrogate": "\ud800 broken",
}


def written(
    room, *, steps=100, seed=0, state="finished", final=None, config=None, samples=(), **options
):
    """A run directory as a run leaves it."""
    room.mkdir(parents=True)
    choices = {"data": "arithmetic", "model": "llama", "loss": "dpo", "solver": "penalty"}
    choices |= options
    plain = {"seed": seed, "sft": {"seed": seed}, "loss": {"beta": 0.1}, **(config or {})}
    head = f"{CHOICES}{json.dumps(choices)}\n"
    (room / "config.yaml").write_text(head + OmegaConf.to_yaml(OmegaConf.create(plain)))
    with (room / "metrics.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *COLUMNS])
        for step in range(1, steps + 1):
            late = step / steps
            held = ["", "", ""] if step % 50 else [1 - late / 10, -late, 0.7 - late / 5]
            numbers = [
                -2 - late,
                -3 - 2 * late,
                late,
                0.7 - late / 2,
                -late,
                late,
                float(late > 0.5),
            ]
            writer.writerow([step, *numbers, 1e-4, late, *held])
    status = {"state": state, "stage": "done", "step": steps, "max_steps": steps, "error": None}
    (room / "status.json").write_text(json.dumps({**status, "version": "0.1.0"}))
    init = {"exact_match": 0.9, "win_rate": 0.5, "displacement/chosen": 0.0}
    numbers = {"init": init, "final": final, "choices": choices, "seconds": {"training": 3.0}}
    if final is not None:
        (room / "metrics.json").write_text(json.dumps(numbers))
    text = "".join(json.dumps(row) + "\n" for row in samples)
    (room / "samples.jsonl").write_text(text)
    return room


def sample(prompt="1+1=?", moved=-1.0, **more):
    row = {"prompt": prompt, "reference": "2", "before": "2", "after": "3"}
    row |= {"chosen": "1+1=2", "rejected": "1+1=3"}
    judged = {"before_ok": True, "after_ok": False}
    return {**row, **judged, "chosen_delta": moved, "rejected_delta": 2 * moved, **more}


FINAL = {
    "exact_match": 0.8,
    "win_rate": 0.7,
    "displacement/chosen": -1.5,
    "displacement/rate": 0.6,
}


class Elements(HTMLParser):
    """Every element and its attributes."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


def html_of(room, **more):
    return build([room], stills=False, **more)[0].read_text()


def blocks(directories):
    return {s.title: s.blocks for s in content(directories, found(directories))[1]}


def test_a_run(tmp_path):
    room = written(tmp_path / "run", final=FINAL, samples=[sample(), sample("2+2=?", -3.0)])
    found = blocks([room])
    (table,) = [b for b in found["Before and after"] if hasattr(b, "rows")]
    assert ["exact_match", 0.9, 0.8, pytest.approx(-0.1), "share of prompts"] in table.rows
    said = " ".join(b.text for b in found["Before and after"] if hasattr(b, "text"))
    assert "seed 0" in said and "Step 51: the alarm sounded" in said
    keys = [chart.key for chart in found["Where the probability goes"]]
    assert keys == ["logps", "mass", "displacement_rate", "displacement", "balance"]
    (lost,) = [b for b in found["Pair by pair"] if hasattr(b, "head")]
    assert [row[0] for row in lost.rows] == ["2+2=?", "1+1=?"]  # the worst first
    assert [c.title for c in found["Diagnostics"]] == ["ches/mean"]
    moved = found["Where the probability goes"][3].data
    (held,) = [one for one in moved if one["line"]["dash"] == "dash"]
    assert (held["x"], held["y"]) == ([0, 50, 100], [0.0, -0.5, -1.0])  # from init on
    written_files = build([room])
    assert [path.name for path in written_files] == ["report.html", "table.md", "figures"]
    stills = {path.stem for path in (room / "figures").iterdir()}
    assert {"logps", "balance", "deltas", "pairs"} <= stills
    assert all(
        (room / f"figures/{key}.{kind}").stat().st_size > 2000
        for key in stills
        for kind in ("svg", "png")
    )


def test_curves_are_thinned_and_keep_their_ends(tmp_path):
    run = read(written(tmp_path / "run", steps=10_001), "run", {})
    loss = run.curves["train/loss"]
    assert len(loss) <= POINTS + 1 and (loss.index[0], loss.index[-1]) == (1, 10_001)
    assert loss.iloc[-1] == pytest.approx(0.2)
    assert run.curves["eval/mass/top10"].index[:2].tolist() == [50, 100]
    assert run.alarm == 5001


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text_is_text(tmp_path, name):
    text = HOSTILE[name]
    rows = [sample(text, before=text, after=text, reference=text)]
    room = written(tmp_path / "run", final=FINAL, samples=rows)
    found = Elements(html_of(room)).found
    plainly = Elements(html_of(written(tmp_path / "other", final=FINAL, samples=[sample()]))).found
    assert [tag for tag, _ in found] == [tag for tag, _ in plainly]
    assert not any(key.startswith("on") for _, attrs in found for key in attrs)


def test_what_cannot_be_seen_is_shown():
    assert visible(HOSTILE["nul"]) == "a\u2400b\u241b[31m"
    assert visible(HOSTILE["turned"]) == "[U+202E]right to left[U+2066]"
    assert visible(HOSTILE["surrogate"]) == "\ufffd broken"
    assert visible(HOSTILE["arabic"] + HOSTILE["emoji"]) == HOSTILE["arabic"] + HOSTILE["emoji"]
    assert json.loads(page.embedded({"a": "</script>&", "b": [float("nan"), 1 / 3]})) == {
        "a": "</script>&",
        "b": [None, 0.333333],
    }
    assert "<" not in page.embedded("<script>")


def test_runs_that_are_broken_are_named(tmp_path):
    whole = written(tmp_path / "sweep/0", final=FINAL)
    (whole / "metrics.json").write_text((whole / "metrics.json").read_text()[:50])
    cut = written(tmp_path / "sweep/1", final=FINAL)
    (cut / "metrics.csv").write_text((cut / "metrics.csv").read_text() + "101,-1.")
    odd = written(tmp_path / "sweep/2", final=FINAL)
    (odd / "metrics.csv").write_text("step,train/loss\n1,0.5\n2,what\n3,0.3\n")
    empty = tmp_path / "sweep/3"
    empty.mkdir()
    (empty / "status.json").write_text("")
    old = tmp_path / "sweep/4"  # before choices stood in config.yaml
    old.mkdir()
    (old / "metrics.json").write_text(json.dumps({"init": {}, "final": {"exact_match": 1}}))
    (old / "config.yaml").write_text("seed: 0\n")
    (old / "samples.jsonl").write_text('{"prompt": "1"}\n{"prom')
    failed = written(tmp_path / "sweep/5", final=None, state="failed")
    status = json.loads((failed / "status.json").read_text())
    (failed / "status.json").write_text(json.dumps({**status, "error": "loss.beta=-1: no"}))
    notes = [b.text for b in blocks([tmp_path / "sweep"])["The answer"]]
    for told in (
        "0: metrics.json: unreadable: it was cut off, or is no object",
        "1: metrics.csv: 1 row(s) cut off, left out",
        "2: metrics.csv: 1 unreadable row(s) left out",
        "3: metrics.csv: no row yet",
        "4: samples.jsonl: 1 unreadable row(s) left out",
        "5: loss.beta=-1: no",
    ):
        assert told in notes
    html_of(tmp_path / "sweep")
    for room in (tmp_path / "sweep").iterdir():
        if room.is_dir():
            html_of(room)
    assert read(odd, "odd", {}).curves["train/loss"].to_dict() == {1: 0.5, 3: 0.3}


def test_values_of_other_kinds_than_expected(tmp_path):
    """Nothing in a run's files ends its page, or that of its sweep."""
    for number, (name, value) in enumerate(
        [
            ("status.json", {"state": ["a"], "error": {"b": 1}, "step": None}),
            ("metrics.json", {"init": None, "final": {"exact_match": "1"}, "seconds": [1]}),
            ("metrics.json", {"init": {}, "final": {"exact_match": None}, "choices": None}),
            ("metrics.json", {"final": {"win_rate": float("nan"), "exact_match": True}}),
            ("metrics.json", {"final": {"win_rate": 0.5}, "choices": {"loss": ["a"]}}),
            ("samples.jsonl", {"prompt": ["a", 1], "chosen_delta": float("nan"), "after": 3}),
        ]
    ):
        room = written(tmp_path / f"sweep/{number}", final=FINAL, seed=number)
        (room / name).write_text(json.dumps(value) + "\n")
        html_of(room)
    room = written(tmp_path / "sweep/deep", final=FINAL, config={"seed": [1]})
    for name in ("samples.jsonl", "status.json"):
        (room / name).write_text("[" * 200_000)
    (room / "metrics.csv").write_text("step,train/loss,train/loss\n1,2,3\n")
    html_of(room)
    secret = tmp_path / "private.txt"
    secret.write_text("nobody's business")
    (room / "train.log").symlink_to(secret)
    assert "nobody's business" not in html_of(room)
    html_of(tmp_path / "sweep")


def test_jobs_that_only_their_sweep_knows(tmp_path):
    """One was killed in mid-run and could not say so; one never began. The sweep was moved."""
    top = tmp_path / "sweep"
    killed = written(top / "0", final=None, state="running")
    written(top / "1", final=FINAL)
    jobs = [
        {
            "directory": "/elsewhere/sweep/0",
            "words": ["a=1"],
            "state": "died",
            "error": "signal 9",
        },
        {"directory": "/elsewhere/sweep/1", "words": ["a=2"], "state": "finished", "error": None},
        {"directory": "/elsewhere/sweep/2", "words": ["a=3"], "state": "failed", "error": "a: no"},
    ]
    (top / "sweep.json").write_text(json.dumps({"jobs": jobs}))
    found = blocks([top])
    assert [row[:2] for row in found["Runs"][0].rows] == [
        ["0", "died"],
        ["1", "finished"],
        ["2", "failed"],
    ]
    notes = [b.text for b in found["The answer"]]
    assert "0: a=1: signal 9" in notes and "2: a=3: a: no" in notes
    assert (killed / "report.html").exists() is False


def test_what_changes_no_number_tells_no_settings_apart(tmp_path):
    """A job that was gone on with has its checkpoint in its configuration."""
    for seed, path in enumerate((None, "last")):
        config = {
            "ckpt_path": path,
            "report": {"enabled": not seed},
            "log": {"every_n_steps": seed},
        }
        written(tmp_path / f"sweep/{seed}", seed=seed, final=FINAL, config=config)
    (table,) = blocks([tmp_path / "sweep"])["Ranking"]
    assert [row[1:3] for row in table.rows] == [["run", 2]]


def test_the_papers_layout_knows_spo_from_other_solvers(tmp_path):
    """Bare is solver=none, + SPO is the penalty; SFT on its own rows is the second control."""
    for name, match, options, sft in (
        ("bare", 0.1, {"solver": "none"}, None),
        ("spo", 0.9, {"loss": "spo"}, None),
        ("other", 0.5, {"solver": "unrolled"}, None),
        ("chosen", 0.8, {"loss": "sft", "solver": "none"}, None),
        ("own", 0.7, {"loss": "sft", "solver": "alternating"}, "own"),
    ):
        for seed in (0, 1):
            final, config = {**FINAL, "exact_match": match}, {"data": {"sft": sft}}
            room = tmp_path / f"sweep/{name}-{seed}"
            written(room, seed=seed, final=final, config=config, **options)
    _, table, _ = blocks([tmp_path / "sweep"])["Methods, bare and with SPO"]
    assert {row[0]: row[2] for row in table.rows} == {
        "init": "0.900 ± 0.000",
        "SFT on chosen": "0.800 ± 0.000",
        "SFT on the SFT set": "0.700 ± 0.000",
        "DPO": "0.100 ± 0.000",
        "DPO + SPO": "0.900 ± 0.000",
        "DPO + unrolled": "0.500 ± 0.000",
    }
    assert table.head[6] == "exact match, minus bare" and table.rows[4][6] == "+0.800 ± 0.000"


@pytest.mark.parametrize(
    "words, name",
    [
        ("loss=spo seed=1", "DPO + SPO"),
        ("seed=1", "DPO + SPO"),
        ("loss=dpo", "DPO"),
        ("loss=dpo solver=penalty", "DPO + SPO"),
        ("loss=cpo solver=implicit", "CPO + implicit"),
    ],
)
def test_a_method_by_the_words_of_its_row(words, name):
    (job,) = paper.jobs([{"words": words}])
    assert paper.method_of(job.choices) == name


@pytest.mark.parametrize(
    "number, kinds", [("rewards/margins", []), ("preference/accuracy", [Note, Table])]
)
def test_methods_without_both_numbers(tmp_path, number, kinds):
    """The paper's chart needs two numbers; without them the rest of the page stands."""
    for loss, solver in (("spo", "penalty"), ("dpo", "none")):
        for seed in (0, 1):
            more = {"final": {number: 0.1}, "loss": loss, "solver": solver}
            written(tmp_path / f"sweep/{loss}-{seed}", seed=seed, **more)
    found = blocks([tmp_path / "sweep"])["Methods, bare and with SPO"]
    assert [type(block) for block in found] == kinds
    html_of(tmp_path / "sweep")


def test_secrets_and_the_home_folder_stay_out(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "key-of-wandb-123")
    monkeypatch.setenv("HF_TOKEN", 'hf_token-456<"&')
    monkeypatch.setenv("OTHER_TOKEN", "undefined")  # a word of the plots' library
    monkeypatch.setenv("HOME", str(tmp_path))
    config = {"logger": {"api_key": "plain-secret-789"}, "note": "uses key-of-wandb-123"}
    rows = [sample(f'hf_token-456<"& {tmp_path}/data {tmp_path}er')]
    room = written(tmp_path / "run", final=FINAL, config=config, samples=rows)
    text = html_of(room)
    for secret in ("key-of-wandb-123", "hf_token-456", "plain-secret-789", f"{tmp_path}/"):
        assert secret not in text
    assert "~/run" in text and "~/data" in text and f"{tmp_path}er" in text
    assert text.count("undefined") > 100


def grid(top):
    """beta x weight x two seeds; the win rate grows with both, capability falls with beta."""
    for beta in (0.1, 0.5):
        for weight in (1, 3):
            for seed in (0, 1):
                final = {
                    "exact_match": 0.95 - beta / 2 + seed / 100,
                    "win_rate": 0.5 + beta / 10 + weight / 100 + seed / 50,
                    "displacement/chosen": weight / 10 - beta,
                    "displacement/rate": 0.5,
                }
                config = {"loss": {"beta": beta}, "solver": {"weight": weight}}
                name = f"{beta}-{weight}-{seed}"
                more = {"final": final, "config": config, "steps": 10}
                written(top / name, seed=seed, samples=[sample(f"{name}?")], **more)
    return top


def test_a_sweep(tmp_path):
    found = blocks([grid(tmp_path / "sweep")])
    answer = found["The answer"][0].text
    assert "Best by win_rate: loss.beta=0.1 solver.weight=3, 0.550 ± 0.127." in answer
    assert "exact_match there: 0.905 ± 0.064, before 0.900 ± 0.000." in answer
    assert "Next: loss.beta=0.1 solver.weight=1; win_rate: difference +0.020" in answer
    assert "exact_match: difference +0.000 ± 0.000 over 2 seeds, not significant" in answer
    assert "chosen answers gained log-probability in the mean: 0.200 ± 0.000 nats; 50%" in answer
    (ranking,) = found["Ranking"]
    # beta 0.5 won more, and lost more capability than is allowed
    assert [row[1] for row in ranking.rows] == [
        f"loss.beta={beta} solver.weight={weight}" for beta in (0.1, 0.5) for weight in (3, 1)
    ]
    (chart,) = [h for h in found["Over the grid"] if h.key == "heat_win_rate"]
    assert chart.title.endswith(": a field is the mean of 2 runs, over seed")
    (heat,) = chart.data
    axes = [chart.layout[axis]["title"]["text"] for axis in ("xaxis", "yaxis")]
    assert axes == ["loss.beta", "solver.weight"]
    assert (heat["x"], heat["y"]) == (["0.1", "0.5"], ["1", "3"])
    assert [v for row in heat["z"] for v in row] == pytest.approx([0.53, 0.57, 0.55, 0.59])
    assert {c.key for c in found["Curves"]} >= {"curves_logps_chosen", "curves_loss"}
    _, lost = found["Pair by pair, with the best setting"]
    assert [row[0] for row in lost.rows] == ["0.1-3-0?"]
    (runs,) = found["Runs"]
    assert len(runs.rows) == 8 and runs.rows[0][1] == "finished"
    (config,) = found["What differs"]
    assert set(config.head) == {"loss.beta", "solver.weight"}
    assert (tmp_path / "sweep/report.html").exists() is False
    assert [p.name for p in build([tmp_path / "sweep"])] == ["report.html", "table.md", "figures"]
    assert (tmp_path / "sweep/figures/heat_win_rate.svg").exists()


@pytest.mark.slow
def test_more_settings_than_a_legend_tells_apart(tmp_path):
    for beta in range(30):
        config = {"loss": {"beta": beta}}
        written(tmp_path / f"sweep/{beta}", final=FINAL, config=config)
    found = blocks([tmp_path / "sweep"])
    (chart,) = [c for c in found["Curves"] if c.key == "curves_displacement_chosen"]
    told = chart.layout["annotations"]
    names = {f"loss.beta={beta}" for beta in range(30)}
    assert {one["name"] for one in chart.data} == {one["text"] for one in told} == names
    places = [one["ay"] for one in told]
    apart = [b - a for a, b in zip(places, places[1:])]
    assert min(apart) == pytest.approx(0.99 / 30) and max(places) < 0
    (table,) = found["Own loss"]
    row = [0.6, 0.5, -0.1, 0.5, 100]
    assert all(own[1:] == pytest.approx(row) for own in table.rows) and len(table.rows) == 30
    build([tmp_path / "sweep"])
    still = (tmp_path / "sweep/figures/curves_displacement_chosen.svg").read_text()
    assert all(f"<!-- {name} -->" in still for name in names)
    for beta in range(30, 61):
        config = {"loss": {"beta": beta}}
        written(tmp_path / f"sweep/{beta}", final=FINAL, config=config)
    (chart,) = [
        c for c in blocks([tmp_path / "sweep"])["Curves"] if c.key == "curves_displacement_chosen"
    ]
    assert len(chart.data) == 24 and "annotations" not in chart.layout


def test_names_at_the_ends_of_lines_by_hand():
    assert spread([0, 0, 0.5, 5], 1, 5) == [0, 1, 2, 5]
    assert spread([4.9, 5, 5], 1, 5) == [3, 4, 5]


def test_a_map_says_what_it_averages(tmp_path):
    """Three keys vary: two are the axes, and a field is a mean over the third and the seeds."""
    for beta, weight, margin in product((0.1, 0.5, 0.9), (1, 3, 5), (0, 0.1)):
        for seed in (0, 1) if margin else (0,):
            config = {"loss": {"beta": beta}, "solver": {"weight": weight, "margin": margin}}
            room = tmp_path / f"sweep/{beta}-{weight}-{margin}-{seed}"
            written(room, steps=2, seed=seed, final={"win_rate": margin}, config=config)
    (chart,) = blocks([tmp_path / "sweep"])["Over the grid"]
    told = "win_rate (share of prompts, ties half): a field is the mean of 3 runs, over "
    assert chart.title == told + "solver.margin and seed"
    assert chart.data[0]["z"] == [[pytest.approx(0.2 / 3)] * 3] * 3
    assert f"<figcaption>{chart.title}</figcaption>" in html_of(tmp_path / "sweep")


def test_a_comparison_leaves_each_runs_own_page(tmp_path, monkeypatch):
    rooms = [written(tmp_path / name, final=FINAL) for name in ("one", "two")]
    mine = html_of(rooms[0])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["report", "one", "two"])
    report_main()
    assert (rooms[0] / "report.html").read_text() == mine
    assert "one and two" in (tmp_path / "report/report.html").read_text()
    monkeypatch.setattr("sys.argv", ["report", "one", "--output", "there"])
    report_main()
    assert (tmp_path / "there/report.html").read_text() == mine


def test_the_front_by_hand():
    points = [(0.0, 1.0), (1.0, 0.0), (0.5, 0.5), (0.4, 0.4), (0.0, 0.9)]
    beaten = [p for p in points if any(sweep_charts.beats(q, p) for q in points)]
    assert beaten == [(0.4, 0.4), (0.0, 0.9)]


def test_the_verdict_by_hand():
    assert sweep_page.verdict([0.1]).startswith("fewer than two seeds")
    # mean .2, standard deviation .1, t = 4.303: half width .248
    assert sweep_page.verdict([0.1, 0.2, 0.3]) == (
        "difference +0.200 ± 0.248 over 3 seeds, not significant at 95%"
    )
    assert sweep_page.verdict([0.2, 0.2, 0.21]).endswith(", significant at 95%")


def test_a_page_that_is_watched(tmp_path):
    room = written(tmp_path / "run", final=None, state="running")
    server = serve([room], 0)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        top = f"http://127.0.0.1:{server.server_port}"
        html, state = (urllib.request.urlopen(f"{top}/{name}").read() for name in ("", "state"))
        assert b'const STATE = "' + state + b'";' in html and b"state running" in html
        assert urllib.request.urlopen(f"{top}/state").read() == state
        path = room / "status.json"
        path.write_text(path.read_text().replace("running", "finished"))
        os.utime(path, ns=(2**62, 2**62))
        assert urllib.request.urlopen(f"{top}/state").read() != state
        assert b"state finished" in urllib.request.urlopen(f"{top}/").read()
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(f"{top}/../config.yaml")
    finally:
        server.shutdown()
        server.server_close()


def test_runs_below_a_directory_in_their_order(tmp_path):
    for name in ("10", "b0.5", "9", "b0.05", "1/deeper"):
        written(tmp_path / name)
    found = [run.name for run in runs_of([tmp_path])]
    assert found == ["1/deeper", "9", "10", "b0.05", "b0.5"]


PROBE = """
<script>
addEventListener("load", async () => {
  const told = { errors: window.errors };
  await window.drawAll();
  const empty = (place) => !place.querySelector(".js-line, .point, .hm image");
  told.empty = [...document.querySelectorAll(".chart")].filter(empty).map((p) => p.dataset.chart);
  told.charts = document.querySelectorAll(".chart").length;
  const title = (place) => place.querySelector(".xtitle")?.getBoundingClientRect().bottom ?? 0;
  const legend = (place) => place.querySelector(".legend")?.getBoundingClientRect().top ?? 1e9;
  const covered = (place) => legend(place) < title(place) - 1;
  told.covered = [...document.querySelectorAll(".chart")].filter(covered).length;
  told.requests = performance.getEntriesByType("resource").length;
  told.harmed = window.harmed === 1;
  told.wide = document.documentElement.scrollWidth > innerWidth;
  const table = document.querySelector("table.sortable");
  const shown = (cell) => cell.dataset.value ?? cell.textContent;
  const column = () => [...table.tBodies[0].rows].map((row) => shown(row.cells[1]));
  table.tHead.rows[0].cells[1].querySelector("button").click(); told.down = column();
  table.tHead.rows[0].cells[1].querySelector("button").click(); told.up = column();
  const room = document.querySelector(".samples");
  if (room) {
    const count = () => room.querySelectorAll("tbody tr:not([hidden])").length;
    const select = room.querySelector("select"), search = room.querySelector("input");
    told.all = count();
    const pick = (value) => { select.value = value; select.dispatchEvent(new Event("input")); };
    pick("true-false"); told.lost = count(); pick("");
    search.value = "2+2"; search.dispatchEvent(new Event("input")); told.searched = count();
  }
  dispatchEvent(new Event("beforeprint")); await window.drawAll();
  const width = (place) => place.querySelector(".main-svg").getBoundingClientRect().width;
  told.printed = [...new Set([...document.querySelectorAll(".chart")].map(width))];
  document.documentElement.setAttribute("data-told", JSON.stringify(told));
});
</script></body>"""


def browsed(path, folder, *flags):
    """What the page says of itself in Chromium, after sorting, filtering and drawing all."""
    catch = (
        "<head><script>window.errors = [];"
        "addEventListener('error', (e) => errors.push(e.message));"
        "addEventListener('securitypolicyviolation', (e) => errors.push(e.blockedURI));"
        "</script>"
    )
    text = path.read_text().replace("<head>", catch, 1)
    before, _, after = text.rpartition("</body>")
    copy = folder / "probed.html"
    copy.write_text(before + PROBE + after)
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    nowhere = "--host-resolver-rules=MAP * ~NOTFOUND"
    words = [*command, nowhere, "--virtual-time-budget=20000", *flags, copy.as_uri()]
    out = subprocess.run(words, capture_output=True, text=True, timeout=180).stdout
    (top,) = [attrs for tag, attrs in Elements(out).found if tag == "html"]
    return json.loads(top["data-told"])


needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
def test_a_run_in_a_browser(tmp_path, size):
    rows = [sample(text) for text in HOSTILE.values() if text != HOSTILE["surrogate"]]
    rows += [sample("2+2=?", after_ok=True), sample("2+2=?x", before_ok=False)]
    room = written(tmp_path / "run", final=FINAL, samples=rows)
    told = browsed(build([room], stills=False)[0], tmp_path, f"--window-size={size}")
    assert told["errors"] == [] and told["requests"] == 0 and not told["harmed"]
    assert told["empty"] == [] and told["charts"] > 8 and not told["wide"]
    assert told["covered"] == 0 and told["printed"] == [470]
    numbers, empty = [float(v) for v in told["down"] if v], [v for v in told["down"] if not v]
    assert numbers == sorted(numbers, reverse=True) and told["down"][len(numbers) :] == empty
    assert [float(v) for v in told["up"] if v] == numbers[::-1]
    assert (told["all"], told["lost"], told["searched"]) == (8, 6, 2)


@needs_browser
@pytest.mark.slow
@pytest.mark.parametrize("size", ["1200,900", "390,800"])
def test_a_sweep_in_a_browser(tmp_path, size):
    path = build([grid(tmp_path / "sweep")], stills=False)[0]
    told = browsed(path, tmp_path, f"--window-size={size}")
    assert told["errors"] == [] and told["requests"] == 0
    assert told["empty"] == [] and told["charts"] >= 10 and not told["wide"]
    assert told["covered"] == 0 and told["printed"] == [470]
    assert told["down"] == sorted(told["down"], reverse=True)
