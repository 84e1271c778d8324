"""Wins of held-out answers in train, eval and sample: rivals, judges, looks in training."""

import csv
import json
import math
import random
from pathlib import Path

import pytest
from endpoints import serving
from fitting import config
from hydra import compose, initialize_config_dir
from pairs import CONF
from tiny import policy

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.models.policy import opened, to_rewards
from spo_lightning.models.rankers import preferences
from spo_lightning.run.evaluation import evaluate
from spo_lightning.run.sampling import sample
from spo_lightning.train import train
from spo_lightning.world import ALONE

HELD = [
    {"prompt": f"{n}+1=", "chosen": f" {n + 1}", "rejected": f" no {n}", "answer": str(n)}
    for n in range(8)
]
DATA = ("data=pairs", "data.path=train.jsonl", "data.eval_path=held.jsonl", "hardware=cpu")
LOOK = ("eval.max_new_tokens=6", "cache.dir=cache", *DATA)
RUN = (
    *LOOK,
    *("model=pretrained", "model.pretrained=start", "loss=dpo", "max_steps=4", "batch_size=4"),
    *("optimizer.lr=1e-2", "eval.every_n_steps=0", "log.every_n_steps=1"),
)


def short(row, text):
    """A judge of a user's own."""
    return -float(len(text))


