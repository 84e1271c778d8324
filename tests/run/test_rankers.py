"""A ranker from the command's point of view: trained, looked at, asked, gone on with, refused."""

import csv
import json

import pytest
from fitting import config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairs import CONF
from test_rewards import TINY

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.evaluation.totals import wilson
from spo_lightning.models.policy import opened
from spo_lightning.models.rankers import preferences
from spo_lightning.run.evaluation import evaluate
from spo_lightning.train import train
from spo_lightning.world import World

ROWS = [
    {"prompt": f"{n}+1=", "chosen": f"{n + 1}.", "rejected": f"{n - 1}!", "odd": n % 2}
    for n in range(60)
]
DATA = ("data=pairs", "data.path=rows.jsonl", "data.eval_fraction=0.3")
SETTINGS = {"dtype": "float32", "attention": "auto", "trust_remote_code": False}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("rankers")
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    (where / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    return where


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = (*TINY, "max_steps=50", "eval.every_n_steps=25", "data.eval_fraction=0.3")
        return train(config(*words, "loss=ranker", "eval.by=odd"), place / "run")


@pytest.fixture(autouse=True)
def there(place, run, monkeypatch):
    monkeypatch.chdir(place)


def evaluated(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("eval", ["hardware=cpu", *DATA, *words])
    return evaluate(cfg, World())


def saved(where="run/model"):
    return opened(where, OmegaConf.create(SETTINGS), "cpu")


def test_it_learns_and_both_orders_agree(place, run):
    before, after = run["init"], run["final"]
    assert before["preference/accuracy"] < 0.7 and before["orders/contradict"] > 0.5
    assert after["preference/accuracy"] == 1 and after["orders/contradict"] == 0
    low, high = after["preference/accuracy_low"], after["preference/accuracy_high"]
    counts = [n for n in range(1, 60) if wilson(1.0, n) == pytest.approx((low, high))]
    assert len(counts) == 1 and counts[0] < 30  # of pairs, not of their orders
    with (place / "run/metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert float(rows[0]["train/loss"]) > 2 * float(rows[-1]["train/loss"])
    assert (place / "run/samples.jsonl").read_text() == ""  # it answers nothing


def test_eval_finds_the_numbers_of_the_run(run):
    found = evaluated("checkpoint=run/model", "eval.by=odd")
    for name, value in found.pop("by")["1"].items():
        assert value == pytest.approx(run["final"]["by"]["1"][name], abs=1e-5), name
    assert {"preference/accuracy_low", "orders/contradict"} <= found.keys()
    for name, value in found.items():
        assert value == pytest.approx(run["final"][name], abs=1e-5), name


def test_it_is_asked_in_both_orders(run):
    """What is preferred turns round with the answers; what is alike is not asked about."""
    ranker = saved()
    asked = [(row["prompt"], row["chosen"], row["rejected"]) for row in ROWS[5:11]]
    turned = [(prompt, other, one) for prompt, one, other in asked]
    odds, back = (
        [it or 0.0 for it in preferences(ranker, some, max_length=512, batch_size=5)]
        for some in (asked, turned)
    )
    assert min(odds) > 0 and back == pytest.approx([-it for it in odds], abs=1e-4)
    some = [("1+1=", "2", "2"), ("1+1=", "", "2"), ("1+1=" * 200, "2", "3")]
    assert preferences(ranker, some, max_length=300, batch_size=5) == [None] * 3
    assert preferences(ranker, [], max_length=300, batch_size=5) == []


def test_another_loss_makes_a_policy_of_it(place, run):
    words = [word for word in TINY if "model.config" not in word]
    named = ("model=pretrained", "model.pretrained=run/model", "max_steps=0")
    train(config(*words, *named, "loss=ranker", "data.eval_fraction=0.3"), place / "again")
    kept = json.loads((place / "again/metrics.json").read_text())["init"]
    assert kept["preference/accuracy"] == 1 and saved("again/model").template is not None
    train(config(*words, *named, "loss=sft"), place / "policy")
    assert saved("policy/model").template is None
    with pytest.raises(UserError, match="is no ranker: train one with loss=ranker"):
        preferences(saved("policy/model"), [("a", "b", "c")], max_length=9, batch_size=1)


@pytest.mark.slow
def test_adapters_and_the_penalty_go_with_it(place, run):
    words = [word for word in TINY if "model.config" not in word]
    named = ("model=pretrained", "model.pretrained=run/model", "model.lora.rank=4")
    more = ("loss=ranker", "solver=penalty", "data.eval_fraction=0.3")
    done = train(config(*words, *named, *more), place / "adapted")
    assert done["final"]["preference/accuracy"] > 0.9
    assert done["final"]["logps/chosen"] != pytest.approx(done["init"]["logps/chosen"], abs=1e-3)
    assert (place / "adapted/model/adapter_model.safetensors").exists()
    found = evaluated("checkpoint=adapted/model")
    for name, value in found.items():
        assert value == pytest.approx(done["final"][name], abs=1e-5), name


KEYS = [
    ("data.stream=true", "data.stream=True does not go with a ranker: its questions are made"),
    ("diagnostics.quality.every_n_steps=50", "diagnostics.quality.every_n_steps=50 does not go"),
    ("diagnostics.probes.every_n_steps=5", "diagnostics.probes.every_n_steps=5 does not go with"),
    ("loss.template=A or B", "loss.template lacks {prompt}: the model has to be shown it"),
    ("loss.label_smoothing=0.5", "loss.label_smoothing=0.5: it must be"),
]


@pytest.mark.parametrize("word, says", KEYS)
def test_a_key_that_it_has_nothing_for(word, says):
    cfg, plain = config("loss=ranker", *DATA, word), config("loss=ranker", *DATA)
    with pytest.raises(UserError) as caught:
        knobs.check(cfg, knobs.Given([word.partition("=")[0]], {}, plain))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "words, says",
    [
        (("reference=run/model",), "reference has no effect: run/model is a ranker; leave it out"),
        (("data=arithmetic", "~data.path"), "run/model is a ranker, and this data samples"),
        (("data.path=texts.jsonl",), "rows have one answer each, and a ranker compares two: name"),
    ],
)
def test_an_evaluation_that_is_refused(words, says):
    data = [word for word in DATA if "~data.path" not in words or word.startswith("data.eval")]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        named = [word for word in words if not word.startswith("~")]
        cfg = compose("eval", ["hardware=cpu", *data, "checkpoint=run/model", *named])
    with pytest.raises(UserError) as caught:
        evaluate(cfg, World())
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
