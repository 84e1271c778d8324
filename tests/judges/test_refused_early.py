"""A judge or a rival that cannot be meant is refused before a model is loaded: none can be."""

import json
from pathlib import Path

import pytest
from fitting import config
from hydra import compose, initialize_config_dir
from pairs import CONF
from tiny import policy

from spo_lightning.errors import UserError
from spo_lightning.run.evaluation import evaluate
from spo_lightning.run.sampling import sample
from spo_lightning.train import train
from spo_lightning.world import ALONE

DATA = ("data=pairs", "data.path=train.jsonl", "data.eval_path=held.jsonl", "hardware=cpu")
LOOK = (*DATA, "cache.dir=cache")
GIVEN = ("model=pretrained", "model.pretrained=broken")
LONG = ("judge=function", "judge.path=operator.length_hint")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A checkpoint whose weights are none, and rows."""
    room = tmp_path_factory.mktemp("early")
    for name, start in (("train", 0), ("held", 9)):
        rows = [
            {"prompt": f"{n}", "chosen": "a", "rejected": "b"} for n in range(start, start + 9)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (room / f"{name}.jsonl").write_text(text)
    (room / "short.jsonl").write_text('{"prompt": "9", "completion": "a"}\n')
    policy(num_hidden_layers=1).save(room / "broken", merge=False, card="")
    (room / "broken/model.safetensors").write_bytes(b"none")
    return room


@pytest.fixture(autouse=True)
def inside(place, monkeypatch):
    monkeypatch.chdir(place)


def composed(name, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [*words, *LOOK])


def trained(*words):
    train(config(*GIVEN, *LOOK, "loss=dpo", "max_steps=1", *words), Path("run"))


def evaluated(*words):
    evaluate(composed("eval", "checkpoint=broken", "reference=broken", *words), ALONE)


def sampled(*words):
    sample(composed("sample", *GIVEN, *words), ALONE)


JUDGES = [
    (("judge=pairwise", "judge.model=m", "judge.key_from=NO_SUCH"), "judge.key_from=NO_SUCH: no"),
    (("judge=pairwise", "judge.model=m", "judge.labels=[A,a]"), "give two words that differ"),
    (("judge=reward", "judge.model=broken"), "judge.model=broken is no sequence classifier"),
    (("judge=reward", "judge.model=./absent"), "no such checkpoint: absent"),
    (("judge=ranker", "judge.model=broken"), "judge.model=broken is no ranker"),
    (("judge=function", "judge.path=no.such"), "judge.path=no.such: not found"),
    (
        ("judge=function", "judge.path=builtins.len", "+judge.foo=1"),
        "judge: got an unexpected",
    ),
    (("judge=panel",), "judge.members: name two judges at least"),
    (("judge=answer",), "judge=answer: this data has no answers"),
]
RIVALS = [
    ((*LONG, "eval.rival=short.jsonl"), "short.jsonl has no answer to 8 of 9 held-out prompts"),
    ((*LONG, "eval.rival=./absent"), "no such checkpoint: absent"),
    (("eval.rival=chosen",), "eval.rival=chosen has no effect: this data has no judge"),
]


@pytest.mark.parametrize(
    "command, words, says",
    [
        *((trained, *case) for case in [*JUDGES, *RIVALS]),
        *((evaluated, *case) for case in [*JUDGES, *RIVALS]),
        *((sampled, *case) for case in [*JUDGES, ((), "judge=task: this data has none")]),
        (
            trained,
            ("eval.judge.every_n_steps=1",),
            "nothing is judged: name a judge",
        ),
        *((command, LONG, "does not load") for command in (trained, evaluated, sampled)),
    ],
)
def test_refused_before_a_model_is_loaded(command, words, says):
    with pytest.raises(UserError) as caught:
        command(*words)
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not [*Path().glob("*.json"), *Path().glob("pairs*"), *Path().glob("run/metrics.*")]
