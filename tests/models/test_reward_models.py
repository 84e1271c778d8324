"""Reward models: read as transformers reads them, packed and padded, saved and loaded."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import in_float64, policy, random_pairs

from spo_lightning.data.batch import Pair, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation.totals import pair_numbers, wilson
from spo_lightning.models.architectures.judge import built
from spo_lightning.models.architectures.small import config_of
from spo_lightning.models.policy import adapt, load, opened, to_rewards
from spo_lightning.models.rewards import (
    at_the_end,
    check_rewards,
    reading_of_rewards,
    rewards,
    to_reward,
    with_head,
)
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharing import scorer_for

PAD = 257


def reward_model(name="llama", **how):
    return to_rewards(policy(name, **how), seed=1)


def adapted(made, **how):
    found = adapt(made, rank=3, alpha=8, targets="all-linear", merge=False, seed=0, **how)
    for number, p in enumerate(found.lm.parameters()):
        if p.requires_grad:  # as if trained: new adapters alone change nothing
            seeded = torch.Generator().manual_seed(number)
            p.data += 0.1 * torch.randn(p.shape, generator=seeded, dtype=p.dtype)
    return found


def plain(lm, pairs):
    """[B, 2] by the model's own forward of each text alone."""
    found = []
    for pair in pairs:
        for answer in (pair.chosen, pair.rejected):
            found.append(lm(input_ids=torch.tensor([pair.prompt + answer])).logits[0, 0])
    return torch.stack(found).view(-1, 2)


def eager(lm):
    lm.set_attn_implementation("eager")
    return lm.eval()


