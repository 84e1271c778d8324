"""PairLogps of the scorer against whole-model forwards scored one token at a time."""

import copy
import logging
import math
from contextlib import nullcontext

import pytest
import torch
from tiny import gradients, in_float64, lora, policy, random_pairs, slow_logps

from spo_lightning.data.batch import CHOSEN, Pair, PairBatch, collate
from spo_lightning.errors import UserError
from spo_lightning.models import scorer as models
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.checks import check
from spo_lightning.models.head import plain_logps
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer, sides
from spo_lightning.models.sharing import scorer_for, supports_sharing

PAD_ID = 257
FAMILIES = ("llama", "llama-grouped", "qwen2", "gpt2")


@pytest.fixture(autouse=True)
def _in_float64(request, monkeypatch):
    if "float32" not in request.node.name:
        in_float64(monkeypatch)


def longest(pairs):
    return max(len(pair) for pair in pairs)


def slow(lm, pairs):
    with torch.no_grad():
        return torch.cat([slow_logps(lm, pair) for pair in pairs])


def assert_right(found, lm, pairs):
    """Float64: 1e-10 per token. Float32: 5e-5 per token, sums to 1e-6 relative."""
    expected = slow(lm, pairs)
    exact = lm.dtype == torch.float64
    assert found.logps.dtype == lm.dtype
    torch.testing.assert_close(found.logps, expected, rtol=0, atol=1e-10 if exact else 5e-5)
    sums = torch.zeros(2 * len(pairs), dtype=torch.float64)
    slot = 2 * found.pair + found.side.long()
    sums = sums.index_add(0, slot, expected.double()).view(-1, 2)
    tolerance = 1e-12 if exact else 1e-6
    torch.testing.assert_close(found.sums.double(), sums, rtol=tolerance, atol=0)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_shared_rows_and_separate_rows_equal_the_slow_loop(family, attention, dtype):
    lm = policy(family, dtype=dtype, attention=attention).lm
    pairs = random_pairs(7)
    assert supports_sharing(lm, longest(pairs))
    for shared in (True, False):
        with torch.no_grad():
            found = Scorer(lm, shared)(collate(pairs, PAD_ID))
        assert_right(found, lm, pairs)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_the_slow_loop(family, attention):
    lm = policy(family, attention=attention).lm
    pairs = random_pairs(3)
    weights = torch.linspace(-1, 1, sum(len(p.chosen + p.rejected) for p in pairs)).double()
    torch.cat([slow_logps(lm, pair) for pair in pairs]).mul(weights).sum().backward()
    expected = gradients(lm)
    for shared in (True, False):
        lm.zero_grad()
        Scorer(lm, shared)(collate(pairs, PAD_ID)).logps.mul(weights).sum().backward()
        found = gradients(lm)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-10)


def test_only_completion_tokens_are_scored_on_either_side():
    # the collator case of interop-and-traps A.3
    batch = collate([Pair((1, 2, 3), (4, 5), (6,)), Pair((7, 8), (9,), (10, 11))], 0)
    assert batch.targets.tolist() == [4, 5, 6, 9, 10, 11]
    chosen, rejected = sides(batch)
    seen = chosen.input_ids * (chosen.segment != 0)
    assert seen.tolist() == [[1, 2, 3, 4, 5], [7, 8, 9, 0, 0]]
    assert (chosen.segment == CHOSEN).int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 1, 0, 0]]
    assert rejected.input_ids.tolist() == [[1, 2, 3, 6], [7, 8, 10, 11]]
    assert (rejected.segment == CHOSEN).int().tolist() == [[0, 0, 0, 1], [0, 0, 1, 1]]
    lm = policy().lm
    found = Scorer(lm, True)(batch)
    assert found.lengths.tolist() == [[2, 1], [1, 2]]
    for shared in (True, False):
        scored = Scorer(lm, shared)(batch)
        torch.testing.assert_close(scored.sums, found.sums, rtol=1e-12, atol=0)
        assert scored.lengths.tolist() == [[2, 1], [1, 2]]


