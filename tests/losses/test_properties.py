"""What every yaml in ``conf/loss`` promises, found there and nowhere else named."""

import inspect
import re
from dataclasses import replace
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from pairs import CONF, pairs, random_lengths, random_sums
from sources import HALF, KEYS, KL, YAMLS, built, facts, node, of_sums, value, with_margins

from spo_lightning import losses
from spo_lightning.config.objective import check_loss
from spo_lightning.errors import UserError
from spo_lightning.models.scorer import PairLogps

ROOT = CONF.parent
FILES = (*sorted(ROOT.glob("spo_lightning/**/*.py")), *sorted(CONF.glob("*/*.yaml")))
SOURCES = "\n".join(path.read_text("utf-8") for path in FILES)
FEW = settings(max_examples=8, deadline=None)
SEEDS = st.integers(0, 10_000)
# the others take none through what they follow, or draw
ASIDE = [n for n in YAMLS if any(losses.asks(built(n), it) for it in ("moments", "step"))]
OF_THEIR_GRADIENT = [name for name in YAMLS if name not in ASIDE]
EACH = [name for name in YAMLS if not facts(name)[1]]  # a pair's value is its own


def drawn(seed, count=4, dtype=torch.float64):
    """Policy and reference sums [count, 2], lengths and score differences."""
    lengths = random_lengths(count, seed)
    policy, reference = (random_sums(lengths, seed + n).to(dtype) for n in (1, 2))
    return policy, reference, lengths, [0.5 + number for number in range(count)]


def loss_of(name, policy, reference, lengths, margins, **keys):
    return value(name, of_sums(policy, lengths, margins), of_sums(reference, lengths), **keys)


def formula(name):
    """The typeset line of the function's docstring."""
    text = inspect.getdoc(built(name).func) or ""
    return " ".join(line for line in text.splitlines() if line.startswith("$"))


def moves(name):
    """What the formula says that the loss does not see."""
    symbols = set(re.findall(r"\\?[A-Za-z]+(?:_\{?\w+)?", formula(name)))
    per_token = "\\bar" in formula(name)
    own = {
        "\\ell_{ref",
        "r_w",
        "s_w",
        "s_l",
        "s",
        "\\ell_w",
        "\\ell_l",
        "o_w",
        "L_k",
        "s_{w",
        "s_{l",
    }
    absolute = {"\\ell_{ref", "r_w", "z", "z_{", "\\ell_w", "\\ell_l", "o_w", "L_k"}
    found = []
    if not per_token and not symbols & own:
        found.append("both answers by as much")
    if not symbols & absolute:
        found.append("policy and reference by as much")
    return found


@pytest.mark.parametrize("name", YAMLS)
def test_the_formula_says_what_it_does_not_see(name):
    policy, reference, lengths, margins = drawn(3)
    keys = KEYS.get(name, {})
    here = loss_of(name, policy, reference, lengths, margins, **keys).mean()

    def same(by_policy, by_reference):
        shifted = (policy - by_policy, reference - by_reference, lengths, margins)
        there = loss_of(name, *shifted, **keys).mean()
        return there.item() == pytest.approx(here.item(), rel=1e-9)

    prompt = torch.tensor([[0.3], [1.1], [0.7], [2.3]], dtype=torch.float64).expand(4, 2)
    answers = torch.tensor([[0.3, 1.4], [0.9, 0.2], [2.0, 0.6], [0.1, 1.9]]).double()
    found = moves(name)
    assert same(prompt, 0.0) == ("both answers by as much" in found)
    assert same(answers, answers) == ("policy and reference by as much" in found)


@pytest.mark.parametrize("name", YAMLS)
@FEW
@given(seed=SEEDS)
def test_a_permuted_batch_has_permuted_values(name, seed):
    policy, reference, lengths, margins = drawn(seed)
    order = torch.randperm(4, generator=torch.Generator().manual_seed(seed))
    there = (policy[order], reference[order], lengths[order], [margins[n] for n in order])
    here = loss_of(name, policy, reference, lengths, margins)
    found, expected = loss_of(name, *there), here[order]
    if name not in EACH:
        found, expected = found.mean(), here.mean()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EACH)
@FEW
@given(seed=SEEDS, at=st.integers(1, 3))
def test_microbatches_have_the_values_of_the_batch(name, seed, at):
    policy, reference, lengths, margins = drawn(seed)
    parts = [
        loss_of(name, policy[one], reference[one], lengths[one], margins[one])
        for one in (slice(0, at), slice(at, 4))
    ]
    whole = loss_of(name, policy, reference, lengths, margins)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", YAMLS)