SHORT = ("judge=function", f"judge.path={__name__}.short")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    room = tmp_path_factory.mktemp("wins")
    others = [{**row, "prompt": f"0{row['prompt']}"} for row in HELD]
    answers = [{"prompt": row["prompt"], "completion": "x" * 40} for row in HELD]
    for name, rows in (("held", HELD), ("train", others), ("theirs", answers)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (room / f"{name}.jsonl").write_text(text)
    made = policy(dtype="float32", num_hidden_layers=1)
    made.save(room / "start", merge=False, card="")
    policy(dtype="float32", num_hidden_layers=1, seed=1).save(room / "other", merge=False, card="")
    judge = to_rewards(policy(dtype="float32", num_hidden_layers=1, seed=2), seed=3)
    judge.save(room / "judge", merge=False, card="")
    ranker = policy(dtype="float32", num_hidden_layers=1, seed=4)
    ranker.is_asked("{prompt} A: {first} B: {second} Better:")
    ranker.save(room / "ranker", merge=False, card="")
    return room


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def composed(name, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [*words])


def evaluated(*words):
    return evaluate(composed("eval", "checkpoint=start", *LOOK, *words), ALONE)


def rows_of(path):
    return [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]


@pytest.mark.parametrize("rival", ["chosen", "theirs.jsonl", "other", "start"])
def test_eval_judges_against_any_rival(rival):
    found = evaluated(*SHORT, f"eval.rival={rival}", "reference=start", f"output={rival}.json")
    rows = rows_of(f"{rival}.pairs.jsonl")
    wins = [
        (len(row["answer"]) < len(row["rival"])) + (len(row["answer"]) == len(row["rival"])) / 2
        for row in rows
    ]
    assert [row["verdict"] for row in rows] == wins
    assert found["win_rate"] == sum(wins) / 8
    assert found["win_rate_low"] <= found["win_rate"] <= found["win_rate_high"]
    texts = {"chosen": [row["chosen"] for row in HELD], "theirs.jsonl": ["x" * 40] * 8}
    if rival in texts:
        assert [row["rival"] for row in rows] == texts[rival]
        bytes_of = sum(len(text) for text in texts[rival]) / 8
        assert found["tokens/rival"] == bytes_of  # a byte is a token there
    else:
        assert len({row["rival"] for row in rows}) > 4
        assert [row["rival"] for row in rows] != [row["answer"] for row in rows]


def test_without_a_judge_nothing_is_counted_and_without_a_rival_none_is_asked():
    assert "win_rate" not in evaluated()
    with pytest.raises(UserError, match="judge has no effect"):
        evaluated(*SHORT)  # the start is the reference, and there is none


def test_a_reward_model_judges_as_its_own_forward():
    found = evaluated("judge=reward", "judge.model=judge", "eval.rival=chosen")
    import torch
    from transformers import AutoModelForSequenceClassification

    lm = AutoModelForSequenceClassification.from_pretrained("judge", dtype=torch.float64).eval()
    tokenizer = policy().tokenizer
    rows = rows_of("pairs.jsonl")

    def reward(row, side):
        ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
        with torch.no_grad():
            return lm(input_ids=torch.tensor([ids])).logits[0, 0].item()

    for row in rows:
        if row["answer"]:
            assert row["verdict"] == (reward(row, "answer") > reward(row, "rival"))
    assert 0 <= found["win_rate"] <= 1


def test_a_ranker_judges_by_its_odds():
    words = ("judge=ranker", "judge.model=ranker", "eval.rival=chosen")
    found = evaluated(*words)
    made = opened("ranker", composed("eval", "checkpoint=start"), "cpu")
    rows = rows_of("pairs.jsonl")
    asked = [(row["prompt"], row["answer"], row["rival"]) for row in rows]
    odds = preferences(made, asked, max_length=512, batch_size=3)
    for row, it in zip(rows, odds):
        assert row["verdict"] == (it and pytest.approx(1 / (1 + math.exp(-it)), abs=1e-5))
    told = [row["verdict"] for row in rows if row["verdict"] is not None]
    assert told and found["win_rate"] == pytest.approx(sum(told) / len(told))


def test_an_endpoint_judges_in_eval_and_in_sample():
    with serving() as server:
        words = ("judge=pairwise", "judge.model=m", f"judge.base_url={server.url}")
        found = evaluated(*words, "eval.rival=theirs.jsonl")
        asked = len(server.asked)
        assert found["win_rate"] == 0.0 and found["judge/contradicting"] == 0.0 and asked == 16
        assert evaluated(*words, "eval.rival=theirs.jsonl") == found
        assert len(server.asked) == asked
        few = ("model=pretrained", "model.pretrained=start", "samples=3", "prompts.max_rows=3")
        done = sample(composed("sample", *few, *LOOK, *words, "output=made.jsonl"), ALONE)
        assert done["prompts"] == 3 and done["pairs"]
        for row in rows_of("made.jsonl"):
            assert len(row["chosen"]) > len(row["rejected"])
            assert row["chosen_score"] > row["rejected_score"]


def test_a_run_looks_while_it_trains_and_keeps_the_best(tmp_path, caplog):
    caplog.set_level("INFO")
    watch = ("eval.judge.every_n_steps=2", "eval.judge.rows=5", "checkpoint.mode=max")
    monitor = ("checkpoint.monitor=eval/win_rate", "eval.rival=theirs.jsonl")
    with serving() as server:
        words = ("judge=pairwise", "judge.model=m", f"judge.base_url={server.url}")
        numbers = train(config(*RUN, *words, *watch, *monitor), tmp_path / "run")
    assert "In training: 5 held-out prompts, answered and judged 2 times: 20 requests" in (
        caplog.text
    )
    with (tmp_path / "run/metrics.csv").open() as file:
        rows = {int(row["step"]): row["eval/win_rate"] for row in csv.DictReader(file)}
    assert {step for step, value in rows.items() if value} == {2, 4}
    assert (tmp_path / "run/checkpoints/best.ckpt").exists()
    assert {"win_rate", "win_rate_low", "tokens/answer"} <= numbers["final"].keys()
    plain = train(config(*RUN, "eval.rival=start"), tmp_path / "plain")
    assert "win_rate" not in plain["final"]
    import torch

    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("run", "plain")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)  # watching changes nothing


REFUSED = [
    (("eval.rival=chosen",), "eval.rival=chosen has no effect: this data has no judge"),
    ((*SHORT, "eval.rival=short.jsonl"), "short.jsonl has no answer to 7 of 8 held-out prompts"),
    ((*SHORT, "eval.rival=nowhere"), "nowhere"),
    (("judge=reward", "judge.model=start"), "judge.model=start is no sequence classifier"),
    (("judge=reward", "judge.model=nowhere", "reference=start"), "nowhere"),
    (("judge=reward", "judge.model=judge"), "judge has no effect: eval.rival=start is the refer"),
    (("judge=ranker", "judge.model=start"), "judge.model=start is no ranker: train one with loss"),
    (("judge=panel",), "judge.members: name two judges at least"),
    (("judge=pairwise", "judge.model=m", "judge.key_from=NO_SUCH"), "judge.key_from=NO_SUCH: no"),
]


