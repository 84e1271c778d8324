"""A policy whose parameters are spread reads, answers and is saved as the whole."""

import copy

import pytest
import torch
from tiny import lora, policy, random_pairs

from spo_lightning.data.batch import collate
from spo_lightning.errors import UserError
from spo_lightning.models.generate import Decoding, answers
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding, at, kept, layers_of
from spo_lightning.records.progress import silent
from spo_lightning.world import spread_like, whole

PAIRS = random_pairs(5)
HOW = {"trains": True, "unpaired": False}


@pytest.fixture
def world(group_of_one):
    return group_of_one


def made(name="llama", adapters=False, **changes):
    found = policy(name, **changes)
    return lora(found) if adapters else found


def spread(found, world, *, reshard=True):
    return Sharding(reshard, 1, False)(found, lambda it: Scorer(it.lm, True), world, **HOW)


def read(scorer):
    """All that is read of a batch, and the gradient of its log-probabilities."""
    batch = collate(PAIRS, 257)
    with kept(scorer):
        logps = scorer(batch).logps
        logps.square().sum().backward()
    slopes = [p.grad for p in scorer.parameters() if p.grad is not None]
    looks = [*scorer.top(batch, 5), *scorer.greedy(batch), scorer.hidden_sums(batch)]
    return [logps.detach(), *looks, *map(whole, slopes)]


@pytest.mark.parametrize("reshard", [True, False])
@pytest.mark.parametrize(
    "which",
    [
        {},
        {"adapters": True},
        {"tie_word_embeddings": True},
        {"name": "gpt2", "tie_word_embeddings": True},
        {"attention": "sdpa"},
    ],
    ids=str,
)
def test_what_is_spread_reads_as_the_whole(world, which, reshard):
    found = made(**which)
    theirs = read(Scorer(copy.deepcopy(found.lm), True))
    _, scorer = spread(found, world, reshard=reshard)
    assert all(hasattr(p, "full_tensor") for p in scorer.parameters())
    mine = read(scorer)
    assert len(mine) == len(theirs) > 10
    assert all(ours.equal(other) for ours, other in zip(mine, theirs))
    assert all(hasattr(p, "full_tensor") for p in scorer.parameters())  # nothing stays gathered


@pytest.mark.parametrize("adapters", [False, True])
def test_what_is_spread_answers_and_is_saved_as_the_whole(world, tmp_path, adapters):
    found = made(adapters=adapters, tie_word_embeddings=True)
    rows = [{"prompt": text} for text in ("a", "1+2=", "spread")]
    how = Decoding(6, 2, ())
    before = answers(found, rows, how, silent(), "")
    found.save(tmp_path / "whole", merge=True, card="")
    parts, _ = spread(found, world)
    assert answers(parts, rows, how, silent(), "") == before
    filled = parts.gathered("cpu")
    assert filled is not None and filled.spread is None
    if not adapters:  # merged, they are apart
        assert filled.lm.lm_head.weight is filled.lm.model.embed_tokens.weight
    parts.save(tmp_path / "parts", merge=True, card="")
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    for name in names:
        mine, theirs = ((tmp_path / place / name).read_bytes() for place in ("parts", "whole"))
        assert mine == theirs, name
    assert parts.gathered(None) is None


def test_new_adapters_are_switched_off_and_on(world):
    found = made(adapters=True)
    for name, p in found.lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    batch = collate(PAIRS, 257)
    plain = Scorer(found.lm, True)
    with torch.no_grad(), found.start():
        start = plain(batch).logps
    parts, scorer = spread(found, world)
    with torch.no_grad(), parts.start():
        assert scorer(batch).logps.equal(start)
    moved = scorer(batch).logps
    assert not moved.equal(start)
    moved.sum().backward()
    assert all(p.grad is not None for n, p in scorer.named_parameters() if "lora_" in n)


def test_other_values_are_held_for_a_while(world):
    _, scorer = spread(made(), world, reshard=False)
    batch = collate(PAIRS, 257)
    with kept(scorer):  # layers keep what they gathered, which holds the values of before
        logps = scorer(batch).logps
        others = {name: p.detach() * 0.5 for name, p in scorer.spread.items()}
        with at(scorer, others), torch.no_grad():
            assert not scorer(batch).logps.allclose(logps)
        with torch.no_grad():
            assert scorer(batch).logps.equal(logps)


def test_a_part_is_what_like_holds(world):
    _, scorer = spread(made(), world)
    for p in scorer.parameters():
        value = torch.randn(p.shape, dtype=p.dtype)
        part = spread_like(value, p)
        assert whole(part).equal(value) and part.placements == p.placements
        assert spread_like(part, p) is part and spread_like(value, value) is value


def test_blocks_are_the_longest_list_of_layers():
    for name in ("llama", "gpt2"):
        layers = layers_of(made(name).lm)
        assert [type(layer).__name__ for layer in layers] == [type(layers[0]).__name__] * 2
    with pytest.raises(UserError, match="no list of layers"):
        layers_of(torch.nn.Linear(2, 2))


def test_what_cannot_be_spread_is_refused(world):
    half = policy(dtype="bfloat16")
    with pytest.raises(UserError, match="or train adapters"):
        spread(half, world)
    found = made()
    with pytest.raises(UserError, match="no effect on a CPU"):
        Sharding(True, 1, True)(found, lambda it: Scorer(it.lm, True), world, **HOW)
    alone = made(attention="sdpa")
    with pytest.raises(UserError, match="reads its answers apart"):
        Sharding(True, 1, False)(
            alone, lambda it: Scorer(it.lm, False), world, trains=True, unpaired=True
        )
    Sharding(True, 1, False)(
        half, lambda it: Scorer(it.lm, True), world, trains=False, unpaired=False
    )
