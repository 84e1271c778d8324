"""What the preflight says against what steps do: finite differences, real runs, weights kept."""

import json
import os
from dataclasses import replace

import pytest
import torch
from conftest import SMALL, forked
from fitting import objective, scored
from hydra import compose, initialize_config_dir
from pairs import CONF
from tiny import in_float64, policy, random_pairs

from spo_lightning import losses
from spo_lightning.data.batch import epoch_order
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.preflight import judgement
from spo_lightning.preflight.geometry import geometry, slopes, sums
from spo_lightning.preflight.look import prepared, sampled
from spo_lightning.preflight.pilot import Pilots
from spo_lightning.records.lock import held
from spo_lightning.records.progress import silent
from spo_lightning.run import job as run_job
from spo_lightning.training.microbatch import trainable

MODULE = ("-m", "spo_lightning.preflight")
FEW = ("preflight.pilot_steps=2", "preflight.max_pairs=6", "preflight.weights=[0.3]")


def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("preflight", [*SMALL, *FEW, *words])


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
    before = sums(scorer, pairs)
    with torch.no_grad():
        for n, p in trainable(scorer).items():
            p.sub_(length * along[n])
    moved = (sums(scorer, pairs) - before)[:, 0].tolist()
    assert moved == pytest.approx([-length * slope for slope in foreseen], rel=1e-4)


@pytest.mark.parametrize("name", ["dpo", "simpo", "kto_pair", "dpo loss.ld_alpha=0.5"])
def test_the_step_is_that_of_the_mean_gradient(name, monkeypatch):
    in_float64(monkeypatch)
    monkeypatch.setattr("spo_lightning.preflight.geometry.BLOCK", 7)
    made, pairs = policy(), random_pairs(5)
    loss, _, _ = objective(*f"loss={name}".split())
    pairs, scorer = scored(made.lm, pairs), Scorer(made.lm, True)
    theta = trainable(scorer)
    along = geometry(scorer, pairs, loss, 4).along
    every = []
    for place in range(5):
        batch = pairs.batch([place])
        upper = losses.evaluate(loss, scorer(batch), reference_logps(batch), losses.moments_of({}))
        every.append(torch.autograd.grad(upper.sum(), tuple(theta.values())))
    for name, seen in zip(theta, zip(*every)):
        each = torch.stack(seen)
        mean = each.mean(0)
        wanted = mean / (each.var(0) / 4 + mean.square()).sqrt()
        torch.testing.assert_close(along[name], wanted.nan_to_num(), rtol=1e-7, atol=1e-9)


def test_norms_and_cosines_are_those_of_the_gradients(monkeypatch):
    monkeypatch.setattr("spo_lightning.preflight.geometry.BLOCK", 1000)
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
    first, changes = [2.0, 2.0], [1.0, -3.0]
    ahead = judgement.foreseen(first, changes, changes, 1, 5, 1000)
    assert ahead["step"] == 20
    # in proportion 4 and -12; first order 8, the rest -1 and -5 times 16
    half = 1.96 * 128**0.5 / 2**0.5, 1.96 * 2048**0.5 / 2**0.5
    assert ahead["low"] == pytest.approx(min(-4 - half[0], -40 - half[1]))
    assert ahead["displaced"] == [0.5, 1.0] and ahead["mean"] == pytest.approx(-4)
    assert judgement.foreseen(first, changes, changes, 1, 5, 5)["displaced"] == [0.5, 0.5]


def test_the_run_begins_as_the_first_pilot_and_goes_on_as_the_others_did():
    # three pilots: 4, then two whose mean is -1; and 0 with -3: after three of them, and one and
    # a half
    changes, alone = [2 / 3, -2.0], [4.0, 0.0]
    ahead = judgement.foreseen(changes, changes, alone, 3, 10, 30)
    assert ahead["mean"] == pytest.approx(((4 - 2) + (0 - 6)) / 2)
    for wanted, likely in ((15, (4 - 0.5) + (0 - 1.5)), (5, 4 / 2)):
        ahead = judgement.foreseen(changes, changes, alone, 3, 10, wanted)
        assert ahead["mean"] == pytest.approx(likely / 2)


