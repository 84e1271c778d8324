"""pairs.jsonl: every held-out pair's numbers, of a run and of an evaluation."""

import json
from pathlib import Path

import pytest
import torch
from fitting import config
from pairs import CONF
from tiny import policy, slow_logps

from spo_lightning.evaluation.each_pair import hashed, make_room, place_of
from spo_lightning.report.build import content, found
from spo_lightning.run.evaluation import evaluate
from spo_lightning.train import train
from spo_lightning.world import ALONE

ROWS = [
    {"prompt": f"{n}+1=", "chosen": f" {n + 1}", "rejected": f" {'no ' * n}{n}"} for n in range(6)
]
RUN = (
    *("data=pairs", "data.path=train.jsonl", "data.eval_path=rows.jsonl", "loss=dpo"),
    *("model.config.hidden_size=32", "model.config.intermediate_size=48", "eval.batch_size=4"),
    *("model.config.num_hidden_layers=1", "max_steps=3", "batch_size=4", "optimizer.lr=1e-2"),
    *("eval.max_new_tokens=3", "hardware=cpu", "cache.dir=cache", "eval.every_n_steps=0"),
)


def evaluated(*words):
    from hydra import compose, initialize_config_dir

    with initialize_config_dir(str(CONF), version_base="1.3"):
        return evaluate(compose("eval", [*words]), ALONE)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("pairs")


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as here:
        here.chdir(place)
        others = [{**row, "prompt": f"0{row['prompt']}"} for row in ROWS]
        for name, rows in (("rows", ROWS), ("train", others)):
            Path(f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return train(config(*RUN), Path("run"))


def test_the_means_are_those_of_the_pairs(run):
    rows = rows_of("run/pairs.jsonl")
    assert [row["row"] for row in rows] == [1, 2, 3, 4, 5, 6]
    for row, given in zip(rows, ROWS):
        assert {name: row[name] for name in given} == given
        for side in ("chosen", "rejected"):
            assert row[f"tokens/{side}"] == len(given[side]) + 1  # bytes and the end mark
            moved = row[f"logps/{side}"] - row[f"reference/{side}"]
            assert row[f"rewards/{side}"] == pytest.approx(0.1 * moved, abs=1e-5)
    for name in ("logps/chosen", "logps/rejected", "rewards/margins"):
        mean = sum(row[name] for row in rows) / len(rows)
        assert mean == pytest.approx(run["final"][name], abs=1e-5), name
    assert max(abs(row["rewards/margins"]) for row in rows) > 0.01


def test_an_evaluation_gives_the_runs_rows_one_by_one_right(run):
    words = ("data=pairs", "data.path=train.jsonl", "data.eval_path=rows.jsonl", "hardware=cpu")
    words += ("checkpoint=run/model", "eval.max_new_tokens=3", "cache.dir=cache")
    evaluated(*words, "eval.batch_size=5")
    rows, before = rows_of("pairs.jsonl"), rows_of("run/pairs.jsonl")
    from transformers import AutoModelForCausalLM

    from spo_lightning.data.encode import encode_texts

    lm = AutoModelForCausalLM.from_pretrained("run/model", dtype=torch.float64)
    tokenizer = policy().tokenizer
    for row, known in zip(rows, before):
        assert row["reference/chosen"] is None and row["rewards/margins"] is None
        text = {"prompt": row["prompt"], "completion": row["rejected"]}
        (pair,) = encode_texts([text], tokenizer, max_length=512, scored="assistant")
        alone = slow_logps(lm, pair).sum().item()
        assert row["logps/rejected"] == pytest.approx(alone, abs=1e-3)
        assert row["logps/rejected"] == pytest.approx(known["logps/rejected"], abs=1e-3)
    evaluated(*words, "eval.pairs=ids", "reference=run/model", "output=two/other.json")
    ids = rows_of("two/other.pairs.jsonl")
    assert [row["prompt"] for row in ids] == [hashed(row["prompt"]) for row in rows]
    assert all(row["rewards/margins"] == 0 for row in ids)
    evaluated(*words, "eval.pairs=off", "output=off/eval.json")
    assert not Path("off").exists()


def test_a_file_of_the_users_stays(tmp_path):
    theirs = tmp_path / "pairs.jsonl"
    assert place_of(tmp_path / "eval.json") == theirs
    for text in ('{"prompt": "a", "chosen": "b"}\n', "[1]\n", "a,b\n"):
        theirs.write_text(text)
        assert place_of(tmp_path / "eval.json") == tmp_path / "eval.pairs.jsonl"
        assert not make_room(theirs)
    theirs.write_text('{"row": 1, "tokens/prompt": 3}\n')
    assert place_of(tmp_path / "eval.json") == theirs
    (tmp_path / "metrics.json").write_text("{}")  # a run's
    assert place_of(tmp_path / "eval.json") == tmp_path / "eval.pairs.jsonl"
    assert make_room(theirs) and not theirs.exists()  # pairs that sample draws have the same name
    assert (tmp_path / "eval.pairs.jsonl").read_text().startswith('{"row": 1')


def test_the_page_browses_them(run):
    blocks = {s.title: s.blocks for s in content([Path("run")], found([Path("run")]))[1]}
    (browsed,) = blocks["Every pair"]
    assert browsed.head[:4] == ["row", "prompt", "chosen", "rejected"]
    margin = browsed.head.index("rewards/margins")
    for row, cells, mark in zip(rows_of("run/pairs.jsonl"), browsed.rows, browsed.marks):
        assert cells[:2] == [row["row"], row["prompt"]]
        assert cells[margin] == row["rewards/margins"]
        assert ("wrong" in mark.split()) == (row["rewards/margins"] < 0)


def test_the_page_of_an_evaluation(run, tmp_path):
    (tmp_path / "eval.json").write_text(json.dumps({"nll/chosen": 0.5, "by": {"a": {"x": 1.0}}}))
    (tmp_path / "pairs.jsonl").write_text(Path("run/pairs.jsonl").read_text())
    blocks = {s.title: s.blocks for s in content([tmp_path], found([tmp_path]))[1]}
    (browsed,) = blocks["Every pair"]
    assert len(browsed.rows) == 6
    told, table, *_ = blocks["Before and after"]
    assert table.rows == [["nll/chosen", None, 0.5, None, "nats per token"]]
    assert "state finished" in told.text
