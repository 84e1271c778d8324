"""What stands around a loss: divergences, LD-DPO's tokens, WPO's weights, mixtures."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from fitting import config, fitted, objective, scored
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import random_lengths, random_sums
from sources import built, of_sums, value
from tiny import policy, random_pairs

from spo_lightning import losses
from spo_lightning.data.batch import collate
from spo_lightning.losses import Beside
from spo_lightning.models.scorer import PairLogps, Scorer

KINDS = {  # f of each divergence, at the ratio t
    "reverse_kl": lambda t: t * math.log(t),
    "forward_kl": lambda t: -math.log(t),
    "js": lambda t: t * math.log(t) - (t + 1) * math.log((t + 1) / 2),
    "alpha": lambda t: (t**0.5 - 0.5 * t - 0.5) / (0.5 * -0.5),
}


def divergence(kind):
    return instantiate(OmegaConf.to_container(config(f"loss/divergence={kind}").loss.divergence))


@pytest.mark.parametrize("kind", KINDS)
def test_scores_are_the_derivative_of_f(kind):
    """f'(t), less f'(1): a constant of both answers drops out of the margin."""
    score, f, step = divergence(kind), KINDS[kind], 1e-6
    slope = {t: (f(t + step) - f(t - step)) / (2 * step) for t in (0.2, 0.7, 1.0, 1.9, 5.0)}
    for t, along in slope.items():
        found = score(torch.tensor(math.log(t), dtype=torch.float64)).item()
        assert found == pytest.approx(along - slope[1.0], abs=1e-8)


def test_alpha_lies_between_the_two_kls():
    ratios = torch.linspace(-3, 3, 13, dtype=torch.float64)
    near = partial(losses.alpha_divergence, coefficient=1.0 - 1e-5)(ratios)
    torch.testing.assert_close(near, ratios, rtol=1e-4, atol=0)
    assert losses.alpha_divergence(ratios, coefficient=1.0) is ratios
    forward = losses.alpha_divergence(ratios, coefficient=0.0)
    torch.testing.assert_close(forward, losses.forward_kl(ratios))


def some(count=20):
    lengths = random_lengths(count, seed=1)
    return (of_sums(random_sums(lengths, seed), lengths) for seed in (2, 3))


def test_the_reverse_kl_leaves_every_bit():
    mine, reference = some()
    loss = built("dpo")
    around = partial(losses.divergent, losses=(loss,), divergence=losses.reverse_kl)
    for kind in (torch.float64, torch.float32):
        both = [replace(one, logps=one.logps.to(kind)) for one in (mine, reference)]
        seen, plain = (losses.evaluate(one, *both, None) for one in (around, loss))
        assert torch.equal(seen, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_a_divergence_acts_on_each_log_ratio(kind):
    mine, reference = some()
    score = divergence(kind)
    chosen, rejected = (score(mine.sums[:, n] - reference.sums[:, n]) for n in (0, 1))
    keys = {"divergence": (("_target_", score.func.__module__ + "." + score.func.__name__),)}
    keys = {"divergence": keys["divergence"] + (("_partial_", True), *score.keywords.items())}
    found = value("ipo", mine, reference, beta=0.2, **keys)
    torch.testing.assert_close(found, (chosen - rejected - 2.5).square(), rtol=1e-9, atol=1e-9)


def test_tokens_past_the_shorter_answer_count_less():
    """A chosen answer of 2 tokens, a rejected one of 4."""
    logps = torch.tensor([-0.5, -0.5, -1, -0.5, -0.25, -0.25], dtype=torch.float64)
    side = torch.tensor([False, False, True, True, True, True])
    both = PairLogps(logps, torch.zeros(6).long(), side, 1)

    def seen(policy, reference):
        assert torch.equal(policy.sums, reference.sums)
        return policy.rejected

    def alone(policy):
        return policy.rejected

    for inner in (seen, alone):
        around = partial(losses.desensitised, losses=(inner,), alpha=0.5)
        given = both if inner is seen else None
        assert losses.evaluate(around, both, given, None).item() == -1.75
    assert both.rejected.item() == -2.0


def test_weights_of_a_pair():
    """A token of p = 0.5 among (0.5, 0.5), and one of p = 0.25 among (0.25, 0.75)."""
    logps = torch.tensor([0.5, 0.25, 0.5], dtype=torch.float64).log().requires_grad_()
    squares = torch.tensor([0.5, 0.625, 0.5], dtype=torch.float64).log()
    side = torch.tensor([False, False, True])
    mine = PairLogps(logps, torch.zeros(3).long(), side, 1, squares=squares)
    around = partial(losses.weighted, losses=(lambda policy: policy.gap,))
    found = losses.evaluate(around, mine, None, None)
    weight = math.sqrt(0.25 / 0.625)  # the rejected answer's is 1
    assert found.item() == pytest.approx(weight * mine.gap.item(), abs=1e-12)
    assert weight == pytest.approx(0.632455532, abs=1e-9)
    (along,) = torch.autograd.grad(found, logps)  # none through the weight
    assert along.tolist() == pytest.approx([weight, weight, -weight])


@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("shared", [True, False])
def test_squares_are_those_of_the_logits(attention, shared):
    made, pairs = policy("llama", attention=attention), random_pairs(3)
    scorer = Scorer(made.lm, shared, logits=1000)  # in several chunks
    scorer.squares = True
    batch = collate(pairs, 0)
    found = scorer(batch).squares
    expected = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            ids = torch.tensor([pair.prompt + answer])
            logits = made.lm(ids).logits[0, len(pair.prompt) - 1 : -1]
            expected.append(logits.softmax(-1).square().sum(-1).log())
    torch.testing.assert_close(found, torch.cat(expected).detach(), rtol=1e-6, atol=1e-6)
    assert not found.requires_grad


AROUND = ("loss.wpo=true", "loss.ld_alpha=0.5", "loss/divergence=js")


def test_accumulation_changes_nothing_around():
    given = scored(policy("gpt2").lm, shift=lambda number, r: 0.03 if number % 2 else -0.02)
    found = []
    for micro in (8, 3):
        chosen = objective("loss=dpo", "solver=none", *AROUND)
        found.append(fitted(policy("gpt2"), chosen, given, steps=2, micro=micro).numbers)
    for whole, parts in zip(*found, strict=True):
        assert parts == pytest.approx(whole, rel=1e-10, abs=1e-10)
    plain = fitted(policy("gpt2"), objective("loss=dpo", "solver=none"), given, steps=2).numbers
    assert abs(plain[0]["train/loss"] - found[0][0]["train/loss"]) > 1e-3


def test_a_mixture_is_the_sum_of_its_parts():
    mine, reference = some()
    parts = (
        ("dpo", (("weight", 0.8), ("beta", 0.4))),
        ("simpo", (("weight", 0.5), ("gamma_beta_ratio", 0.1))),
        ("sft", (("weight", 0.0),)),
    )
    found = value("mixture", mine, reference, parts=parts)
    dpo = value("dpo", mine, reference, beta=0.4)
    simpo = value("simpo", mine, reference, gamma_beta_ratio=0.1)
    torch.testing.assert_close(found, 0.8 * dpo + 0.5 * simpo, rtol=1e-12, atol=0)


def test_a_mixture_asks_for_what_its_parts_ask_for():
    def mixed(name):
        none = (("dpo", (("weight", 0.0),)), ("sft", (("weight", 0.0),)))
        return built("mixture", parts=(*none, (name, (("weight", 1.0),))))

    assert losses.asks(mixed("alpha_dpo"), "moments") and not losses.asks(mixed("sft"), "moments")
    assert losses.asks(mixed("dpo"), "reference")
    heavy = (("weight", 1.0), ("wpo", True))
    assert losses.asks(built("mixture", parts=(("dpo", heavy),)), "squares")
    assert not losses.asks(built("dpo"), "squares") and losses.asks(built("odpo"), "margins")


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match="ld_alpha=0.5 is of losses on sums"):
        built("simpo", ld_alpha=0.5)
    nothing = (("dpo", (("weight", 0.0),)), ("sft", (("weight", 0.0),)))
    with pytest.raises(ValueError, match="a mixture of nothing: give some part a weight"):
        built("mixture", parts=nothing)
    with pytest.raises(ValueError, match=r"loss.parts.dpo.weight=-1.0: it must be at least 0"):
        built("mixture", parts=(("dpo", (("weight", -1.0),)),))
    with pytest.raises(TypeError, match="gamma"):
        built("dpo", gamma=0.5)
    assert Beside(None, None).of(lambda policy: policy.gap, next(some())).shape == (20,)