@pytest.mark.parametrize(
    "held, then, seen, tried, told",
    [
        ((0.5, 0.2, 0.3), 4, 1.0, [], "no further solver weight is needed until step 20 of 100"),
        # first order .2, the rest -1: equal at a fifth of the lr
        ((-0.8, 0.2, -1.0), -9, -1.0, [], "optimizer.lr=2.0e-06 or a warm-up"),
        # it holds in the pilots, and falls where it goes on as the later ones did
        ((0.3, 1.0, -0.7), -1, 1.0, [], "They may fall: seen answers rise"),
        # the likely end is 8 times the pilots' difference higher: -1 + 8 * .1, and -1 + 8 * .3
        ((0.3, 1.0, -0.7), -1, 1.0, [(0, 0.3), (0.1, 0.4), (1.0, 0.6)], "weight=1 holds"),
        ((0.3, 1.0, -0.7), -1, 1.0, [(0, 0.3)], "They may fall: seen answers rise"),
        # above 0 by less than its half interval, and by more
        ((-0.1, 1.0, -1.1), -1, 1.0, [(0.1, 0.05), (1.0, 0.15)], "weight=1 holds"),
        ((-0.6, -0.2, -0.4), -5, 1.0, [], "it is overfitting"),
        ((-0.6, -0.2, -0.4), -5, -1.0, [], "the loss itself points down"),
        ((-0.6, -0.2, -0.4), -5, -1.0, [(0.1, -0.1), (0.2, 0), (0.3, 1)], "weight=0.3 holds"),
        ((-0.6, -0.2, -0.4), -5, -1.0, [(0.1, 0.05)], "no weight up to 0.1"),
    ],
)
def test_the_advice_follows_from_the_numbers(held, then, seen, tried, told):
    mean, first, rest = held
    sides = {
        "held": dict(mean=mean, half=0.1, displaced=0.6, first=first, rest=rest, margin=1.0),
        "seen": {"mean": seen},
    }
    ahead = {"step": 20, "low": -1.0, "high": 0.0, "mean": then}
    weights = [
        {"weight": w, "mean": at, "half": 0.1, "margin": 0.5, "foreseen": then + 8 * (at - mean)}
        for w, at in tried
    ]
    said = judgement.advice(sides, ahead, weights, 1e-5, 100)
    assert told in said and "\n" not in said


def test_equal_values_share_a_rank():
    assert judgement.ranks([3.0, 1.0, 3.0, 2.0]) == [2.5, 0.0, 2.5, 1.0]
    assert judgement.spearman([1.0, 2.0, 3.0], [1.0, 8.0, 27.0]) == pytest.approx(1.0)
    assert judgement.spearman([1.0, 2.0], [3.0, 3.0]) is None


@pytest.mark.parametrize("name", ["spo", pytest.param("simpo", marks=pytest.mark.slow)])
def test_a_pilot_leaves_the_policy_bit_for_bit_and_repeats(name, cache):
    cfg = composed(cache, f"loss={name}")
    loss, solver = run_job.objective(cfg)
    at, total = prepared(cfg, loss, silent())
    before = {n: p.detach().clone() for n, p in at.scorer.named_parameters()}
    _, seen, held = sampled(cfg, at, 2)
    pilots = Pilots(cfg, at, loss, {"seen": seen, "held": held}, total, 2, count=2)
    found, again = (pilots.split(solver, "pilot") for _ in range(2))
    assert all(torch.equal(p, before[n]) for n, p in at.scorer.named_parameters())
    for side in ("seen", "held"):
        assert torch.equal(found.changes[side], again.changes[side])
        assert found.changes[side].abs().min() > 0
    assert (found.first, found.random) == (again.first, again.random)


def test_the_second_pilot_starts_anew_on_the_pairs_that_come_next(cache):
    """It is the first pilot of a run whose rows are laid as the order goes on."""
    words = ("loss=dpo", "model.dtype=float64", "preflight.pilots=2", "max_steps=4")
    cfg = composed(cache, *words)
    loss, solver = run_job.objective(cfg)
    at, total = prepared(cfg, loss, silent())
    _, seen, held = sampled(cfg, at, 2)
    order, passed = epoch_order(len(at.train), cfg.seed, 0), 2 * cfg.batch_size
    next_of = dict(zip(order, order[passed:] + order[:passed]))
    later = replace(at, train=at.train.take([next_of[row] for row in range(len(order))]))
    both, first, second = (
        Pilots(cfg, where, loss, {"seen": seen, "held": held}, total, 2, count).split(solver, "")
        for where, count in ((at, 2), (at, 1), (later, 1))
    )
    for found, alone in zip(both.every, (first, second)):
        assert torch.equal(found, alone.changes["held"])
    assert not torch.equal(*both.every)
    for found, one, two in (
        (both.changes["held"], first.changes["held"], second.changes["held"]),
        *[[torch.tensor(some.first["held"]) for some in (both, first, second)]],
    ):
        torch.testing.assert_close(found, (one + two) / 2)
    assert torch.equal(both.changes["seen"], first.changes["seen"])