@FEW
@given(lengths=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2)), min_size=2, max_size=4))
def test_answers_of_one_token_or_none(name, lengths):
    counts = torch.tensor(lengths)
    slot = torch.repeat_interleave(torch.arange(2 * len(counts)), counts.flatten())
    logps = torch.linspace(-2.0, -0.1, len(slot), dtype=torch.float64, requires_grad=True)
    rows = torch.arange(len(counts))
    policy = PairLogps(logps, slot // 2, slot % 2 == 1, len(counts), rows=rows)
    policy = with_margins(policy, [1.0] * len(counts))
    reference = replace(policy, logps=logps.detach() - 0.5)
    found = losses.evaluate(built(name), policy, reference, HALF, kl=KL)
    (along,) = torch.autograd.grad(found.sum(), logps, allow_unused=True, materialize_grads=True)
    assert found.shape == (len(counts),)
    assert found.isfinite().all() and along.isfinite().all()


@pytest.mark.parametrize("name", YAMLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@FEW
@given(far=st.floats(-1e4, 1e4), by=st.sampled_from([1.0, 10.0]))
def test_finite_far_out(name, dtype, far, by):
    sums = torch.tensor([[-1.0 + min(far, 0.0) * by, -1.0 - max(far, 0.0) * by]], dtype=dtype)
    sums.requires_grad_()
    policy = with_margins(pairs(*sums.T, 1, 1, dtype=dtype), [1.0])
    found = value(name, policy, pairs(-1.0, -1.0, 1, 1, dtype=dtype))
    (along,) = torch.autograd.grad(found.sum(), sums)
    assert found.isfinite().all() and along.isfinite().all()


@pytest.mark.parametrize("name", OF_THEIR_GRADIENT)
def test_gradients_by_central_differences(name):
    policy, reference, lengths, margins = drawn(5)

    def of_policy(sums):
        return loss_of(name, sums, reference, lengths, margins)

    assert torch.autograd.gradcheck(of_policy, policy.requires_grad_())


@pytest.mark.parametrize("name", YAMLS)
def test_unit_says_what_the_margin_is_measured_in(name):
    # twice the tokens at the same log-probability each: only a per-token margin stays
    means = torch.tensor([[[-0.3, -0.5]], [[-0.4, -0.3]]], dtype=torch.float64)

    def at(*lengths):
        counts = torch.tensor([lengths])
        return loss_of(name, *(means * counts), counts, [1.0]).item()

    assert (at(3, 5) == pytest.approx(at(6, 10), rel=1e-12)) == (facts(name)[0] == "token")


def test_every_yaml_is_another_loss():
    """Of log-probabilities: a reward model's is a ranker's, of other numbers."""
    read = [name for name in YAMLS if not node(name).get("rewards")]
    values = {name: loss_of(name, *drawn(7)).mean().item() for name in read}
    assert len({round(v, 9) for v in values.values()}) == len(read), values


@pytest.mark.parametrize("name", YAMLS)
def test_every_knob_stands_in_the_yaml(name):
    around = {"wpo", "ld_alpha", "divergence", "parts"}
    said = {key for key in node(name) if not key.startswith("_")} - around
    parameters = inspect.signature(built(name).func).parameters.values()
    made = {"losses", "weights"} if "parts" in node(name) else set()
    taken = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert taken <= said | made
    assert all(p.default is p.empty for p in parameters)
    for fact in said - taken:  # which somebody reads
        assert re.search(rf"loss\.{fact}\b|loss\.get\(\"{fact}\"|\"{fact}\"\)", SOURCES), fact


def test_a_fact_needs_no_list_and_a_typo_is_refused():
    """What a yaml says of its loss, and what nobody can have meant."""
    made = losses.assembled(partial(losses.sft, beta=0.1, unit="token", sung=True, tune=None))
    assert made.keywords == {"beta": 0.1}
    with pytest.raises(TypeError, match="unexpected keyword argument 'betaa'"):
        losses.assembled(partial(losses.sft, beta=0.1, betaa=0.2))
    with pytest.raises(TypeError, match="sft needs the key beta"):
        losses.assembled(partial(losses.sft, unit="token"))
    misspelt = OmegaConf.create({"loss": {"beta": 0.1, "whole_bacth": True}})
    with pytest.raises(UserError, match="loss.whole_bacth=True: nobody reads it; whole_batch is"):
        check_loss(misspelt, [])


@pytest.mark.parametrize("name", YAMLS)
def test_a_loss_that_asks_for_no_reference_needs_none(name):
    policy, _, lengths, margins = drawn(9)
    if losses.asks(built(name), "reference"):
        with pytest.raises((TypeError, AttributeError)):
            value(name, of_sums(policy, lengths, margins), None)
    else:
        value(name, of_sums(policy, lengths, margins), None)


def test_who_follows_earlier_batches_or_draws():
    assert ASIDE == ["alpha_dpo", "bco", "beta_dpo", "sgdpo"]
