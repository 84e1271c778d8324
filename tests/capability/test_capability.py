"""Answers to prompts of a file, before and after, and how sure their difference is."""

import json
import math

import pytest
from conftest import SMALL, forked
from fitting import config
from tiny import policy

from spo_lightning.capability.look import check, prompts_of
from spo_lightning.capability.paired import change, changes, mcnemar
from spo_lightning.errors import UserError
from spo_lightning.records.summary import run_table
from spo_lightning.report.reading import read
from spo_lightning.report.run_page import sections


def test_mcnemar_by_hand():
    assert mcnemar(0, 0) == mcnemar(4, 4) == 1.0
    assert mcnemar(5, 0) == mcnemar(0, 5) == 2 / 32
    assert mcnemar(1, 6) == 2 * (1 + 7) / 128
    assert 0 < mcnemar(700, 500) < 1e-7  # whole numbers too large for a float


def test_the_interval_of_a_difference():
    alike = [0.0, 1.0, 1.0] * 20
    assert change(alike, alike) == {"difference": 0, "low": 0, "high": 0, "p": 1}
    before, after = [0.0] * 100, [1.0] * 30 + [0.0] * 70
    found = change(before, after)
    assert found["difference"] == pytest.approx(0.3) and found["p"] == 2 / 2**30
    # the bootstrap of a share is a binomial's spread
    half = 1.96 * math.sqrt(0.3 * 0.7 / 100)
    assert found["low"] == pytest.approx(0.3 - half, abs=0.02)
    assert found["high"] == pytest.approx(0.3 + half, abs=0.02)
    # pairing counts: the same two shares apart by chance are far less sure
    mixed = change([1.0] * 35 + [0.0] * 65, [0.0] * 35 + [1.0] * 65)
    assert mixed["difference"] == pytest.approx(0.3) and mixed["p"] > found["p"]
    assert mixed["high"] - mixed["low"] > 1.5 * (found["high"] - found["low"])
    assert "p" not in change([3.0, 4.0], [5.0, 4.0])  # lengths are no rights and wrongs
    told = changes({"a": [0.0], "b": [1.0], "d": []}, {"b": [0.0], "c": [1.0], "d": []})
    assert told.keys() == {"b"}  # of what both have


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_prompts_are_texts_or_messages(tmp_path):
    asked = [{"role": "user", "content": "Hi"}]
    file = written(tmp_path / "asked.jsonl", [{"prompt": "Hi", "note": 1}, {"prompt": asked}])
    cfg = config(f"eval.prompts={file}", "data.system=Be brief.", "data.chat=true")
    first, second = prompts_of(cfg)
    assert (
        first["prompt"] == second["prompt"] == [{"role": "system", "content": "Be brief."}, *asked]
    )
    assert prompts_of(config()) == []


@pytest.mark.parametrize("row", [{"question": "Hi"}, {"prompt": ""}, {"prompt": None}])
def test_a_row_without_a_prompt_is_named(tmp_path, row):
    file = written(tmp_path / "asked.jsonl", [{"prompt": "Hi"}, row])
    with pytest.raises(UserError, match="asked.jsonl, row 2: no 'prompt': add one"):
        prompts_of(config(f"eval.prompts={file}"))


def test_a_run_counts_its_answers_before_and_after(tmp_path, cache):
    file = written(tmp_path / "asked.jsonl", [{"prompt": f"{n}+1=?"} for n in range(6)])
    words = (*SMALL, cache, "max_steps=2", "report.enabled=false", "eval.refusals=['5']")
    done = forked(tmp_path, *words, f"eval.prompts={file}", "hydra.run.dir=run")
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "run/metrics.json").read_text("utf-8"))
    for of in ("answers", "prompts"):
        for kind in ("refused", "repeated", "empty", "cut", "tokens"):
            name = f"{of}/{kind}"
            found = numbers["paired"][name]
            moved = numbers["final"][name] - numbers["init"][name]
            assert found["difference"] == pytest.approx(moved, abs=1e-12)
            assert found["low"] <= found["difference"] <= found["high"]
            assert "p" in found or kind == "tokens"
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    fives = [row["after"].startswith("5") for row in samples]
    assert numbers["final"]["answers/refused"] == sum(fives) / len(fives)
    table = run_table(numbers)
    assert table in done.out and table.count("[") == len(numbers["paired"])
    run = read(tmp_path / "run", "run", {})
    blocks = [block for section in sections(run) for block in section.blocks]
    (shown,) = [block for block in blocks if getattr(block, "key", "") == "paired"]
    assert {row[0] for row in shown.rows} == numbers["paired"].keys()


def test_eval_compares_with_the_reference(tmp_path):
    for seed, name in enumerate(("before", "after")):
        policy(seed=seed, dtype="float32").save(tmp_path / name, merge=False, card="")
    file = written(tmp_path / "asked.jsonl", [{"prompt": f"{n}+1=?"} for n in range(6)])
    words = ("checkpoint=after", "reference=before", "data=slips", "data.eval_prompts=4")
    more = (f"eval.prompts={file}", "eval.max_new_tokens=8", "hardware=cpu", "hardware.threads=1")
    done = forked(tmp_path, *words, *more, module=("-m", "spo_lightning.eval"))
    assert done.code == 0, done.err
    numbers = json.loads((tmp_path / "eval.json").read_text("utf-8"))
    assert {"answers/refused", "prompts/distinct2"} <= numbers.keys()
    assert numbers["reference"].keys() == {name for name in numbers if name.startswith("prompts/")}
    for name, found in numbers["paired"].items():
        moved = numbers[name] - numbers["reference"][name]
        assert found["difference"] == pytest.approx(moved, abs=1e-12)
    assert "prompts/refused" in numbers["paired"] and "prompts/refused" in done.out


@pytest.mark.parametrize("loss", ["reward", "ranker"])
def test_what_ranks_is_asked_nothing(loss):
    cfg = config(f"loss={loss}", "solver=none", "eval.prompts=asked.jsonl")
    with pytest.raises(UserError, match="eval.prompts has no effect: this loss trains a model"):
        check(cfg)