@pytest.mark.parametrize("shared", [True, False])
def test_swapping_the_pair_flips_the_gap(shared):
    scorer = Scorer(policy().lm, shared)
    pairs = random_pairs(5)
    swapped = [Pair(p.prompt, p.rejected, p.chosen) for p in pairs]
    one, other = (scorer(collate(some, PAD_ID)) for some in (pairs, swapped))
    torch.testing.assert_close(one.gap, -other.gap, rtol=0, atol=1e-10)
    torch.testing.assert_close(one.sums, other.sums.flip(1), rtol=0, atol=1e-10)
    assert one.gap.abs().min() > 1e-2


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_padding_and_order_of_the_batch_do_not_matter(family, attention, shared):
    scorer = Scorer(policy(family, attention=attention).lm, shared)
    pairs = random_pairs(6, longest=20)
    with torch.no_grad():
        whole = scorer(collate(pairs, PAD_ID)).sums
        alone = torch.cat([scorer(collate([pair], PAD_ID)).sums for pair in pairs])
        wide = widened(collate(pairs, 3), 9)
        padded = scorer(wide).sums
        reverse = scorer(collate(pairs[::-1], PAD_ID)).sums.flip(0)
    for other in (alone, padded, reverse):
        torch.testing.assert_close(other, whole, rtol=0, atol=1e-10)


def widened(batch: PairBatch, columns: int) -> PairBatch:
    """The same rows with more padding on the right."""
    fields = {**vars(batch)}
    for name, value in (("input_ids", 3), ("position_ids", 0), ("segment", 0)):
        fields[name] = torch.nn.functional.pad(fields[name], (0, columns), value=value)
    return PairBatch(**fields)


@pytest.mark.parametrize("chunk", [1, 5, 32])
def test_the_head_in_chunks_gives_the_same_values_and_gradients(monkeypatch, chunk):
    lm = policy().lm
    batch = collate(random_pairs(4), PAD_ID)
    whole = Scorer(lm, True)(batch).logps
    assert chunk < len(whole)
    whole.square().sum().backward()
    expected = gradients(lm)
    lm.zero_grad()
    monkeypatch.setattr(Scorer, "_rows", lambda self: chunk)
    parts = Scorer(lm, True)(batch).logps
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=0)
    parts.square().sum().backward()
    found = gradients(lm)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-10, atol=1e-11)
    entropy, mass = Scorer(lm, True).top(batch, 10)
    assert len(entropy) == len(mass) == len(whole)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("shared", [True, False])
def test_pairs_without_a_rejected_side(shared, attention):
    lm = policy(attention=attention).lm
    full = random_pairs(4)
    mixed = [Pair(p.prompt, p.chosen, p.rejected if n % 2 else ()) for n, p in enumerate(full)]
    bare = [Pair(p.prompt, p.chosen, ()) for p in full]
    expected = Scorer(lm, True)(collate(full, PAD_ID)).sums
    for pairs, kept in ((mixed, [0, 1, 0, 1]), (bare, [0, 0, 0, 0])):
        found = Scorer(lm, shared)(collate(pairs, PAD_ID))
        torch.testing.assert_close(found.chosen, expected[:, 0], rtol=0, atol=1e-10)
        rejected = expected[:, 1] * torch.tensor(kept)
        torch.testing.assert_close(found.rejected, rejected, rtol=0, atol=1e-10)
        assert torch.isfinite(found.mean_gap).all()


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("shared", [True, False])
def test_chosen_only_is_the_chosen_side_of_the_full_row(shared, attention):
    scorer = Scorer(policy("llama-grouped", attention=attention).lm, shared)
    batch = collate(random_pairs(6), PAD_ID)
    full, half = scorer(batch), scorer(batch.chosen_only)
    torch.testing.assert_close(half.chosen, full.chosen, rtol=0, atol=1e-10)
    torch.testing.assert_close(half.logps, full.logps[~full.side], rtol=0, atol=1e-10)
    assert half.rejected.eq(0).all() and half.lengths[:, 0].equal(full.lengths[:, 0])


WINDOWED = [  # family, attention, what else; gemma2 refuses sdpa
    ("mistral", "sdpa", {}),
    ("mistral", "eager", {}),
    ("qwen2", "sdpa", {"use_sliding_window": True, "max_window_layers": 0}),
    ("qwen2", "eager", {"use_sliding_window": True, "max_window_layers": 1}),
    ("gemma2", "eager", {"final_logit_softcapping": 2.0}),
]


@pytest.mark.parametrize("family, attention, changes", WINDOWED)
def test_a_window_shorter_than_the_row_runs_separate_forwards(family, attention, changes, caplog):
    pairs = random_pairs(5, longest=12)
    window = 8
    lm = policy(family, attention=attention, sliding_window=window, **changes).lm
    with caplog.at_level(logging.INFO, "spo_lightning.models.sharing"):
        assert not supports_sharing(lm, longest(pairs))
    assert f"window of {window} tokens is shorter than the longest row" in caplog.text
    batch = collate(pairs, PAD_ID)
    with torch.no_grad():
        assert_right(Scorer(lm, False)(batch), lm, pairs)
        # the trap is real: sharing would be wrong here
        assert (Scorer(lm, True)(batch).logps - slow(lm, pairs)).abs().max() > 1e-3