def test_a_short_step_is_first_order(cache):
    cfg = composed(cache, "loss=dpo", "model.dtype=float64", "optimizer.lr=1e-6")
    loss, solver = run_job.objective(cfg)
    at, total = prepared(cfg, loss, silent())
    _, seen, held = sampled(cfg, at, 2)
    found = Pilots(cfg, at, loss, {"seen": seen, "held": held}, total, 2).split(solver, "pilot")
    for side in ("seen", "held"):
        measured = found.changes[side][:, 0].tolist()
        assert found.first[side] == pytest.approx(measured, rel=1e-2, abs=1e-6)


def test_the_command_says_what_the_run_then_does(tmp_path, cache):
    words = (*SMALL, cache, "loss=dpo", "seed=3", "max_steps=2", "eval.max_rows=6")
    ahead = forked(tmp_path, *words, *FEW, f"hydra.run.dir={tmp_path / 'a'}", module=MODULE)
    assert ahead.code == 0, ahead.err
    one = json.loads((tmp_path / "a" / "preflight.json").read_text())
    assert one["advice"] in ahead.out
    assert [pilot["mean"] for pilot in one["pilots"]] == [one["sides"]["held"]["mean"]]
    whole = (tmp_path / "a" / "preflight.html").read_text()
    lost = sorted(one["pairs"], key=lambda pair: pair["measured"])
    places = [whole.index(pair["chosen"]) for pair in lost]
    assert "Pairs most at risk" in whole and places == sorted(places)
    assert {path.name for path in (tmp_path / "a").iterdir()} == {
        *("preflight.json", "preflight.html", "preflight.log")
    }
    rows = [word for word in SMALL if word.startswith(("data", "model", "hardware", "sft"))]
    page = forked(tmp_path, *rows, cache, "preflight=a", module=("-m", "spo_lightning.inspect"))
    assert page.code == 0, page.err
    text = (tmp_path / "inspect.html").read_text()
    assert "Pairs most at risk" in text and "What became of the rows" in text
    run = forked(tmp_path, *words, f"hydra.run.dir={tmp_path / 'r'}")
    assert run.code == 0, run.err
    told = json.loads((tmp_path / "r" / "metrics.json").read_text())["final"]
    held = one["sides"]["held"]
    assert held["mean"] == pytest.approx(told["displacement/chosen"], abs=1e-4)
    assert held["displaced"] == pytest.approx(told["displacement/rate"])
    assert held["mean"] != 0


@pytest.mark.parametrize(
    "words, told",
    [
        (("loss=kto",), "its rows have one answer"),
        (("max_steps=0",), "nothing would be trained"),
        (("preflight.weights=[1,0.1]",), "they must be above 0 and rise"),
        (("preflight.pilot_steps=0",), "preflight.pilot_steps=0: it must be at least 2"),
    ],
)
def test_what_cannot_be_foreseen_is_refused_in_one_line(tmp_path, words, told):
    ended = forked(tmp_path, *words, module=MODULE)
    assert ended.code == 2 and told in ended.err
    assert len(ended.err.strip().splitlines()) == 1


def test_one_pair_is_too_few(tmp_path):
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (tmp_path / "one.jsonl").write_text(json.dumps(row) + "\n")
    ended = forked(
        tmp_path,
        "data=pairs",
        "data.path=one.jsonl",
        "sft.max_steps=0",
        "hardware=cpu",
        module=MODULE,
    )
    assert ended.code == 2 and "needs 2 of each" in ended.err


def test_a_directory_is_one_preflights(tmp_path):
    """Sweeps that begin within a second are given the same directories."""
    words = (*SMALL, "loss=dpo", "hydra.run.dir=a")
    with held(tmp_path / "a"):
        second = forked(tmp_path, *words, module=MODULE)
    assert second.code == 2 and f"written by process {os.getpid()}" in second.err
    (tmp_path / "a" / "preflight.json").write_text("{}")
    later = forked(tmp_path, *words, module=MODULE)
    assert later.code == 2 and "a holds a preflight: take another hydra.run.dir" in later.err
    assert (tmp_path / "a" / "preflight.json").read_text() == "{}"


def test_a_page_without_a_preflight_is_refused(tmp_path):
    (tmp_path / "preflight.json").write_text("[]")
    for place in (".", "nowhere"):
        done = forked(tmp_path, f"preflight={place}", module=("-m", "spo_lightning.inspect"))
        assert done.code == 2 and f"preflight={place}: preflight.json" in done.err
        assert not (tmp_path / "inspect.html").exists()
