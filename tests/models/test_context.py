"""Context in answers: read, not scored, the same however a batch is read, in every number."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from tiny import gradients, in_float64, policy, random_contexts, random_pairs, slow_logps
from tiny import with_context as context

from spo_lightning.data.batch import CHOSEN, Pair, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.evaluation.ches import ches, scores
from spo_lightning.evaluation.totals import pair_numbers
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.scorer import Scorer, sides

PAD_ID = 257
ANSWER = Pair((1, 2, 3), (4, 5, 6, 7), (8, 9, 10))
# in between, at the begin and at the end, none, none of the two is left; an absent rejected side
PAIRS = [
    context(ANSWER, (1, 3), (0, 1, 2, 3)),
    ANSWER,
    context(ANSWER, (0, 4), (1, 2)),
    context(replace(ANSWER, rejected=()), (2, 4)),
    *random_contexts([*random_pairs(6), *random_pairs(3, longest=30)]),
]


@pytest.fixture(autouse=True)
def _in_float64(monkeypatch):
    in_float64(monkeypatch)


def test_the_row_by_hand():
    batch = collate(PAIRS[:3], PAD_ID)
    assert batch.targets.tolist() == [4, 7, 9, 4, 5, 6, 7, 8, 9, 10, 8, 10]
    assert batch.column.tolist() == [3, 6, 8, 3, 4, 5, 6, 7, 8, 9, 7, 9]
    # the column before, and the prompt's last for a first token
    assert batch.predictor.tolist() == [2, 5, 7, 2, 3, 4, 5, 2, 7, 8, 2, 8]
    assert batch.scored.tolist() == [[2, 1], [4, 3], [0, 2]]
    assert batch.lengths.tolist() == [[3, 4, 3]] * 3
    # the prompt, then every answer without its last token, context or not
    alone = collate(PAIRS[:1], PAD_ID).packed
    assert alone.input_ids.tolist() == [[1, 2, 3, 4, 5, 6, 8, 9]]
    assert alone.predictor.tolist() == [2, 5, 6]
    assert PAIRS[0].scored == ([range(0, 1), range(3, 4)], [range(1, 2)])
    assert PAIRS[2].scored == ([], [range(0, 1), range(2, 3)])


def test_parts_and_sides_keep_their_scored_tokens():
    batch = collate(PAIRS[:4], PAD_ID)
    marked = replace(batch, reference=torch.arange(float(len(batch.targets))))
    chosen, rejected = sides(marked)
    assert chosen.targets.tolist() == [4, 7, 4, 5, 6, 7, 4, 5]
    assert rejected.targets.tolist() == [9, 8, 9, 10, 8, 10]
    assert rejected.predictor.tolist() == [3, 2, 3, 4, 2, 4]
    assert not rejected.rejected.any() and (rejected.segment[0] == CHOSEN).sum() == 3
    assert chosen.reference is not None
    assert chosen.reference.equal(marked.reference[~marked.rejected])
    parts = marked.split(3)
    assert [part.targets.tolist() for part in parts] == [
        [4, 7, 9, 4, 5, 6, 7, 8, 9, 10, 8, 10],
        [4, 5],
    ]
    assert torch.cat([part.reference for part in parts]).equal(marked.reference)
    alone = collate(PAIRS[3:4], PAD_ID)
    assert parts[1].column.equal(alone.column) and parts[1].predictor.equal(alone.predictor)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_every_way_equals_the_slow_loop_and_so_do_gradients(family, attention):
    changes = {"sliding_window": 200} if family == "mistral" else {}
    lm = policy(family, attention=attention, **changes).lm
    expected = torch.cat([slow_logps(lm, pair) for pair in PAIRS if any(pair.scored)])
    weights = torch.linspace(-1, 1, len(expected)).double()
    (expected * weights).sum().backward()
    slopes = gradients(lm)
    batch = collate(PAIRS, PAD_ID)
    ways = [Scorer(lm, True), Scorer(lm, False), Scorer(lm, True).apart]
    for way in ways:
        lm.zero_grad()
        found = way(batch)
        torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-10)
        assert found.lengths.equal(batch.scored.clamp(min=1).to(found.lengths.dtype))
        (found.logps * weights).sum().backward()
        for name, value in slopes.items():
            torch.testing.assert_close(gradients(lm)[name], value, rtol=1e-9, atol=1e-10)
    with MathKernel():
        torch.testing.assert_close(ways[0](batch).logps, expected, rtol=0, atol=1e-10)
    alone = torch.cat([ways[0](collate([pair], PAD_ID)).logps for pair in PAIRS])
    torch.testing.assert_close(alone, expected, rtol=0, atol=1e-10)


def test_context_moves_what_follows_it_and_nothing_else():
    scorer = Scorer(policy().lm, True)
    pair = context(Pair((1, 2), (3, 4, 5, 6), (7, 8)), (1, 2))
    other = replace(pair, chosen=(3, 9, 5, 6))
    one, two = (scorer(collate([p], PAD_ID)).logps for p in (pair, other))
    same = (one - two).abs() < 1e-12
    assert same.tolist() == [True, False, False, True, True]


def test_numbers_are_those_of_the_scored_tokens():
    lm = policy().lm
    some = [pair for pair in PAIRS if all(pair.scored)]
    found = Scorer(lm, True)(collate(some, PAD_ID))
    numbers = pair_numbers(found, None, beta=0.1)
    total, count = numbers["nll/chosen"]
    slow = [slow_logps(lm, replace(pair, rejected=(), rejected_context=())) for pair in some]
    assert count.tolist() == [*map(len, slow)]
    expected = torch.stack([-logps.sum() for logps in slow])
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-10)
    norms, _ = numbers["preference/accuracy_norm"]
    means = [
        [slow_logps(lm, Pair(p.prompt, ids, (), -1, edges)).mean() for ids, edges in answers]
        for p in some
        for answers in [((p.chosen, p.chosen_context), (p.rejected, p.rejected_context))]
    ]
    assert norms.tolist() == [float(chosen > rejected) for chosen, rejected in means]


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
def test_ches_sums_the_states_of_the_scored_tokens(shared, attention):
    lm = policy(attention=attention).lm
    some = [pair for pair in PAIRS if all(pair.scored)]
    sums, lengths = [], []
    for pair in some:
        own = []
        for ids, runs in zip((pair.chosen, pair.rejected), pair.scored):
            whole = torch.tensor([pair.prompt + ids])
            states = lm.model(input_ids=whole).last_hidden_state[0].detach()
            places = [len(pair.prompt) + n - 1 for run in runs for n in run]
            own.append(states[places].sum(0))
            lengths.append(len(places))
        sums.append(torch.stack(own))
    expected = ches(torch.stack(sums), torch.tensor(lengths).view(-1, 2))
    pairs = Pairs(some, None, PAD_ID)
    found = scores(Scorer(lm, shared), pairs, batch_size=4, precision=nullcontext)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
