"""A reference that moves: against a loop by hand, across a stop, and what is refused."""

import copy
import json

import pytest
import torch
from conftest import SMALL, forked
from fitting import config, fitted, objective, scored
from tiny import in_float64, policy, random_pairs

from spo_lightning.data.batch import Microbatches, draws
from spo_lightning.errors import UserError
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.run.job import refuse_sync
from spo_lightning.training.reference import MovingReference

RATE = 0.05  # of SGD, as fitted has it


def by_hand(made, pairs, moving, beta, weight):
    """Five full-batch steps of DPO with SPO's penalty, written out with three models."""
    theta, reference, start = (Scorer(copy.deepcopy(made.lm), True) for _ in range(3))
    mine, theirs = list(theta.parameters()), list(reference.parameters())
    margins, order = [], draws(len(pairs), 6, 0, 0, 5)
    for step in range(1, 6):
        batch = pairs.take(next(order)).batch(range(6))
        with torch.no_grad():
            now, before = reference(batch), start(batch)
        policy = theta(batch)
        loss = -torch.nn.functional.logsigmoid(beta * (policy.gap - now.gap))
        value = now if moving.value_moves else before
        loss = loss + weight * beta * torch.relu(value.chosen - policy.chosen)
        margins.append((beta * (policy.gap - now.gap)).mean().item())
        slopes = torch.autograd.grad(loss.mean(), mine)
        with torch.no_grad():
            for p, g in zip(mine, slopes):
                p -= RATE * g
            if step % moving.every == 0:
                for r, p in zip(theirs, mine):
                    r.copy_(moving.alpha * p + (1 - moving.alpha) * r)
    return mine, margins


@pytest.mark.parametrize(
    "loss, weight, moves",
    [
        ("dpo", 0.0, (0.6, 2)),
        ("dpo", 0.0, (1.0, 3)),
        ("spo", 1.0, (0.6, 1)),
        ("spo", 1.0, (0.6, 1, True)),
    ],
)
def test_steps_equal_a_loop_by_hand(loss, weight, moves, monkeypatch):
    in_float64(monkeypatch)
    pairs = scored(policy().lm, random_pairs(12))
    chosen, moving = objective(f"loss={loss}"), MovingReference(*moves)
    steps = {"steps": 5, "batch_size": 6, "micro": 4}
    run = fitted(policy(), chosen, pairs, **steps, moving=moving)
    hand, margins = by_hand(policy(), pairs, moving, chosen[2], weight)
    for one, other in zip(run.module.trainable().values(), hand):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    told = [numbers["train/rewards/margins"] for numbers in run.numbers]
    assert told == pytest.approx(margins, abs=1e-10)
    still = fitted(policy(), objective(f"loss={loss}"), pairs, **steps)
    apart = zip(run.module.trainable().values(), still.module.trainable().values())
    assert any(not torch.equal(one, other) for one, other in apart)


def test_displacement_is_told_from_the_start(monkeypatch):
    in_float64(monkeypatch)
    pairs = scored(policy().lm, random_pairs(12))
    given = {"steps": 4, "batch_size": 12, "micro": 12}
    still = fitted(policy(), objective("loss=dpo"), pairs, **given)
    moved = fitted(policy(), objective("loss=dpo"), pairs, **given, moving=MovingReference(1.0, 3))
    for name in ("train/displacement/chosen", "train/displacement/rate"):
        assert moved.numbers[3][name] == pytest.approx(still.numbers[3][name])
    assert moved.numbers[3]["train/rewards/margins"] == pytest.approx(0, abs=1e-12)
    assert still.numbers[3]["train/rewards/margins"] > 1e-6


def test_what_a_batch_carries_goes_with_its_parts():
    made = policy()
    pairs = scored(made.lm, random_pairs(4))
    scorer, moving = Scorer(made.lm, True), MovingReference(1.0, 1)
    moving.begin(scorer)
    with torch.no_grad():
        for p in scorer.parameters():
            p.add_(0.01 * torch.randn_like(p))
    batch = pairs.batch(range(4))
    assert moving.read(scorer, Microbatches([batch])).parts[0] is not None
    moving.follow(scorer, 1)
    (part,) = moving.read(scorer, Microbatches([batch])).parts
    mine = scorer(batch)
    torch.testing.assert_close(reference_logps(part, now=True).sums, mine.sums)
    assert torch.equal(reference_logps(part).sums, reference_logps(batch).sums)
    few = torch.cat([reference_logps(some, now=True).sums for some in part.split(3)])
    torch.testing.assert_close(few, mine.sums)
    chosen = reference_logps(part.chosen_only, now=True).chosen
    torch.testing.assert_close(chosen, mine.chosen)


@pytest.mark.slow
def test_a_run_that_goes_on_ends_as_the_whole_one(tmp_path, cache):
    words = (*SMALL, cache, "loss=spo", "model.reference_sync=soft", "model.sync.every_n_steps=1")
    words += ("checkpoint.every_n_steps=2", "log.every_n_steps=1", "solver/phi=softplus")

    def ended(run, *more):
        done = forked(tmp_path, *words, f"hydra.run.dir={run}", *more)
        assert done.code == 0, done.err
        assert "Reference: moves to the policy by 0.6 every 1 outer steps" in done.out
        return json.loads((tmp_path / run / "metrics.json").read_text())["final"]

    whole = ended("whole", "max_steps=4")
    ended("part", "max_steps=2")
    assert ended("part", "max_steps=4", "ckpt_path=last") == whole
    assert ended("moved", "max_steps=4", "model.sync.value=moving") != whole


@pytest.mark.parametrize(
    "words, told",
    [
        (("loss=simpo",), "this loss reads no reference"),
        (("loss=tdpo2",), "this loss reads the reference's distributions"),
        (("max_steps=512",), "its reference would never move"),
        (("max_steps=0",), "model.reference_sync has no effect"),
        (("model.sync.alpha=0.5",), "a hard move takes all"),
        (("model.reference_sync=slow",), "soft, hard or null"),
        (("model.reference_sync=null", "model.sync.alpha=0.5"), "model.reference_sync is null"),
    ],
)
def test_what_cannot_move_is_refused_in_one_line(tmp_path, words, told):
    given = ("loss=dpo", "max_steps=600", "model.reference_sync=hard")
    done = forked(tmp_path, *SMALL, *given, *words)
    assert done.code == 2 and told in done.err, done.err
    assert len(done.err.strip().splitlines()) == 1


def test_another_reference_does_not_move():
    words = ("loss=dpo", "max_steps=600", "model.reference_sync=hard", "model.reference=DIR")
    with pytest.raises(UserError, match="leave model.reference out"):
        refuse_sync(config(*words), objective("loss=dpo")[0])
