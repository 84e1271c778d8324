"""A reward model from the command's point of view: trained, looked at, gone on with, refused."""

import csv
import json

import pytest
from conftest import forked
from fitting import config
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairs import CONF
from tiny import random_pairs

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.evaluation.totals import wilson
from spo_lightning.models.policy import opened
from spo_lightning.models.rewards import rewards
from spo_lightning.run.evaluation import evaluate
from spo_lightning.run.export import export
from spo_lightning.train import train
from spo_lightning.world import World

TINY = (
    *("model.config.hidden_size=32", "model.config.intermediate_size=48", "hardware=cpu"),
    *("model.config.num_hidden_layers=1", "batch_size=4", "micro_batch_size=2", "max_steps=12"),
    *("eval.every_n_steps=4", "log.every_n_steps=1", "data=pairs", "data.path=rows.jsonl"),
    *("hardware.threads=1", "cache.enabled=false", "report.enabled=false", "optimizer.lr=1e-2"),
)
ROWS = [
    {
        "prompt": f"{n}+1=",
        "chosen": f"{n + 1}.",
        "rejected": f"{n - 1}!",
        "margin": 0.25 * (n % 3),  # 0 as well: a pair that is barely told apart
        "odd": n % 2,
    }
    for n in range(60)
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("rewards")
    (where / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    bare = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    (where / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bare))
    return where


@pytest.fixture(scope="module")
def run(place):
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        words = (*TINY, "loss=reward", "eval.by=odd", "data.eval_fraction=0.3")
        return train(config(*words), place / "run")


@pytest.fixture(autouse=True)
def there(place, run, monkeypatch):
    monkeypatch.chdir(place)


def asked(command, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(command, [*words])


DATA = ("data=pairs", "data.path=rows.jsonl")


def evaluated(*words):
    return evaluate(asked("eval", "hardware=cpu", *words), World())


def test_it_learns_and_says_how_sure_that_is(place, run):
    before, after = run["init"], run["final"]
    names = {f"rewards/{n}" for n in ("chosen", "rejected", "margins", "accuracies")}
    names |= {"rewards/accuracies_low", "rewards/accuracies_high"}
    assert {*before} == {*after} == names | {"by"}
    assert after["rewards/accuracies"] == 1 and after["rewards/margins"] > 1
    with (place / "run/metrics.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert float(rows[0]["train/loss"]) > 2 * float(rows[-1]["train/loss"])
    assert rows[-1]["eval/rewards/accuracies"] == "1.0" and rows[-1]["eval/logps/chosen"] == ""
    assert not any(rows[0].get(name) for name in ("train/nll/chosen", "train/loss/lower"))
    (config,) = [json.loads((place / "run/model/config.json").read_text())]
    assert config["architectures"] == ["LlamaForSequenceClassification"]


def test_eval_finds_the_numbers_of_the_run(run):
    found = evaluated(*DATA, "checkpoint=run/model", "eval.by=odd", "data.eval_fraction=0.3")
    by, whole = found.pop("by"), run["final"]
    assert [*by] == ["0", "1"] and by["0"] != by["1"]
    for name, value in found.items():
        assert value == pytest.approx(whole[name], abs=1e-5), name
    for group, some in by.items():
        assert some == pytest.approx(whole["by"][group], abs=1e-5)
        held = [row for row in ROWS if str(row["odd"]) == group]
        low, high = some["rewards/accuracies_low"], some["rewards/accuracies_high"]
        counts = [n for n in range(1, len(held)) if wilson(1.0, n) == pytest.approx((low, high))]
        assert len(counts) == 1  # of the group's own pairs


def test_it_goes_on_from_a_reward_model(place, run):
    named = ("model=pretrained", "model.pretrained=run/model")
    words = [word for word in TINY if "model.config" not in word]
    again = train(
        config(*words, *named, "loss=reward", "max_steps=0", "data.eval_fraction=0.3"),
        place / "again",
    )
    kept = {name: value for name, value in run["final"].items() if name != "by"}
    assert again["init"] == again["final"] == pytest.approx(kept, abs=1e-5)


def test_adapters_train_with_the_head(place):
    """On a base that is loaded; what is saved is adapters and a head."""
    words = [word for word in TINY if "model.config" not in word]
    train(config(*TINY, "loss=sft", "max_steps=0"), place / "base")
    named = ("model=pretrained", "model.pretrained=base/model", "model.lora.rank=4")
    done = train(
        config(*words, *named, "loss=reward", "data.eval_fraction=0.3"), place / "adapted"
    )
    assert done["final"]["rewards/accuracies"] > 0.9
    assert (place / "adapted/model/adapter_model.safetensors").exists()
    found = evaluated(*DATA, "checkpoint=adapted/model", "data.eval_fraction=0.3")
    assert found == pytest.approx(done["final"], abs=1e-5)


def test_an_exported_one_is_the_same(place):
    cfg = asked("export", "checkpoint=run/model", "output=out")
    export(cfg)
    settings = OmegaConf.create(
        {"dtype": "float32", "attention": "auto", "trust_remote_code": False}
    )
    one, two = (opened(where, settings, "cpu", rewards=True).lm for where in ("run/model", "out"))
    pairs = random_pairs(4)
    assert rewards(one, pairs).equal(rewards(two, pairs))


@pytest.mark.parametrize("word", ["loss.margin=true", "loss.center_rewards_coefficient=0.05"])
def test_an_option_changes_the_loss(place, run, word):
    name = word.partition("=")[0].removeprefix("loss.")
    train(config(*TINY, "loss=reward", word, "max_steps=1"), place / name)
    train(config(*TINY, "loss=reward", "max_steps=1"), place / f"no {name}")
    losses = []
    for where in (name, f"no {name}"):
        with (place / where / "metrics.csv").open() as file:
            losses.append(float(next(csv.DictReader(file))["train/loss"]))
    assert losses[0] > losses[1] + 1e-4


KEYS = [
    ("solver=penalty", "a reward model is trained with solver=none: the others keep the"),
    ("solver=unrolled", "a reward model is trained with solver=none"),
    ("solver=implicit", "a reward model is trained with solver=none"),
    ("solver=alternating", "a reward model is trained with solver=none"),
    ("model.reference=run/model", "model.reference=run/model does not go with a reward model"),
    ("data.stream=true", "data.stream=True does not go with a reward model: its pairs are"),
    ("data.drop_high_ches=0.1", "data.drop_high_ches=0.1 does not go with a reward model"),
    ("diagnostics.quality.every_n_steps=50", "diagnostics.quality.every_n_steps=50 does not go"),
    ("diagnostics.probes.every_n_steps=5", "diagnostics.probes.every_n_steps=5 does not go with"),
    ("loss.label_smoothing=0.5", "loss.label_smoothing=0.5: it must be"),
]


@pytest.mark.parametrize("word, says", KEYS)
def test_a_key_that_it_has_nothing_for(word, says):
    cfg, plain = config("loss=reward", *DATA, word), config("loss=reward", *DATA)
    with pytest.raises(UserError) as caught:
        knobs.check(cfg, knobs.Given([word.partition("=")[0]], {"solver": "penalty"}, plain))
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)


NAMED = ("model=pretrained", "model.pretrained=run/model")
RUNS = [
    (("loss=dpo", *NAMED), "run/model is a reward model, which has no log-probabilities and"),
    (("loss=reward", *NAMED, "data=arithmetic"), "run/model is a reward model, which neither"),
    (("loss=reward", "data.path=bare.jsonl", "loss.margin=true"), "train, row 1: no score, and"),
]


@pytest.mark.parametrize("words, says", RUNS)
def test_a_run_that_is_refused(place, tmp_path, words, says):
    base = [word for word in TINY if "model.config" not in word or "pretrained" not in str(words)]
    if "data=arithmetic" in words:
        base = [word for word in base if not word.startswith("data")]
    with pytest.raises(UserError) as caught:
        train(config(*base, *words), tmp_path / "no")
    assert str(caught.value).startswith(says) and "\n" not in str(caught.value)
    assert not (tmp_path / "no/model").exists()


@pytest.mark.parametrize(
    "words, says",
    [
        ((*DATA, "reference=run/model"), "reference has no effect: run/model is a reward model"),
        (("data=arithmetic",), "run/model is a reward model, and this data samples"),
    ],
)
def test_an_evaluation_that_is_refused(words, says):
    with pytest.raises(UserError, match=says):
        evaluated("checkpoint=run/model", *words)


def test_the_command_line_refuses_in_one_line(place, run):
    done = forked(place, *TINY, "loss=reward", "solver=penalty", "hydra.run.dir=no")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert done.err.startswith("error: a reward model is trained with solver=none")
    assert not (place / "no/model").exists()