@pytest.mark.parametrize("family, attention, changes", WINDOWED)
def test_a_window_longer_than_the_row_shares(family, attention, changes):
    pairs = random_pairs(5, longest=12)
    lm = policy(family, attention=attention, sliding_window=longest(pairs), **changes).lm
    assert supports_sharing(lm, longest(pairs))
    with torch.no_grad():
        assert_right(Scorer(lm, True)(collate(pairs, PAD_ID)), lm, pairs)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_past_a_window_has_keys(attention):
    """A row that ends more than a window before the longest one."""
    pairs = [random_pairs(1, longest=4)[0], Pair(tuple(range(30)), tuple(range(9)), (5, 6))]
    lm = policy("mistral", attention=attention, sliding_window=8).lm
    with torch.no_grad():
        assert_right(Scorer(lm, False)(collate(pairs, PAD_ID)), lm, pairs)


def test_an_unused_window_does_not_stop_sharing():
    pairs = random_pairs(5)
    lm = policy("qwen2", use_sliding_window=False, sliding_window=4).lm
    assert supports_sharing(lm, longest(pairs))
    with torch.no_grad():
        assert_right(Scorer(lm, True)(collate(pairs, PAD_ID)), lm, pairs)


def test_eager_attention_would_misread_a_boolean_mask():
    lm = policy(attention="eager").lm
    pairs = random_pairs(4)
    batch = collate(pairs, PAD_ID)
    with torch.no_grad():
        right = Scorer(lm, True)(batch)
        assert_right(right, lm, pairs)
        hidden = lm.base_model(
            input_ids=batch.input_ids,
            attention_mask=models.tree_mask(batch.segment),
            position_ids=batch.position_ids,
        ).last_hidden_state[batch.pair, batch.predictor]
        wrong = plain_logps(lm.lm_head(hidden), batch.targets)
    assert (wrong - right.logps).abs().max() > 1e-2  # hence the additive mask in the scorer


@pytest.mark.parametrize(
    "family, changes",
    [("gemma2", {"final_logit_softcapping": 0.5}), ("gemma2", {"final_logit_softcapping": None})],
)
def test_a_soft_capped_head(family, changes):
    lm = policy(family, attention="eager", sliding_window=128, **changes).lm
    pairs = random_pairs(4)
    shared = supports_sharing(lm, longest(pairs))
    with torch.no_grad():
        assert_right(Scorer(lm, shared)(collate(pairs, PAD_ID)), lm, pairs)


@pytest.mark.parametrize("family", [*FAMILIES, "gemma2"])
def test_known_heads_pass_the_check(family):
    for dtype in ("float64", "float32", "bfloat16"):
        check(policy(family, dtype=dtype, attention="eager").lm)


SCALED = [  # at the values of real checkpoints, none a power of two in a row
    ("cohere", {"logit_scale": 0.0625}, 0.0625),
    ("granite", {"logits_scaling": 8.0}, 0.125),
    ("granite", {"logits_scaling": 13.0}, 1 / 13),
]


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("model_type, changes, scale", SCALED)
def test_a_head_that_scales_its_logits(model_type, changes, scale, attention):
    lm = policy("llama-grouped", model_type=model_type, attention=attention, **changes).lm
    check(lm)
    pairs = random_pairs(5)
    scorer, batch = Scorer(lm, True), collate(pairs, PAD_ID)
    assert scorer.reading == Reading("model", scale=scale)
    weights = torch.linspace(-1, 1, len(batch.targets)).double()
    slow = torch.cat([slow_logps(lm, pair) for pair in pairs])
    (slow * weights).sum().backward()
    expected = gradients(lm)
    for around in (nullcontext(), MathKernel()):  # the head in blocks, and differentiable twice
        lm.zero_grad()
        with around:
            found = scorer(batch).logps
            (found * weights).sum().backward()
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-5)
        for name, value in gradients(lm).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-4)


def test_the_scale_is_measured_in_half_precision_too():
    lm = policy("llama-grouped", model_type="granite", dtype="bfloat16", logits_scaling=13.0).lm
    check(lm)
    assert Scorer(lm, True).reading == Reading("model", scale=1 / 13)


def test_any_other_way_to_logits_is_the_model_s_own(caplog):
    lm = policy("llama-grouped").lm
    plain = lm.forward

    def own(*args, **kwargs):
        output = plain(*args, **kwargs)
        return type(output)(logits=4 * output.logits.sin(), hidden_states=output.hidden_states)

    lm.forward = own
    check(lm)
    with caplog.at_level(logging.INFO):
        scorer = scorer_for(lm, 40, share=True)
    assert "read by its own forward, whole" in caplog.text
    assert scorer.reading.logits and scorer.packs and scorer.shared
    pairs = random_pairs(5)
    found = scorer(collate(pairs, PAD_ID)).logps
    expected = torch.cat([slow_logps(lm, pair) for pair in pairs])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)
    assert scorer.hidden_sums(collate(pairs, PAD_ID)).shape == (5, 2, 32)


