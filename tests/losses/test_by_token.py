"""TDPO against all logits, and SGDPO's draw: what sums alone cannot tell."""

import math
from collections import Counter
from dataclasses import replace
from itertools import combinations

import pytest
import torch
from fitting import fitted, objective, scored
from sources import built, soft
from tiny import policy

from spo_lightning import losses
from spo_lightning.models.scorer import PairLogps

LENGTHS = [(3, 5), (1, 4), (6, 2)]
PAIR = [number for number, of in enumerate(LENGTHS) for _ in range(sum(of))]
SIDE = [bool(side) for of in LENGTHS for side in (0, 1) for _ in range(of[side])]
SLOTS = torch.tensor(PAIR), torch.tensor(SIDE)


def test_tdpo_against_its_definition():
    """From the logits of two models on a vocabulary of 7, as the authors' code has it."""
    seeded = torch.Generator().manual_seed(0)
    mine, its = torch.randn(2, len(PAIR), 7, generator=seeded, dtype=torch.float64).unbind()
    token = torch.randint(7, (len(PAIR), 1), generator=seeded)
    mine.requires_grad_()

    def rows(values):
        """Sums over the answers, [pair][side]."""
        return [
            [
                sum(v for v, p, s in zip(values, PAIR, SIDE, strict=True) if (p, s) == (n, side))
                for side in (False, True)
            ]
            for n in range(len(LENGTHS))
        ]

    def margins(alpha, detached):
        log_p, log_q = mine.log_softmax(-1), its.log_softmax(-1)
        ratios = rows((log_p - log_q).gather(1, token).squeeze(1))
        kls = rows((log_q.exp() * (log_q - log_p)).sum(-1))
        for (sw, sl), (dw, dl) in zip(ratios, kls, strict=True):
            yield sw - sl - alpha * (dl - (dw.detach() if detached else dw))

    def ours(name, **keys):
        log_p, log_q = mine.log_softmax(-1), its.log_softmax(-1)
        kl = torch.nn.functional.kl_div(log_p, log_q, reduction="none", log_target=True).sum(-1)
        both = [it.gather(1, token).squeeze(1) for it in (log_p, log_q)]
        given = [PairLogps(it, *SLOTS, len(LENGTHS)) for it in both]
        given[0] = replace(given[0], divergences=kl)
        return losses.evaluate(built(name, beta=0.3, **keys), *given, None)

    for name, alpha in (("tdpo1", 1.0), ("tdpo2", 0.7)):
        keys = {} if name == "tdpo1" else {"alpha": alpha}
        found = ours(name, **keys)
        expected = [-torch.sigmoid(0.3 * m).log() for m in margins(alpha, name == "tdpo2")]
        torch.testing.assert_close(found, torch.stack(expected), rtol=1e-12, atol=1e-12)
        slopes = [torch.autograd.grad(it.sum(), mine)[0] for it in (found, torch.stack(expected))]
        torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)
    assert torch.autograd.gradcheck(lambda at: _whole(at, its, token), mine)


def _whole(mine, its, token):
    log_p, log_q = mine.log_softmax(-1), its.log_softmax(-1)
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    logps = log_p.gather(1, token).squeeze(1), log_q.gather(1, token).squeeze(1)
    policy = PairLogps(logps[0], *SLOTS, len(LENGTHS), divergences=kl)
    reference = PairLogps(logps[1], *SLOTS, len(LENGTHS))
    return losses.evaluate(built("tdpo1"), policy, reference, None)


def given(rows=(4, 7, 9)):
    """Answers whose tokens all differ, and those of a reference."""
    seeded = torch.Generator().manual_seed(1)
    mine, its = -torch.rand(2, len(PAIR), generator=seeded, dtype=torch.float64)
    made = [PairLogps(it, *SLOTS, len(LENGTHS), rows=torch.tensor(rows)) for it in (mine, its)]
    return tuple(made)


