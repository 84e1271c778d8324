"""What the preflight says against what steps do: finite differences, real runs, weights kept."""

import json

import pytest
import torch
from conftest import SMALL, command
from fitting import objective, scored
from tiny import in_float64, policy, random_pairs

from spo_lightning.models.scorer import Scorer
from spo_lightning.preflight import judgement
from spo_lightning.preflight.geometry import chosen, geometry, slopes
from spo_lightning.preflight.pilot import Pilot
from spo_lightning.training.microbatch import trainable

MODULE = ("-m", "spo_lightning.preflight")
FEW = ("preflight.pilot_steps=2", "preflight.max_pairs=6", "preflight.weights=[0.3]")


@pytest.mark.parametrize("name", ["dpo", "simpo"])
def test_the_score_is_what_a_tiny_step_does(name, monkeypatch):
    in_float64(monkeypatch)
    made = policy()
    loss, _, _ = objective(f"loss={name}")
    pairs = scored(made.lm, random_pairs(5))
    scorer = Scorer(made.lm, True)
    along = geometry(scorer, pairs, loss, 4).along
    here = {n: p.detach().clone() for n, p in trainable(scorer).items()}
    foreseen, length = slopes(scorer, pairs, here, along), 1e-7
    before = chosen(scorer, pairs)
    with torch.no_grad():
        for n, p in trainable(scorer).items():
            p.sub_(length * along[n])
    moved = [now - then for now, then in zip(chosen(scorer, pairs), before)]
    assert moved == pytest.approx([-length * slope for slope in foreseen], rel=1e-4)


def test_norms_and_cosines_are_those_of_the_gradients():
    made = policy()
    loss, _, _ = objective("loss=dpo")
    pairs = scored(made.lm, random_pairs(3))
    scorer = Scorer(made.lm, True)
    theta = tuple(trainable(scorer).values())
    found = geometry(scorer, pairs, loss, 4).pairs
    for place, told in enumerate(found):
        sums = scorer(pairs.batch([place])).sums[0]
        one, two = (
            torch.cat([g.flatten() for g in torch.autograd.grad(s, theta, retain_graph=True)])
            for s in sums
        )
        assert told["norm_chosen"] == pytest.approx(one.norm().item(), rel=1e-9)
        assert told["cosine"] == pytest.approx(
            torch.cosine_similarity(one, two, 0).item(), rel=1e-9
        )
        assert told["overlap"] == pytest.approx((one @ two / (one @ one)).item(), rel=1e-9)


def test_what_is_foreseen_ends_where_it_holds():
    found = Pilot({"held": [1.0, -3.0]}, {"held": [2.0, 2.0]}, {"held": [0.0, 0.0]}, 1.0)
    ahead = judgement.foreseen(found, 5, 1000)
    assert ahead["step"] == 20
    # in proportion 4 and -12; first order 8, the rest -1 and -5 times 16
    half = 1.96 * 128**0.5 / 2**0.5, 1.96 * 2048**0.5 / 2**0.5
    assert ahead["low"] == pytest.approx(min(-4 - half[0], -40 - half[1]))
    assert ahead["displaced"] == [0.5, 1.0]


def test_the_command_says_what_the_run_then_does(tmp_path, cache):
    words = (*SMALL, cache, "loss=dpo", "seed=3")
    ahead = command(tmp_path, *words, *FEW, f"hydra.run.dir={tmp_path / 'a'}", module=MODULE)
    again = command(tmp_path, *words, *FEW, f"hydra.run.dir={tmp_path / 'b'}", module=MODULE)
    assert (ahead.code, again.code) == (0, 0), ahead.err + again.err
    one, two = (json.loads((tmp_path / n / "preflight.json").read_text()) for n in "ab")
    for volatile in ("seconds", "memory_mib"):
        del one[volatile], two[volatile]
    assert one == two
    assert (tmp_path / "a" / "preflight.html").read_text().count("Pairs most at risk")
    run = command(
        tmp_path, *words, "max_steps=2", "eval.max_rows=6", f"hydra.run.dir={tmp_path / 'r'}"
    )
    assert run.code == 0, run.err
    told = json.loads((tmp_path / "r" / "metrics.json").read_text())["final"]
    assert one["sides"]["held"]["mean"] == pytest.approx(told["displacement/chosen"], abs=1e-4)
    assert one["sides"]["held"]["mean"] != 0


@pytest.mark.parametrize(
    "words, told",
    [
        (("loss=kto",), "its rows have one answer"),
        (("max_steps=0",), "nothing would be trained"),
        (("preflight.weights=[1,0.1]",), "they must be above 0 and rise"),
        (("preflight.pilot_steps=0",), "preflight.pilot_steps=0: it must be at least 1"),
    ],
)
def test_what_cannot_be_foreseen_is_refused_in_one_line(tmp_path, words, told):
    ended = command(tmp_path, *words, module=MODULE)
    assert ended.code == 2 and told in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_one_pair_is_too_few(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    ended = command(
        tmp_path,
        "data=pairs",
        "data.path=one.jsonl",
        "sft.max_steps=0",
        "hardware=cpu",
        module=MODULE,
    )
    assert ended.code == 2 and "needs 2 of each" in ended.err
