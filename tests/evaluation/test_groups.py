"""Held-out numbers of several files and of the values of a column: each as if it stood alone."""

import csv
import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
from conftest import forked
from fitting import config, scored
from tiny import policy, random_pairs

from spo_lightning.data.load import load
from spo_lightning.errors import UserError
from spo_lightning.evaluation.groups import check, groups_of, means_by, places_by
from spo_lightning.evaluation.held_out import pair_scores
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.progress import silent
from spo_lightning.report.build import content
from spo_lightning.report.build import found as runs_in
from spo_lightning.train import train

TINY = (
    *("model.config.hidden_size=32", "model.config.intermediate_size=48", "hardware=cpu"),
    *("model.config.num_hidden_layers=1", "batch_size=4", "micro_batch_size=2", "max_steps=2"),
    *("eval.max_new_tokens=4", "eval.every_n_steps=1", "log.every_n_steps=1", "data=pairs"),
    *("hardware.threads=1", "cache.enabled=false", "report.enabled=false", "optimizer.lr=1e-2"),
)


def blocks(directories):
    return {s.title: s.blocks for s in content(directories, runs_in(directories))[1]}


def rows(count, sign):
    shared = {"rejected": "0", "answer": "1"}
    return [
        {"prompt": f"{n}{sign}1=", "chosen": f"{n + 1}", "odd": n % 2, **shared}
        for n in range(count)
    ]


@pytest.fixture
def files(tmp_path):
    for name, some in {"a": rows(12, "*"), "safe": rows(3, "+"), "good": rows(7, "-")}.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    return tmp_path


def test_sums_by_hand():
    parts = {0: {"x": (1.0, 1.0)}, 1: {"x": (4.0, 2.0)}, 2: {"x": (6.0, 1.0)}}
    groups = [("a", "one"), ("b", "one"), ("b", "two")]
    assert places_by(groups) == {"a": [0], "b": [1, 2], "one": [0, 1], "two": [2]}
    found = means_by(parts, groups)
    assert found == {"a": {"x": 1}, "b": {"x": 10 / 3}, "one": {"x": 5 / 3}, "two": {"x": 6}}
    assert places_by([("a", "a"), ("b", "a")]) == {"a": [0, 1], "b": [1]}
    assert means_by(parts, ()) == {}


@pytest.mark.parametrize("size", [1, 4, 20])
def test_a_group_is_scored_as_if_it_stood_alone(size):
    made = policy()
    groups = [("even",) if n % 2 == 0 else ("odd",) for n in range(10)]
    pairs = scored(policy(seed=1).lm, random_pairs(10, longest=9))
    how = {"beta": 0.1, "batch_size": size, "precision": nullcontext, "stages": silent()}
    scorer = Scorer(made.lm, shared=True)
    plain = pair_scores(scorer, pairs, **how)
    whole = pair_scores(scorer, replace(pairs, groups=groups), **how)
    assert whole == plain._replace(by=whole.by) and plain.by == {}
    for first, name in enumerate(("even", "odd")):
        alone = pair_scores(scorer, pairs.take(range(first, 10, 2)), **how)
        assert whole.by[name] == pytest.approx(alone.means, rel=1e-6)
        assert whole.by[name]["nll/chosen"] != pytest.approx(whole.means["nll/chosen"], rel=1e-5)


def test_a_run_has_the_numbers_of_every_name_and_value(files, monkeypatch):
    monkeypatch.chdir(files)
    named = "data.eval_path={safe: safe.jsonl, good: [good.jsonl]}"
    both = train(config(*TINY, "data.path=a.jsonl", named, "eval.by=odd"), files / "both")
    one = train(config(*TINY, "data.path=a.jsonl", "data.eval_path=good.jsonl"), files / "one")
    for when in ("init", "final"):
        by = both[when]["by"]
        assert [*by] == ["safe", "good", "0", "1"] and "by" not in one[when]
        assert by["good"] == pytest.approx(one[when], rel=1e-4, abs=1e-4)
        for name in ("exact_match", "rewards/margins", "displacement/rate"):
            means = (3 * by["safe"][name] + 7 * by["good"][name]) / 10
            assert means == pytest.approx(both[when][name], abs=1e-7)
            assert (by["0"][name] * 6 + by["1"][name] * 4) / 10 == pytest.approx(means, abs=1e-7)
    with (files / "both/metrics.csv").open() as file:
        last = [*csv.DictReader(file)][-1]
    for name in ("loss", "rewards/margins", "entropy/top10"):
        values = {group: float(last[f"eval/{group}/{name}"]) for group in both["final"]["by"]}
        assert values["safe"] != values["good"]
        if name != "entropy/top10":  # a mean over tokens
            whole = (3 * values["safe"] + 7 * values["good"]) / 10
            assert whole == pytest.approx(float(last[f"eval/{name}"]), abs=1e-7)
    saved = json.loads((files / "both/metrics.json").read_text())
    assert saved["final"]["by"] == both["final"]["by"]
    page = blocks([files / "both"])["Before and after"]
    (table,) = [block for block in page if getattr(block, "key", None) == "by"]
    assert {row[0] for row in table.rows} == {"safe", "good", "0", "1"}


def test_names_take_turns_so_that_a_limit_leaves_some_of_each(files, monkeypatch):
    monkeypatch.chdir(files)
    named = "data.eval_path={safe: safe.jsonl, good: good.jsonl}"
    task = load(config(*TINY, "data.path=a.jsonl", named).data)
    assert [row["subset"] for row in task.held_out] == ["safe", "good"] * 3 + ["good"] * 4
    prompts = {row["prompt"] for row in task.held_out}
    assert not prompts & {row["prompt"] for row in task.train} and len(task.train) == 12


def test_names_are_given_on_the_command_line(files):
    named = (f"data.eval_path.{name}={name}.jsonl" for name in ("safe", "good"))
    done = forked(files, *TINY, "data.path=a.jsonl", *named, "hydra.run.dir=run")
    assert done.code == 0, done.err
    assert "safe: exact_match" in done.out and "good: nll/chosen" in done.out
    found = json.loads((files / "run/metrics.json").read_text())["final"]["by"]
    assert [*found] == ["safe", "good"]


def test_columns_that_tell_nothing():
    some = [{"prompt": f"{n}", "chosen": "a", "source": "b"} for n in range(51)]
    assert set(groups_of(some, "source")) == {("b",)} and set(groups_of(some, None)) == {()}
    check(some[:50], "prompt")
    with pytest.raises(UserError, match="eval.by=prompt: 51 values in 51 held-out rows: name a"):
        check(some, "prompt")
    with pytest.raises(UserError, match="eval.by=x: held-out row 1 has prompt, chosen, source: "):
        check(some, "x")


@pytest.mark.parametrize(
    "word, says",
    [
        ("eval.by=topic", "a.jsonl, row 1: no text or number 'topic' for eval.by (found prompt, "),
        ("data.eval_path={}", "data.eval_path={}: name places, as in data.eval_path.helpful=a."),
        ("data.eval_path={x: none.jsonl}", "none.jsonl: no such file: check data.eval_path.x"),
        ("data.eval_path={x: 3}", "data.eval_path.x=3: name a file, directory, glob, url or hub"),
    ],
)
def test_what_is_refused(files, monkeypatch, word, says):
    monkeypatch.chdir(files)
    with pytest.raises(UserError) as caught:
        train(config(*TINY, "data.path=a.jsonl", word), files / "run")
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert not (files / "run/metrics.json").exists()