def test_sgdpo_by_hand():
    """Pilots of -2 and -3 where the reference has -2.5 and -2.75: one token of each answer."""
    sizes = torch.tensor([2, 4])
    side = torch.tensor([False, True]).repeat_interleave(sizes)
    mine = torch.tensor([-2, -2, -3, -2, -1, -1], dtype=torch.float64)
    its = torch.tensor([-2.5, -2.5, -2.75, -1.25, -1, -1], dtype=torch.float64)
    where = torch.zeros(6).long(), side, 1
    both = [PairLogps(it, *where, rows=torch.zeros(1).long()) for it in (mine, its)]
    loss = built("sgdpo", beta=0.1, r1=0.5, r2=0.5)
    found = {round(losses.evaluate(loss, *both, None, step).item(), 9) for step in range(40)}
    pilots = (mine - its)[2:].tolist()
    expected = {
        round((soft(0.1 * (1 - pilot)) + soft(0.1 * (0.5 + 1))) / 2, 9) for pilot in pilots
    }
    assert found == expected and 0.626778042 in found


def pilots(name="sgdpo", step=0, **keys):
    """The tokens drawn, of each pair and side, told by the loss's values: of every choice there
    can be, the one that gives it."""
    mine, its = given()
    loss = built(name, beta=0.3, **keys)
    found = losses.evaluate(loss, mine, its, None, step)
    moved, told = (mine.logps - its.logps).tolist(), []
    starts = [[PAIR.index(n) + side * LENGTHS[n][0] for side in (0, 1)] for n in range(3)]
    for n, (nw, nl) in enumerate(LENGTHS):
        ratios = [moved[starts[n][0] :][:nw], moved[starts[n][1] :][:nl]]
        counts = [max(math.floor(min(nw, nl) * keys[r]), 1) for r in ("r1", "r2")]
        fits = [
            (some, other)
            for some in combinations(range(nw), counts[0])
            for other in combinations(range(nl), counts[1])
            if value(ratios, some, other) == pytest.approx(found[n].item(), abs=1e-12)
        ]
        assert len(fits) == 1  # a choice without replacement, of as many as the paper says
        told.append(fits[0])
    return told


def value(ratios, some, other):
    of_chosen, of_rejected = sum(ratios[0][i] for i in some), sum(ratios[1][i] for i in other)
    return (
        soft(0.3 * (sum(ratios[0]) - of_rejected)) / 2
        + soft(0.3 * (of_chosen - sum(ratios[1]))) / 2
    )


def test_sgdpo_draws_every_token_alike():
    keys = {"r1": 0.7, "r2": 0.4, "seed": 3}
    drawn = [pilots(step=step, **keys) for step in range(300)]
    assert drawn[5] == pilots(step=5, **keys)
    assert drawn[5] != pilots(step=5, **(keys | {"seed": 4}))
    chosen, rejected = (Counter(i for row in drawn for i in row[0][side]) for side in (0, 1))
    assert len(chosen) == 3 and len(rejected) == 5
    assert all(abs(count - 200) < 45 for count in chosen.values())  # 2 of 3
    assert all(abs(count - 60) < 35 for count in rejected.values())  # 1 of 5
    # the two answers of a pair are drawn apart: of 3 x 5 choices all come
    assert len({row[0] for row in drawn}) == 15


def test_sgdpo_draws_by_the_row_however_pairs_are_dealt():
    loss = built("sgdpo")
    mine, its = given()
    whole = losses.evaluate(loss, mine, its, None, 2)
    for n in (0, 1, 2):
        kept = SLOTS[0] == n
        one = [
            PairLogps(it.logps[kept], torch.zeros(int(kept.sum())).long(), SLOTS[1][kept], 1)
            for it in (mine, its)
        ]
        one = [replace(it, rows=mine.rows[n : n + 1]) for it in one]
        assert losses.evaluate(loss, *one, None, 2).item() == pytest.approx(whole[n].item())
    other = losses.evaluate(loss, *given((5, 8, 10)), None, 2)
    assert not torch.isclose(other, whole).all()


