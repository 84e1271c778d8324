"""Packed rows: their layout by hand, what attends to what, microbatches by tokens."""

import random
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from fitting import fitted, objective, snapshot
from hypothesis import given
from hypothesis import strategies as st
from tiny import gradients, in_float64, policy, random_pairs, slow_logps
from torch.nn.attention import flex_attention

from spo_lightning.data.batch import Pair, by_pairs, by_tokens, collate, pack
from spo_lightning.errors import UserError
from spo_lightning.models import attention
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.checks import check
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharing import as_read_by, scorer_for

PAD_ID = 257
SAME = [  # two pairs of one prompt, another between them, an absent and a one-token response
    Pair((1, 2, 3), (4, 5), (6,)),
    Pair((7, 8), (9,), ()),
    Pair((1, 2, 3), (10, 11, 12), (13, 14)),
]


@pytest.fixture(params=["stretches", "rectangles"])
def calls(request, monkeypatch):
    """Rows of few tokens under either way of attention; what is long decides between them."""
    monkeypatch.setattr(attention, "STRETCH", 0 if request.param == "stretches" else 10**9)
    return request.param


def test_the_row_by_hand():
    packed = collate(SAME, PAD_ID).packed
    # prompts once, then responses without their last token
    assert packed.input_ids.tolist() == [[1, 2, 3, 7, 8, 4, 10, 11, 13]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 3, 3, 4, 3]]
    #            4  5  6  9  10 11 12 13 14
    assert packed.predictor.tolist() == [2, 5, 2, 4, 2, 6, 7, 2, 8]
    tree = packed.tree
    assert tree.prompt_of.tolist() == [0, 0, 1, 0, 0]
    assert tree.responses.length.tolist() == [1, 0, 0, 2, 1]
    # the fourth response, two tokens: its prompt whole, then itself causally
    assert tree.seen[3, 0].int().tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    # the third has a prompt of two: the padding of the prompts is not seen
    assert tree.seen[2, 0, 0].int().tolist() == [1, 1, 0, 1, 0]


def test_apart_every_response_has_its_prompt():
    packed = collate(SAME, PAD_ID).packed_apart
    assert packed.tree.prompt_of.tolist() == list(range(5))
    prompts = [1, 2, 3, 1, 2, 3, 7, 8, 1, 2, 3, 1, 2, 3]
    assert packed.input_ids.tolist() == [[*prompts, 4, 10, 11, 13]]


@pytest.mark.parametrize("family", ["llama", "llama-grouped", "qwen2", "gpt2", "mistral"])
def test_equal_prompts_stand_once_and_change_nothing(monkeypatch, calls, family):
    in_float64(monkeypatch)
    lm = policy(family).lm
    pairs = [Pair(p.prompt, p.chosen, q.chosen) for p in random_pairs(3) for q in random_pairs(4)]
    random.Random(0).shuffle(pairs)
    pairs = [p for p in pairs if p.chosen != p.rejected]
    batch = collate([*pairs, *SAME], PAD_ID)
    assert batch.packed.input_ids.shape[1] < 0.6 * batch.packed_apart.input_ids.shape[1]
    weights = torch.linspace(-1, 1, len(batch.targets)).double()
    torch.cat([slow_logps(lm, pair) for pair in [*pairs, *SAME]]).mul(weights).sum().backward()
    expected = gradients(lm)
    for shared in (True, False):
        lm.zero_grad()
        (Scorer(lm, shared)(batch).logps * weights).sum().backward()
        for name, value in gradients(lm).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [1, 3, 8, 100])
@pytest.mark.parametrize(
    "family, changes",
    [
        ("mistral", {}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1}),  # full, then windowed
    ],
)
def test_a_window_is_packed_too(monkeypatch, calls, family, changes, window):
    in_float64(monkeypatch)
    lm = policy(family, sliding_window=window, **changes).lm
    pairs = random_pairs(5, longest=12)
    scorer = scorer_for(lm, 40, share=True)
    assert scorer.packs and scorer.shared
    expected = torch.cat([slow_logps(lm, pair) for pair in pairs])
    found = scorer(collate(pairs, PAD_ID)).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_cpu_attends_in_float32_within_short_rows_in_half_precision(monkeypatch, calls, mixed):
    """Its backward in bfloat16 takes several times as long there."""
    seen = []
    plain = attention.scaled_dot_product_attention

    def watched(query, *args, **kwargs):
        found = plain(query, *args, **kwargs)
        seen.append((query.dtype, found.dtype))
        return found

    monkeypatch.setattr(attention, "scaled_dot_product_attention", watched)
    lm = policy("llama-grouped", dtype="float32" if mixed else "bfloat16").lm
    pairs = random_pairs(3)
    batch = collate(pairs, PAD_ID)

    def score() -> torch.Tensor:
        seen.clear()
        lm.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            found = Scorer(lm, True)(batch).logps
        found.sum().backward()
        return found.detach()

    wide, slopes = score(), gradients(lm)
    assert seen and {dtype for both in seen for dtype in both} == {torch.float32}
    monkeypatch.setattr(attention, "SHORT", 5)
    half = score()
    assert {found for _, found in seen} == {torch.bfloat16}
    torch.testing.assert_close(wide, half, rtol=0, atol=0.1)
    assert all(value.isfinite().all() for value in slopes.values())
    exact = lm.float()
    expected = torch.cat([slow_logps(exact, pair) for pair in pairs]).float()
    assert (wide - expected).abs().mean() <= 1.1 * (half - expected).abs().mean()


