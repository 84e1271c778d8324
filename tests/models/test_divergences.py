"""The reference beside the policy: KL(reference || policy) of every scored token, its slope."""

import copy
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest
import torch
from fitting import Watch, config, fitted, objective, scored
from tiny import gradients, lora, policy, random_contexts, random_pairs

from spo_lightning.cache.reference import Referee
from spo_lightning.data.batch import collate
from spo_lightning.models import adapters
from spo_lightning.models import policy as policies
from spo_lightning.models.scorer import Beside, Scorer
from spo_lightning.records.progress import silent

PAD_ID = 257


def slow(lm, judge, pair):
    """[tokens] from unpadded forwards and all logits."""
    found = []
    for answer, runs in zip((pair.chosen, pair.rejected), pair.scored, strict=True):
        ids = torch.tensor([pair.prompt + answer])
        mine = lm(input_ids=ids).logits[0].log_softmax(-1)
        its = judge(input_ids=ids).logits[0].log_softmax(-1).detach()
        each = (its.exp() * (its - mine)).sum(-1)
        found += [each[len(pair.prompt) - 1 + place] for run in runs for place in run]
    return torch.stack(found)


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("logits", [2**28, 258 * 8], ids=["whole", "parts"])
def test_divergences_are_those_of_all_logits(attention, shared, logits):
    made, judge = (policy("llama", attention=attention, seed=seed) for seed in (0, 1))
    pairs = [p for p in random_contexts(random_pairs(6)) if sum(map(len, p.scored))]
    scorer = Scorer(made.lm, shared, logits)
    scorer.beside = Beside(Scorer(judge.lm, shared, logits), nullcontext)
    found = scorer(collate(pairs, PAD_ID)).divergences
    weights = torch.linspace(-1, 1, len(found), dtype=torch.float64)
    (found * weights).sum().backward()
    own = gradients(made.lm)
    made.lm.zero_grad()
    expected = torch.cat([slow(made.lm, judge.lm, pair) for pair in pairs])
    (expected * weights).sum().backward()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert found.min() > 0.1  # another model
    for name, slope in gradients(made.lm).items():
        torch.testing.assert_close(own[name], slope, rtol=1e-3, atol=1e-5, msg=name)
    assert not gradients(judge.lm)


def test_no_more_logits_are_alive_than_allowed(monkeypatch):
    scorer = Scorer(policy("llama").lm, True, logits=258 * 8)
    scorer.beside = Beside(copy.deepcopy(scorer), nullcontext)
    sizes, plain = [], Scorer._logits

    def counting(self, hidden):
        found = plain(self, hidden)
        sizes.append(found.numel())
        return found

    monkeypatch.setattr(Scorer, "_logits", counting)
    batch = collate(random_pairs(4), PAD_ID)
    scorer(batch).divergences.sum().backward()
    assert max(sizes) <= 258 * 2 and sum(sizes) >= 3 * 258 * len(batch.targets)  # and once more


def test_the_lower_level_reads_no_reference():
    scorer = Scorer(policy("llama").lm, True)
    scorer.beside = Beside(copy.deepcopy(scorer), nullcontext)
    batch = collate(random_pairs(4), PAD_ID)
    assert scorer(batch).divergences is not None
    assert scorer(batch.chosen_only).divergences is None


def adapted(kind):
    """A policy with adapters: new ones, those of a checkpoint, or new ones on the head too."""
    made = policy("llama")
    if kind == "head":
        named = ["q_proj", "lm_head"]
        return policies.adapt(made, rank=4, alpha=8, targets=named, merge=False, seed=0)
    made = lora(made)
    if kind == "checkpoint":
        with torch.no_grad():
            for p in (p for p in made.lm.parameters() if p.requires_grad):
                p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        made = replace(made, began=adapters.trained(made.lm))
    return made


def beside_of(made):
    cfg = config("cache.enabled=false")
    return Referee(cfg, made, Scorer(made.lm, True), nullcontext, silent()).beside()


@pytest.mark.parametrize(
    ("kind", "solver"),
    [("whole", "none"), ("new", "none"), ("checkpoint", "unrolled"), ("head", "unrolled")],
)
def test_the_reference_stays_where_the_policy_began(kind, solver):
    """With adapters it is the policy itself, unless its head has some."""
    numbers = []
    for copied in (False, True):
        made = policy("llama") if kind == "whole" else adapted(kind)
        beside = beside_of(made)
        assert (beside.scorer.model is made.lm) == (kind in ("new", "checkpoint"))
        if copied:
            beside = Beside(copy.deepcopy(Scorer(made.lm, True)), nullcontext)
        watch, sgd = Watch(keep=True), partial(torch.optim.SGD, lr=0.5)
        how = {"micro": 3, "beside": beside, "watch": watch, "optimizer": sgd}
        chosen = objective("loss=tdpo1", f"solver={solver}")
        found = fitted(made, chosen, scored_start(made), **how)
        numbers.append(found.numbers)
        if solver == "none":
            assert found.numbers[0]["train/loss"] == pytest.approx(0.6931471805599453, abs=1e-6)
        assert abs(found.numbers[2]["train/loss"] - found.numbers[0]["train/loss"]) > 1e-4
    assert numbers[0] == numbers[1]


def scored_start(made):
    with torch.no_grad():
        return scored(made.lm)


def test_at_the_start_nothing_has_diverged():
    for kind in ("whole", "new", "checkpoint", "head"):
        made = policy("llama") if kind == "whole" else adapted(kind)
        scorer = Scorer(made.lm, True)
        scorer.beside = beside_of(made)
        assert scorer(collate(random_pairs(4), PAD_ID)).divergences.abs().max() < 1e-13