@pytest.mark.parametrize("name", ["sgdpo", "tdpo2", "aspo"])
def test_accumulation_changes_nothing(name):
    shifted = scored(policy("gpt2").lm, shift=lambda number, r: 0.03 if number % 2 else -0.02)
    some = [replace(p, sentences=(len(p.chosen) // 2, len(p.chosen))) for p in shifted.pairs]
    shifted = replace(shifted, pairs=some)
    whole, parts = (
        fitted(policy("gpt2"), objective(f"loss={name}"), shifted, steps=3, micro=micro).numbers
        for micro in (8, 3)
    )
    for one, other in zip(whole, parts, strict=True):
        assert other == pytest.approx(one, rel=1e-9, abs=1e-10)


def sentences_of(alike=False):
    """The pairs of ``given``, whose chosen answers have 2, 1 and 3 sentences."""
    mine, its = given()
    which = torch.tensor([0, 0, 1, *[0] * 5, 0, *[0] * 4, 0, 0, 1, 2, 2, 2, 0, 0])
    near = torch.tensor([0.1, 0.5, 0.3, 0.9, 0.2, 0.6]).double()  # of all sentences in a row
    starts = torch.tensor([0, 2, 8, 13, 15, 16])
    at = torch.bucketize(torch.arange(len(PAIR)), starts, right=True) - 1
    if alike:
        which, near = which * 0, near * 0
    return replace(mine, sentences=which, similarities=near[at]), its


def weighed(logps, mine, its, *, beta, alpha, of_rewards):
    """ASPO pair by pair, sentence by sentence."""
    for n in range(len(LENGTHS)):
        side = [[i for i, p in enumerate(PAIR) if p == n and SIDE[i] == s] for s in (False, True)]
        groups = {}
        for i in side[0]:
            groups.setdefault(mine.sentences[i].item(), []).append(i)
        ratios = [(logps[g] - its.logps[g]).sum() for g in groups.values()]
        near = within([mine.similarities[g[0]].item() for g in groups.values()])
        likely = within([-math.exp(-mine.logps[g].mean().item()) for g in groups.values()])
        weights = [1 + alpha * s + (1 - alpha) * p for s, p in zip(near, likely, strict=True)]
        total = sum(w * r for w, r in zip(weights, ratios, strict=True))
        factor = len(groups) / sum(weights)
        if of_rewards:
            factor = sum(ratios).detach() / total.detach()
        margin = factor * total - (logps[side[1]] - its.logps[side[1]]).sum()
        yield -torch.sigmoid(beta * margin).log()


def within(values):
    low, high = min(values), max(values)
    return [0.0 if high == low else (v - low) / (high - low) for v in values]


@pytest.mark.parametrize("of_rewards", [False, True])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_aspo_against_its_definition(alpha, of_rewards):
    mine, its = sentences_of()
    keys = {"beta": 0.3, "alpha": alpha, "of_rewards": of_rewards}
    logps = mine.logps.clone().requires_grad_()
    found = losses.evaluate(built("aspo", **keys), replace(mine, logps=logps), its, None)
    expected = torch.stack([*weighed(logps, mine, its, **keys)])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    weights = torch.tensor([1.0, 2.0, 3.0])
    slopes = [torch.autograd.grad((it * weights).sum(), logps)[0] for it in (found, expected)]
    torch.testing.assert_close(*slopes, rtol=1e-10, atol=1e-12)
    dpo = losses.evaluate(built("dpo", beta=0.3), mine, its, None)
    assert torch.allclose(found, dpo) == of_rewards and found[1] == dpo[1]


def test_aspo_by_similarity_by_central_differences():
    mine, its = sentences_of()
    loss = built("aspo", alpha=1.0)
    assert torch.autograd.gradcheck(
        lambda at: losses.evaluate(loss, replace(mine, logps=at), its, None),
        mine.logps.clone().requires_grad_(),
    )


@pytest.mark.parametrize("of_rewards", [False, True])
def test_aspo_of_one_sentence_is_dpo_to_the_bit(of_rewards):
    mine, its = sentences_of(alike=True)
    found = []
    for name, keys in (("aspo", {"alpha": 0.4, "of_rewards": of_rewards}), ("dpo", {})):
        logps = mine.logps.clone().requires_grad_()
        value = losses.evaluate(built(name, **keys), replace(mine, logps=logps), its, None)
        found.append((value, torch.autograd.grad(value.sum(), logps)[0]))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("of_rewards", [False, True])
def test_aspo_at_the_start(of_rewards):
    mine, _ = sentences_of()
    logps = mine.logps.clone().requires_grad_()
    loss = built("aspo", alpha=0.4, of_rewards=of_rewards)
    found = losses.evaluate(loss, replace(mine, logps=logps), mine, None)
    assert found.tolist() == pytest.approx([math.log(2)] * 3)
    (slope,) = torch.autograd.grad(found.sum(), logps)
    assert slope.isfinite().all() and (slope[~mine.side] < 0).all()