@pytest.fixture
def flex(monkeypatch):
    """FlexAttention by its own uncompiled reference, its lack of a backward on a CPU looked past:
    the reference has one, and it is the mask that is to be tested."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *states: None)
    with torch.compiler.set_stance("force_eager"):
        yield


@pytest.mark.parametrize(
    "family, changes",
    [
        ("llama", {}),
        ("llama-grouped", {}),
        ("gpt2", {}),
        ("mistral", {"sliding_window": 3}),
        ("mistral", {"sliding_window": 100}),
        ("qwen2", {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 3}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "sliding_window": 3}),
    ],
)
def test_flex_attention_sees_the_same(monkeypatch, flex, family, changes):
    in_float64(monkeypatch)
    lm = policy(family, attention="eager", **changes).lm
    pairs = [*random_pairs(5, longest=12), *SAME]
    batch = collate(pairs, PAD_ID)
    weights = torch.linspace(-1, 1, len(batch.targets)).double()
    torch.cat([slow_logps(lm, pair) for pair in pairs]).mul(weights).sum().backward()
    expected = gradients(lm)
    lm.set_attn_implementation(attention.FLEX)
    assert Scorer(lm, True).packs
    for shared in (True, False):
        lm.zero_grad()
        (Scorer(lm, shared)(batch).logps * weights).sum().backward()
        for name, value in gradients(lm).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)


def by_definition(query, key, value, ends, key_ends, longest, most, *, scale, window_size, **_):
    """What torch documents of varlen_attn: a query sees the keys up to its own, counted from the
    last key of its sequence, and so many before. Every head of its own."""
    found = []
    ends, key_ends = ends.tolist(), key_ends.tolist()
    for a, b, c, d in zip(ends, ends[1:], key_ends, key_ends[1:]):
        assert b - a <= longest and d - c <= most
        for row in range(a, b):
            last = d - (b - row) + 1
            first = c if window_size[0] < 0 else max(c, last - 1 - window_size[0])
            scores = torch.einsum("hd,khd->hk", query[row], key[first:last])
            scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
            found.append(torch.einsum("hk,khd->hd", scores.softmax(1), value[first:last]))
    return torch.stack(found)


@pytest.mark.parametrize(
    "family, window", [("llama", None), ("gpt2", None), ("mistral", 1), ("mistral", 4)]
)
@pytest.mark.parametrize("shared", [True, False])
def test_what_one_call_is_given(monkeypatch, family, window, shared):
    # the kernel itself needs a GPU (test_gpu.py); here are its arguments
    changes = {"sliding_window": window, "num_key_value_heads": 4} if window else {}
    in_float64(monkeypatch)
    lm = policy(family, **changes).lm
    pairs = [*random_pairs(5, longest=12), *SAME]
    expected = torch.cat([slow_logps(lm, pair) for pair in pairs])
    batch = collate(pairs, PAD_ID)
    batch.__dict__["packed"] = pack(batch, share=True, gpu=True)
    batch.__dict__["packed_apart"] = pack(batch, share=False, gpu=True)
    monkeypatch.setattr(attention, "varlen_attn", by_definition)
    monkeypatch.setattr(attention, "_half", lambda query, tree: query.dtype)
    found = Scorer(lm, shared)(batch).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


def test_without_a_gpu_nothing_is_made_for_one():
    batch = collate(SAME, PAD_ID)
    assert batch.packed.tree.stretches is None and batch.to("cpu") is batch


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler: g++")
def test_flex_attention_compiled():
    lm = policy("llama-grouped", dtype="float32").lm
    pairs = random_pairs(40, longest=30)
    expected = Scorer(lm, True)(collate(pairs, PAD_ID)).logps.detach()
    lm.set_attn_implementation(attention.FLEX)
    with torch.no_grad():
        found = Scorer(lm, True)(collate(pairs, PAD_ID)).logps
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_flex_attention_wants_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(UserError, match="model.attention=flex needs a CUDA GPU"):
        policy("llama", attention="flex")


@pytest.mark.parametrize("length, calls", [(12, 2), (40, 6)])
def test_long_stretches_have_a_call_each(monkeypatch, length, calls):
    lm, counted = policy("llama").lm, []
    plain = attention.scaled_dot_product_attention

    def counting(*args, **kwargs):
        counted.append(1)
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "scaled_dot_product_attention", counting)
    text = tuple(range(length))
    pairs = [Pair(text, text, text[::-1]), Pair(text[1:], text, text[::-1]), Pair(text, (7,), ())]
    batch = collate(pairs, PAD_ID)
    Scorer(lm, True)(batch)
    # in each of two layers: two different prompts, four responses; one token is not in the row
    assert len(counted) == 2 * calls
    counted.clear()
    with MathKernel():  # keeps attention matrices: in parts of a rectangle
        Scorer(lm, True)(batch)
    assert len(counted) == 4


@pytest.mark.parametrize(
    "family, changes",
    [("llama", {}), ("llama-grouped", {}), ("gpt2", {}), ("mistral", {"sliding_window": 4})],
)
def test_attention_matrices_in_parts_change_nothing(monkeypatch, family, changes):
    in_float64(monkeypatch)
    monkeypatch.setattr(attention, "PART", 3)
    lm = policy(family, **changes).lm
    pairs = [*random_pairs(5), *SAME]
    scorer, batch = Scorer(lm, True), collate(pairs, PAD_ID)
    expected = torch.cat([slow_logps(lm, pair) for pair in pairs])
    with MathKernel():
        torch.testing.assert_close(scorer(batch).logps, expected, rtol=0, atol=1e-10)


def test_what_is_recomputed_or_does_not_fit_is_not_kept():
    lm = policy("llama").lm
    long = range(60)  # tokens of the rejected answers, of which the lower level knows nothing
    batch = collate([Pair(p.prompt, p.chosen, (*long,)) for p in random_pairs(8)], PAD_ID)
    assert Scorer(lm, True).keeps(batch) and Scorer(lm, True).smaller(batch) == [batch]
    assert not Scorer(lm, True, logits=258 * 7).keeps(batch)  # its head takes parts
    lm.gradient_checkpointing_enable()
    assert not Scorer(lm, True).keeps(batch)
    lm.gradient_checkpointing_disable()
    # prompts and no rejected answers: the lower level is the whole batch
    alike = collate([Pair(p.prompt, p.chosen, ()) for p in random_pairs(8)], PAD_ID)
    parts = Scorer(lm, True).smaller(alike)
    assert not Scorer(lm, True).keeps(alike) and 1 < len(parts) <= 8
    assert sum(map(len, parts)) == 8


def test_a_model_that_hides_the_tree_from_its_attention_is_padded(caplog):
    made = policy("llama", dtype="float32")
    inner = made.lm.model.layers[0].self_attn
    forward = inner.forward

    def deaf(*args, tree=None, **kwargs):
        return forward(*args, **kwargs)

    inner.forward = deaf
    with caplog.at_level("INFO"):
        scorer = scorer_for(made.lm, 30, share=True)
    assert "Batches are padded, not packed" in caplog.text
    assert not scorer.packs and scorer.shared
    inner.forward = forward
    pairs = random_pairs(3)
    expected = torch.cat([slow_logps(made.lm, pair) for pair in pairs])
    torch.testing.assert_close(scorer(collate(pairs, PAD_ID)).logps, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize(
    "dtype, size, packs",
    [
        ("float32", 1e-4, True),
        ("float32", 0.08, False),
        ("bfloat16", 0.08, True),  # what many layers do to single tokens in half precision
        ("bfloat16", 0.3, False),
    ],
)
def test_rounding_alone_does_not_refuse_packing(monkeypatch, dtype, size, packs):
    plain = Scorer.apart

    def rounded(self, batch):
        found = plain(self, batch)
        return replace(found, logps=found.logps + size * torch.arange(len(found.logps)).cos())

    monkeypatch.setattr(Scorer, "apart", rounded)
    assert scorer_for(policy("llama", dtype=dtype).lm, 60, share=True).packs == packs


@pytest.mark.parametrize("size, packs", [(0.23, True), (1.0, False)])
def test_a_response_of_two_tokens_may_scatter_in_half_precision(monkeypatch, size, packs):
    """SmolLM2 in bfloat16: .226 nats a token over two, .06 over the rest of the probe."""
    plain = Scorer.apart

    def rounded(self, batch):
        found = plain(self, batch)
        short = (found.lengths == 2).flatten()
        of = torch.repeat_interleave(short, found.lengths.flatten().long())
        return replace(found, logps=found.logps + size * of)

    monkeypatch.setattr(Scorer, "apart", rounded)
    assert scorer_for(policy("llama", dtype="bfloat16").lm, 60, share=True).packs == packs


@pytest.mark.parametrize("window", [3, 64])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_soft_capped_attention_is_packed_though_sdpa_has_none(monkeypatch, calls, cap, window):
    in_float64(monkeypatch)
    lm = policy("gemma2", sliding_window=window, attn_logit_softcapping=cap).lm
    scorer = scorer_for(lm, 30, share=True)
    check(lm)
    assert scorer.packs and scorer.shared
    pairs = [*random_pairs(5, longest=12), *SAME]
    weights = torch.linspace(-1, 1, sum(len(p.chosen + p.rejected) for p in pairs)).double()
    lm.set_attn_implementation("eager")  # transformers' own definition
    slow = torch.cat([slow_logps(lm, pair) for pair in pairs])
    (slow * weights).sum().backward()
    expected = gradients(lm)
    lm.set_attn_implementation(attention.IMPLEMENTATION)
    batch = collate(pairs, PAD_ID)
    for around in (nullcontext(), MathKernel()):
        lm.zero_grad()
        with around:
            found = scorer(batch).logps
            (found * weights).sum().backward()
        torch.testing.assert_close(found, slow, rtol=0, atol=1e-10)
        for name, value in gradients(lm).items():
            torch.testing.assert_close(value, expected[name], rtol=1e-9, atol=1e-10)
    # what has no tree, a generation too, is capped as well
    torch.testing.assert_close(scorer.apart(batch).logps, slow, rtol=0, atol=1e-10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_that_mixes_tokens_otherwise_is_padded(caplog, dtype):
    """Like a convolution or a recurrence: right in rows of their own, wrong in a packed one."""
    made = policy("llama", dtype=dtype)
    mlp = made.lm.model.layers[0].mlp
    forward = mlp.forward
    mlp.forward = lambda x: forward(x + 0.5 * x.roll(1, dims=1).cumsum(1))
    with caplog.at_level("INFO"):
        scorer = scorer_for(made.lm, 30, share=True)
    assert "a probe differs" in caplog.text and "Separate forwards" in caplog.text
    assert not scorer.packs and not scorer.shared


def test_a_reference_is_read_as_the_policy_is():
    """The policy's probe refused to pack: its reference, never probed, must not be packed."""
    policy_lm, reference = policy("llama").lm, policy("llama", seed=1).lm
    policy_lm.set_attn_implementation("sdpa")
    judge = as_read_by(Scorer(policy_lm, False, logits=99), reference)
    assert not judge.packs and not judge.shared and judge.logits == 99