@pytest.mark.parametrize("name", ["llama-grouped", "qwen2", "gpt2", "mistral"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
def test_packed_and_padded_are_the_plain_forward(name, attention, monkeypatch):
    in_float64(monkeypatch)
    made, pairs = reward_model(name, attention=attention), random_pairs(7)
    for share in (True, False):
        scorer = scorer_for(made.lm, longest=42, share=share)
        given = to_reward(Pairs(pairs, None, PAD), made.lm)
        found = scorer(given.batch(range(7)))
        assert found.rewards and found.logps.shape == (14,)
        torch.testing.assert_close(found.sums, rewards(made.lm, pairs), rtol=0, atol=1e-10)
        whole = found.sums
    own = plain(eager(made.lm), pairs)
    assert (own[:, 0] - own[:, 1]).abs().max() > 1e-3  # the two sides are told apart
    torch.testing.assert_close(whole, own, rtol=0, atol=1e-10)


def test_gradients_are_those_of_the_plain_forward(monkeypatch):
    in_float64(monkeypatch)
    made, pairs = reward_model(), random_pairs(5)
    scorer = scorer_for(made.lm, longest=42, share=True)
    assert scorer.packs
    weights = torch.linspace(-1, 1, 10, dtype=torch.float64).view(5, 2)
    batch = to_reward(Pairs(pairs, None, PAD), made.lm).batch(range(5))
    (scorer(batch).sums * weights).sum().backward()
    packed = {n: p.grad.clone() for n, p in made.lm.named_parameters() if p.grad is not None}
    made.lm.zero_grad()
    (plain(eager(made.lm), pairs) * weights).sum().backward()
    assert packed.keys() == {name for name, _ in made.lm.named_parameters()}
    for name, p in made.lm.named_parameters():
        torch.testing.assert_close(packed[name], p.grad, rtol=1e-8, atol=1e-10)


@settings(max_examples=25, deadline=None)
@given(
    chosen=st.lists(st.sampled_from([1, 2, PAD]), min_size=1, max_size=5),
    rejected=st.lists(st.sampled_from([1, 2, PAD]), max_size=5),
)
def test_padding_ends_no_answer(chosen, rejected):
    """The place that is read is the one that transformers looks for."""
    pair = at_the_end(Pair((5, 6), tuple(chosen), tuple(rejected)), PAD)
    batch = collate([pair], 0)
    assert len(batch.predictor) == 1 + bool(rejected)
    for answer, place in zip((chosen, rejected), batch.predictor.tolist()):
        text = [5, 6, *answer]
        last = max(n for n, token in enumerate(text) if token != PAD)
        before = len(pair.chosen) if answer is rejected and last > 1 else 0
        assert place == before + last


@pytest.mark.parametrize("how", ["whole", "adapters", "merged"])
def test_a_saved_one_is_the_fields(how, tmp_path, monkeypatch):
    """Other tools' classes load what is written, and give its rewards."""
    from peft import AutoPeftModelForSequenceClassification
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    start = policy("llama", dtype="float32")
    start.save(tmp_path / "base", merge=False, card="")
    made = to_rewards(
        load(
            pretrained=str(tmp_path / "base"),
            revision=None,
            trust_remote_code=False,
            dtype="float32",
            attention="auto",
            config={},
            seed=0,
        ),
        seed=3,
    )
    if how != "whole":
        made = adapted(made)
        trained = {n for n, p in made.lm.named_parameters() if p.requires_grad}
        assert any("score" in name for name in trained) and any("lora" in n for n in trained)
    made.save(tmp_path / "model", merge=how == "merged", card="")
    kind = AutoModelForSequenceClassification
    if how == "adapters":
        kind = AutoPeftModelForSequenceClassification
    theirs = kind.from_pretrained(tmp_path / "model", num_labels=1, dtype="float32").eval()
    pairs = random_pairs(6)
    mine = rewards(made.lm, pairs)
    torch.testing.assert_close(mine, plain(theirs, pairs), rtol=1e-4, atol=1e-4)
    # a padded batch through their tokenizer, as a pipeline would
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    texts = [list(p.prompt + p.chosen) for p in pairs]
    padded = tokenizer.pad({"input_ids": texts}, return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(theirs(**padded).logits[:, 0], mine[:, 0], rtol=1e-4, atol=1e-4)
    again = opened(str(tmp_path / "model"), Settings(), "cpu", rewards=True)
    assert again.rewards and again.adapted == (how == "adapters")
    torch.testing.assert_close(rewards(again.lm, pairs), mine, rtol=1e-5, atol=1e-5)
    with pytest.raises(UserError, match="is a reward model, which has no log-probabilities"):
        opened(str(tmp_path / "model"), Settings(), "cpu")


class Settings(dict):
    """What ``opened`` reads of a config."""

    trust_remote_code, dtype, attention = False, "float32", "auto"


def test_a_head_is_the_seeds():
    one, same, other = (to_rewards(policy(), seed=seed).lm.score.weight for seed in (1, 1, 2))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_adapters_become_part_of_the_body():
    made = adapted(policy())
    body = made.lm.model
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    before = body(input_ids=ids).last_hidden_state
    found = to_rewards(made, seed=0)
    assert not found.adapted and found.base is None
    assert all(p.requires_grad for p in found.lm.parameters())
    torch.testing.assert_close(found.lm.model(input_ids=ids).last_hidden_state, before)


def test_what_is_no_reward_model_of_ours():
    made = reward_model()
    check_rewards(made.lm)
    made.lm.score = torch.nn.Linear(32, 2, bias=False)
    with pytest.raises(UserError, match="is no reward model of this package: it needs one label"):
        reading_of_rewards(made.lm)


@pytest.mark.parametrize("kind", ["mamba", "xlnet"])
def test_a_body_without_a_class_for_it(kind):
    lm = built(config_of(kind))
    with pytest.raises(UserError, match="cannot be a reward model: transformers has no class"):
        with_head(lm, 1, seed=0)


def test_a_forward_that_does_more_is_refused():
    made = reward_model()
    made.lm.score.register_forward_hook(lambda module, given, out: out if out.dim() == 2 else -out)
    with pytest.raises(UserError, match="is not read right: rewards differ by"):
        check_rewards(made.lm)


def test_the_numbers_of_a_reward_model():
    pairs = [Pair((1, 2), (3,), (4,)), Pair((1, 2), (3, 4), (3, 4)), Pair((2,), (4,), (3, 3))]
    made = reward_model()
    given = to_reward(Pairs(pairs, None, PAD), made.lm)
    scorer = Scorer(made.lm, True, reading=reading_of_rewards(made.lm))
    found = scorer(given.batch(range(3)))
    numbers = {name: it for name, (it, _) in pair_numbers(found, None, beta=2.0).items()}
    assert set(numbers) == {
        *("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"),
    }
    assert numbers["rewards/accuracies"][1] == 0.5  # a tie counts half
    assert set(numbers["rewards/accuracies"].tolist()) <= {0.0, 0.5, 1.0}
    torch.testing.assert_close(numbers["rewards/margins"], 2.0 * found.gap.detach())
    assert found.gap[1] == 0 and replace(found, rewards=False).chosen_length.tolist() == [1, 1, 1]


def test_wilson():
    """Against Newcombe 1998, table I: 81 of 263, 15 of 148, 0 of 20, 1 of 29."""
    known = {
        (81, 263): (0.2553, 0.3662),
        (15, 148): (0.0624, 0.1605),
        (0, 20): (0.0, 0.1611),
        (1, 29): (0.0061, 0.1718),
    }
    for (hits, count), interval in known.items():
        assert wilson(hits / count, count) == pytest.approx(interval, abs=5e-5)