def test_a_model_that_sees_the_future_is_refused():
    from transformers import BertGenerationConfig, BertGenerationDecoder

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = BertGenerationConfig(
        vocab_size=258, intermediate_size=48, initializer_range=0.3, **sizes
    )
    lm = BertGenerationDecoder(config).eval()
    with pytest.raises(UserError, match="BertGenerationDecoder sees the future"):
        check(lm)
    lm.config.is_decoder = True
    check(BertGenerationDecoder(lm.config).eval())


def test_the_reference_of_lora_is_the_base_and_only_adapters_move():
    made = policy("llama-grouped")
    base = copy.deepcopy(made.lm)
    adapted = lora(made)
    scorer = Scorer(adapted.lm, True)
    batch = collate(random_pairs(4), PAD_ID)
    before = {n: p.detach().clone() for n, p in adapted.module.named_parameters()}
    trained = [p for p in adapted.module.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    for _ in range(2):  # lora_A starts to move on the second step: lora_B starts at zero
        optimizer.zero_grad()
        (-scorer(batch).gap.sum()).backward()
        optimizer.step()
    for name, value in adapted.module.named_parameters():
        assert value.equal(before[name]) == (".lora_" not in name), name
    with torch.no_grad():
        expected = Scorer(base, True)(batch).logps
        assert (scorer(batch).logps - expected).abs().max() > 1e-3
        with adapted.start():
            assert scorer(batch).logps.equal(expected)
        assert (scorer(batch).logps - expected).abs().max() > 1e-3


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_activation_checkpointing_gives_the_same_gradients(family, attention, adapters):
    def found(checkpointing):
        made = policy(family, dtype="float32", attention=attention)
        made = lora(made) if adapters else made
        for name, value in made.module.named_parameters():
            if "lora_B" in name:  # zero at the start, which would hide lora_A's gradient
                torch.nn.init.normal_(value, generator=torch.Generator().manual_seed(1))
        if checkpointing:
            made.lm.gradient_checkpointing_enable({"use_reentrant": False})
            assert made.lm.is_gradient_checkpointing
        made.lm.train()
        logps = Scorer(made.lm, True)(collate(random_pairs(4), PAD_ID))
        logps.gap.sum().backward()
        return gradients(made.module)

    plain, recomputed = found(False), found(True)
    assert plain.keys() == recomputed.keys()
    assert all(value.abs().max() > 0 for value in plain.values())
    for name, value in plain.items():
        torch.testing.assert_close(recomputed[name], value, rtol=1e-6, atol=1e-7)


def test_top_against_a_hand_worked_distribution():
    # methods.md section 5: p = (.5, .25, .125), k = 3, raw
    lm = policy().lm
    head = torch.nn.Linear(32, 258, dtype=torch.float64)
    rest = 0.125 / 255
    p = torch.tensor([rest] * 100 + [0.25, 0.5, 0.125] + [rest] * 155, dtype=torch.float64)
    with torch.no_grad():
        head.weight.zero_()
        head.bias.copy_(p.log() + 3.0)
    lm.set_output_embeddings(head)
    batch = collate(random_pairs(3), PAD_ID)
    entropy, mass = Scorer(lm, True).top(batch, 3)
    assert len(entropy) == len(batch.targets)
    torch.testing.assert_close(entropy, torch.full_like(entropy, 1.375), rtol=0, atol=1e-12)
    torch.testing.assert_close(mass, torch.full_like(mass, 0.875), rtol=0, atol=1e-12)


def test_top_against_a_naive_computation():
    lm = policy("qwen2").lm
    pairs = random_pairs(3)
    entropy, mass = Scorer(lm, True).top(collate(pairs, PAD_ID), 10)
    expected = []
    for pair in pairs:
        for response in (pair.chosen, pair.rejected):
            with torch.no_grad():
                logits = lm(input_ids=torch.tensor([pair.prompt + response])).logits[0]
            for place in range(len(pair.prompt) - 1, len(pair.prompt + response) - 1):
                p = sorted(logits[place].softmax(-1).tolist(), reverse=True)[:10]
                expected.append((-sum(x * math.log2(x) for x in p), sum(p)))
    naive = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(torch.stack([entropy, mass], 1), naive, rtol=0, atol=1e-10)