def test_the_head_is_checked_before_packing_is():
    made = policy("llama", dtype="float32")
    inner = made.lm.model.layers[0].self_attn
    forward = inner.forward
    inner.forward = lambda *args, tree=None, **kwargs: forward(*args, **kwargs)
    check(made.lm)  # the model hides the tree from its attention, and its head is right


def test_generation_is_that_of_sdpa():
    made, other = policy("llama-grouped"), policy("llama-grouped", attention="sdpa")
    assert made.lm.config._attn_implementation == attention.IMPLEMENTATION
    ids = torch.tensor([[257, 257, 5], [1, 2, 3]])
    how = {"attention_mask": (ids != 257).long(), "max_new_tokens": 8, "do_sample": False}
    assert made.lm.generate(ids, **how).equal(other.lm.generate(ids, **how))
    one = torch.tensor([[3]])
    assert made.lm.generate(one, max_new_tokens=4).equal(other.lm.generate(one, max_new_tokens=4))


# -- microbatches


@given(st.lists(st.integers(2, 600), min_size=1, max_size=64), st.integers(2, 4000))
def test_microbatches_by_tokens(sizes, limit):
    parts = by_tokens(sizes, limit)
    assert sorted(place for part in parts for place in part) == list(range(len(sizes)))
    loads = [sum(sizes[place] for place in part) for part in parts]
    assert all(load <= limit or len(part) == 1 for load, part in zip(loads, parts))
    # near-equal: moving the lightest row of the fullest microbatch would not even them out
    if max(loads) <= limit:
        fullest = parts[loads.index(max(loads))]
        assert max(loads) - min(loads) <= max(sizes[place] for place in fullest)


def test_microbatches_by_pairs():
    assert by_pairs([9] * 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]


@pytest.mark.parametrize("solver", ["none", "penalty"])
def test_tokens_per_batch_trains_as_one_batch_does(monkeypatch, solver):
    in_float64(monkeypatch)
    chosen = objective("loss=dpo", f"solver={solver}")
    found = []
    for how in ({"micro": 8}, {"micro": 8, "tokens": 60}, {"micro": 8, "tokens": 1}):
        fit = fitted(policy(), chosen, steps=3, **how)
        found.append(snapshot(fit.module))
    for other in found[1:]:
        for name, value in found[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-10)