@pytest.mark.parametrize("words, says", REFUSED)
def test_what_is_refused(words, says):
    Path("short.jsonl").write_text(json.dumps({"prompt": "0+1=", "completion": "1"}) + "\n")
    with pytest.raises(UserError) as caught:
        evaluated(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)


KEYS = [
    ("eval.judge.rows=8", "eval.judge.rows has no effect: eval.judge.every_n_steps is 0"),
    (
        "checkpoint.monitor=eval/win_rate",
        "checkpoint.monitor=eval/win_rate: set eval.judge.every_n_steps",
    ),
    ("eval.pairs=all", "eval.pairs=all: it must be texts, ids or off"),
]


@pytest.mark.parametrize("word, says", KEYS)
def test_a_key_that_cannot_be_meant(word, says):
    cfg, plain = config("loss=dpo", *DATA, word), config("loss=dpo", *DATA)
    with pytest.raises(UserError) as caught:
        knobs.check(cfg, knobs.Given([word.partition("=")[0]], {}, plain))
    assert str(caught.value).startswith(says)


def test_the_worst_wins_are_no_best_checkpoint():
    words = ("checkpoint.monitor=eval/win_rate", "eval.judge.every_n_steps=1")
    with pytest.raises(UserError, match="set checkpoint.mode=max"):
        knobs.check(config("loss=dpo", *DATA, *words), knobs.Given([], {}, config(*DATA)))


def test_math_verify_compares_values():
    pytest.importorskip("math_verify", reason="the extra verifier is not installed")
    from types import SimpleNamespace

    from spo_lightning.judges.verifier import verifier

    rows = [{"prompt": "p", "answer": answer} for answer in ("1/2", "72", "\\frac{3}{4}", "2")]
    rows.append({"prompt": "p"})
    texts = ["it is 0.5", "48 + 24 = 72. #### 72", "$\\frac{6}{8}$", "three: 3", "1"]
    assert verifier(SimpleNamespace())(rows, texts) == [1.0, 1.0, 1.0, 0.0, None]  # type: ignore


def test_ifevals_checks_follow_its_columns(tmp_path):
    pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    from types import SimpleNamespace

    from spo_lightning.judges.verifier import instructions
    from spo_lightning.sampling.draw import prompts

    rows = [
        {
            "prompt": "Say it without commas, in lowercase.",
            "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"],
            "kwargs": [{}, {}],
        },
        {
            "prompt": "At least 3 words.",
            "instruction_id_list": ["length_constraints:number_words"],
            "kwargs": [{"relation": "at least", "num_words": 3}],
        },
    ]
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = composed("sample", f"prompts.path={path}")
    from spo_lightning.data.rows import Task

    read = prompts(cfg, Task(train=[], held_out=[]))
    judge = instructions(SimpleNamespace())  # type: ignore[arg-type]
    both = [read[0], read[0], read[0], read[1], read[1], {"prompt": "p"}]
    plain = "the children went home and the door was open"
    texts = [plain, "Well, no", plain.replace(" and", ", and"), "one two", "one two three", "x"]
    assert judge(both, texts) == [1.0, 0.0, 0.5, 0.0, 1.0, None]
    wrong = {**read[1], "instruction_id_list": ["nothing:such"]}
    with pytest.raises(UserError, match="IFEval has no instruction nothing:such"):
        judge([wrong], ["a"])
    dutch = {
        "prompt": "In Dutch.",
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "nl"}],
    }
    unsure = "1 2 3 hello"  # Dutch or Finnish, as its detector draws
    assert len({*judge([dutch] * 40, [unsure] * 40)}) == 1
    hashes = {
        "prompt": "With #.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "#", "let_frequency": 1, "let_relation": "at least"}],
    }
    half = "abcdefghijklm"  # a check that counts a letter drawn in the place of what is none
    state = random.getstate()
    assert len({*judge([hashes] * 40, [half] * 40)}) == 1 and random.getstate() == state
