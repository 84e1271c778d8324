"""Runs on rows of one answer and its label: what is trained, what is measured, what is refused."""

import csv
import json
import logging
import math
from pathlib import Path

import pytest
from conftest import forked
from fitting import config
from test_texts import TINY, write

from spo_lightning.config.objective import check_loss
from spo_lightning.data.load import load
from spo_lightning.errors import UserError
from spo_lightning.train import train

SHARED = Path(__file__).resolve().parents[3] / "shared/data/layouts/kto_rows.jsonl"
WORDS = tuple(word for word in TINY if not word.startswith("loss="))
ROWS = [
    {"prompt": f"{n % 12}+1=", "completion": f"{n % 12 + 1}" if n < 12 else "no", "label": n < 12}
    for n in range(20)
]
PAIRS = [{"prompt": f"{n}+1=", "chosen": f"{n + 1}", "rejected": f"no{n}"} for n in range(12)]
TEXTS = [{"prompt": f"{n}+1=", "completion": f"{n + 1}"} for n in range(12)]
OF_TWO = ("rewards/accuracies", "rewards/margins", "preference/accuracy")


def lines(run: Path) -> list[dict]:
    with (run / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def assert_finite(run: Path):
    for line in lines(run):
        cells = {name: float(cell) for name, cell in line.items() if cell}
        assert all(map(math.isfinite, cells.values())), cells
        assert cells["train/loss"] > 0 and cells["eval/loss"] > 0
    told = json.loads((run / "metrics.json").read_text())["final"]
    assert all(math.isfinite(value) for value in told.values())


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    where = tmp_path_factory.mktemp("labelled")
    write(where / "kto.jsonl", ROWS)
    words = ("data.path=kto.jsonl", "loss=kto", "solver=penalty", "hydra.run.dir=run")
    return where, forked(where, *WORDS, *words)


def test_a_run_by_the_command_line(ran):
    where, done = ran
    assert done.code == 0, done.err
    assert "Layout: kto (prompt, completion, label as text): 20 rows\n" in done.out
    assert "desirable rows and" in done.out and "pair;" not in done.out
    assert_finite(where / "run")
    found = lines(where / "run")
    for line in found:
        assert float(line["train/kl"]) >= 0 and float(line["eval/kl"]) >= 0
        assert line["eval/rewards/chosen"] and line["eval/rewards/rejected"]
        assert not any(line[f"{side}/{name}"] for side in ("train", "eval") for name in OF_TWO)
    told = json.loads((where / "run/metrics.json").read_text())
    assert told["final"]["nll/chosen"] < told["init"]["nll/chosen"]
    assert {"rewards/chosen", "rewards/rejected"} <= told["final"].keys()
    assert not {*OF_TWO} & told["final"].keys()
    samples = [json.loads(line) for line in (where / "run/samples.jsonl").open()]
    for row in samples:  # one answer each, and what became of it
        assert [row["chosen"], row["rejected"]].count(None) == 1
        assert (row["chosen_delta"] is None) == (row["chosen"] is None)
        assert (row["rejected_delta"] is None) == (row["rejected"] is None)
    assert (where / "run/report.html").exists()


@pytest.mark.slow
def test_eval_of_it(ran):
    where, _ = ran
    words = ("checkpoint=run/model", "data=pairs", "data.path=kto.jsonl", "data.unpaired=true")
    how = ("dtype=float64", "hardware.precision=64-true", "hardware=cpu", "eval.max_new_tokens=4")
    more = ("data.eval_fraction=0.3", *how)
    done = forked(where, *words, *more, module=("-m", "spo_lightning.eval"))
    assert done.code == 0, done.err
    told = json.loads((where / "eval.json").read_text())
    final = json.loads((where / "run/metrics.json").read_text())["final"]
    for name in ("logps/chosen", "logps/rejected", "nll/chosen"):
        assert told[name] == pytest.approx(final[name], rel=1e-9)
    assert not {*OF_TWO} & told.keys()
    done = forked(where, *words[:-1], *more, module=("-m", "spo_lightning.eval"))
    assert "data.unpaired=true measures every answer by itself" in done.out


def test_inspect_shows_rows(ran):
    where, _ = ran
    words = ("data=pairs", "data.path=kto.jsonl", "model=llama", "loss=kto")
    done = forked(where, *words, module=("-m", "spo_lightning.inspect"))
    assert done.code == 0, done.err
    assert "one row (train, row" in done.out and "prompt + only" in done.out
    assert "answers that have both labels: 0" in done.out
    assert "pair" not in done.out
    page = (where / "inspect.html").read_text()
    assert "One row, token by token" in page and "longer answer" not in page


def held_and_trained(path: Path, *words: str):
    cfg = config(*WORDS, f"data.path={path}", *words)
    task = load(cfg.data)
    return task.held_out, task.train


@pytest.mark.parametrize("name", ["kto", pytest.param("bco", marks=pytest.mark.slow)])
def test_few_of_a_label(name, tmp_path, caplog):
    """2 bad answers against 10, batches of two: most have one label alone."""
    rows = [{**row, "label": n % 6 > 0} for n, row in enumerate(TEXTS)]
    path = write(tmp_path / "kto.jsonl", rows)
    words = (f"loss={name}", f"data.path={path}", "batch_size=2", "micro_batch_size=1")
    with caplog.at_level(logging.INFO):
        train(config(*WORDS, *words, "solver=penalty"), tmp_path / "run")
    assert_finite(tmp_path / "run")
    assert caplog.text.count("desirable rows and") == 1


@pytest.mark.parametrize("label", [True, False])
def test_one_label_alone(label, tmp_path):
    path = write(tmp_path / "kto.jsonl", [{**row, "label": label} for row in TEXTS])
    run = tmp_path / "run"
    train(config(*WORDS, "loss=kto", "solver=penalty", f"data.path={path}"), run)
    assert_finite(run)
    side, other = ("chosen", "rejected") if label else ("rejected", "chosen")
    for line in lines(run):
        assert line[f"train/rewards/{side}"] and not line[f"train/rewards/{other}"]


def test_pairs_are_two_rows_each_and_held_out_as_pairs(tmp_path, caplog):
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    held, rows = held_and_trained(path, "loss=kto")
    of_pairs = held_and_trained(path, "loss=dpo")
    assert held == of_pairs[0] and len(rows) == 2 * len(of_pairs[1])
    for pair, good, bad in zip(of_pairs[1], rows[::2], rows[1::2], strict=True):
        assert good == {name: pair[name] for name in ("prompt", "chosen")}
        assert bad == {name: pair[name] for name in ("prompt", "rejected")}
    with caplog.at_level(logging.INFO):
        found = train(config(*WORDS, "loss=kto", f"data.path={path}"), tmp_path / "run")
    assert f"Training rows: {len(rows)}, each answer of a pair is one" in caplog.text
    assert {*OF_TWO} <= found["final"].keys()
    assert_finite(tmp_path / "run")


def test_a_loss_on_pairs_has_its_pairs_as_before(tmp_path):
    held, rows = held_and_trained(write(tmp_path / "kto.jsonl", ROWS), "loss=dpo")
    assert all({"chosen", "rejected"} <= row.keys() for row in (*held, *rows))
    assert len(held) + len(rows) == 8


def test_a_longer_run_begins_as_a_short_one(tmp_path):
    """What it reads besides its rows is drawn with them."""
    path = write(tmp_path / "kto.jsonl", ROWS)
    words = (*WORDS, "loss=kto", f"data.path={path}")
    for steps in (2, 4):
        train(config(*words, f"max_steps={steps}"), tmp_path / str(steps))
    apart = ("train/time/tokens_per_second",)
    both = [lines(tmp_path / name)[:2] for name in ("2", "4")]
    for mine, theirs in zip(*both):
        assert {k: v for k, v in mine.items() if k not in apart} == {
            k: v for k, v in theirs.items() if k not in apart
        }


@pytest.mark.parametrize(
    "rows, words, says",
    [
        (ROWS, ("batch_size=1",), "batch_size=1: this loss reads each prompt with the answer of"),
        (
            TEXTS,
            (),
            "the layout sft has answers without a label, and this loss asks for good ones",
        ),
        (ROWS, ("diagnostics.ches.every_n_steps=1",), "compares two answers, and this loss has"),
        (ROWS, ("data.drop_high_ches=0.1",), "drop_high_ches=0.1 compares two answers, and this"),
        ([{**TEXTS[0], "label": True}] * 3, ("loss=dpo",), "data.unpaired=true looks at them so"),
    ],
)
def test_refusals(rows, words, says, tmp_path):
    path = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as caught:
        train(config(*WORDS, "loss=kto", f"data.path={path}", *words), tmp_path / "run")
    assert says in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, says",
    [
        (("loss=kto", "data.unpaired=false"), "data.unpaired=False: this loss takes rows of one"),
        (("loss=dpo", "data.unpaired=true"), "data.unpaired=True: this loss takes rows of two"),
        (("loss=kto", "data.stream=true"), "data.stream=true: this loss weighs the labels of all"),
    ],
)
def test_what_the_loss_asks_of_other_keys(words, says):
    with pytest.raises(UserError) as caught:
        check_loss(config(*WORDS, *words), [])
    assert says in str(caught.value)


@pytest.mark.skipif(not SHARED.exists(), reason="needs ../shared, which is absent")
@pytest.mark.parametrize("solver", ["none", "penalty"])
def test_published_rows(solver, tmp_path):
    words = ("loss=kto", f"solver={solver}", f"data.path={SHARED}")
    found = train(config(*WORDS, *words), tmp_path / "run")
    assert_finite(tmp_path / "run")
    assert found["final"]["nll/chosen"] < found["init"]["nll/chosen"]
