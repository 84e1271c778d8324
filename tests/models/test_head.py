"""The head read in blocks of the vocabulary, beside autograd through all logits."""

from contextlib import nullcontext

import pytest
import torch
from tiny import gradients, policy, random_pairs, slow_logps
from torch import nn

from spo_lightning.data.batch import collate
from spo_lightning.models import head as head_module
from spo_lightning.models import policy as policies
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.head import fused_logps, is_plain, logits_of, plain_logps
from spo_lightning.models.scorer import Scorer

PAD_ID = 257


def head_and_tokens(vocabulary, *, dtype=torch.float64):
    seeded = torch.Generator().manual_seed(0)
    head = nn.Linear(7, vocabulary, bias=False, dtype=torch.float64)
    hidden = 3 * torch.randn(11, 7, generator=seeded, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(5 * torch.randn(vocabulary, 7, generator=seeded).double())
        hidden[0] = 800 * head.weight[0] / head.weight[0].norm()  # exponentials would be infinite
    hidden = hidden.to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (11,), generator=seeded)
    weights = torch.randn(11, generator=seeded, dtype=torch.float64)
    return head.to(dtype), hidden, targets, weights


def by_autograd(head, hidden, targets, weights, cap):
    found = plain_logps(logits_of(head, hidden, cap), targets)
    return found, torch.autograd.grad((found * weights).sum(), (hidden, head.weight))


@pytest.mark.parametrize("cap", [None, 4.0])
@pytest.mark.parametrize("most", [2**28, 11, 700], ids=["kept", "a_column", "again"])
@pytest.mark.parametrize("vocabulary", [5, 3000])
def test_the_fused_head_equals_log_softmax(monkeypatch, vocabulary, most, cap):
    monkeypatch.setitem(head_module.BLOCK, "cpu", 11 * 64)  # several blocks, the last one short
    head, hidden, targets, weights = head_and_tokens(vocabulary)
    expected, slopes = by_autograd(head, hidden, targets, weights, cap)
    whole = logits_of(head, hidden, cap).log_softmax(1).gather(1, targets[:, None]).squeeze(1)
    torch.testing.assert_close(expected, whole, rtol=1e-13, atol=1e-12)
    found = fused_logps(head, hidden, targets, cap, most)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-12)
    for _ in range(2):  # the graph may be walked twice
        own = torch.autograd.grad(
            (found * weights).sum(), (hidden, head.weight), retain_graph=True
        )
        torch.testing.assert_close(own, slopes, rtol=1e-11, atol=1e-12)
    with torch.no_grad():
        torch.testing.assert_close(fused_logps(head, hidden, targets, cap, most), expected)


def test_many_blocks_add_no_error(monkeypatch):
    """A large batch leaves few columns a block, so that a vocabulary is read in hundreds."""
    monkeypatch.setitem(head_module.BLOCK, "cpu", 11 * 64)
    seeded = torch.Generator().manual_seed(0)
    head = nn.Linear(7, 30_000, bias=False)
    with torch.no_grad():  # every block counts: their sums are alike
        head.weight.copy_(1 + 0.1 * torch.randn(30_000, 7, generator=seeded))
    hidden = 3 + 0.3 * torch.randn(11, 7, generator=seeded)
    targets = torch.randint(30_000, (11,), generator=seeded)
    found = fused_logps(head, hidden, targets, None, 700)
    exact = plain_logps(logits_of(head.double(), hidden.double(), None), targets)
    # float32 has steps of 2e-6 at 30 nats; added up block by block they come to a hundred
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


@pytest.mark.parametrize("most", [2**28, 700], ids=["kept", "again"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_fused_head_in_half_precision_equals_autograd_s(autocast, most):
    dtype = torch.float32 if autocast else torch.bfloat16
    head, hidden, targets, weights = head_and_tokens(3000, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        expected, slopes = by_autograd(head, hidden, targets, weights, None)
        found = fused_logps(head, hidden, targets, None, most)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)
    own = torch.autograd.grad((found * weights).sum(), (hidden, head.weight))
    for one, other in zip(own, slopes, strict=True):
        assert one.dtype == dtype
        assert (one - other).norm() < 0.01 * other.norm()


def test_a_frozen_head_gets_no_slope_and_a_frozen_body_none():
    head, hidden, targets, weights = head_and_tokens(300)
    _, (slope, own) = by_autograd(head, hidden, targets, weights, None)
    head.weight.requires_grad_(False)
    (fused_logps(head, hidden, targets, None, 2**28) * weights).sum().backward()
    torch.testing.assert_close(hidden.grad, slope, rtol=1e-11, atol=1e-12)
    assert head.weight.grad is None
    head.weight.requires_grad_()
    (fused_logps(head, hidden.detach(), targets, None, 2**28) * weights).sum().backward()
    torch.testing.assert_close(head.weight.grad, own, rtol=1e-11, atol=1e-12)


def test_a_second_derivative_of_the_fused_head_is_refused_not_wrong():
    head, hidden, targets, _ = head_and_tokens(4)
    found = fused_logps(head, hidden, targets, None, 2**28)
    (slope,) = torch.autograd.grad(found.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|differentiated twice"):
        slope.sum().backward()


@pytest.mark.parametrize("twice", [False, True], ids=["fused", "plain"])
def test_no_more_logits_are_alive_than_allowed(monkeypatch, twice):
    lm = policy("llama", dtype="float64").lm
    batch = collate(random_pairs(4), PAD_ID)
    count = len(batch.targets)
    ends, sizes = [], []
    plain = head_module._wide

    def counting(logits):
        sizes.append(logits.numel())
        return plain(logits)

    monkeypatch.setattr(head_module, "_wide", counting)
    for most in (2**28, 258 * 7):
        scorer = Scorer(lm, True, logits=most)
        sizes.clear()
        lm.zero_grad()
        with MathKernel() if twice else nullcontext():
            logps = scorer(batch).logps
            (logps * torch.linspace(-1, 1, count)).sum().backward()
        ends.append((logps.detach(), gradients(lm)))
        assert max(sizes) == count * 258 if most == 2**28 else count * 7 < max(sizes) <= most
    (logps, slopes), (few, again) = ends
    torch.testing.assert_close(few, logps, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(again, slopes, rtol=1e-9, atol=1e-12)


def test_a_head_with_an_adapter_is_read_with_it():
    made = policies.adapt(
        policy("llama"), rank=2, alpha=8, targets=["lm_head"], merge=False, seed=0
    )
    head = made.lm.get_output_embeddings()
    assert is_plain(nn.Linear(3, 5, bias=False)) and not is_plain(nn.Linear(3, 5))
    assert not is_plain(head)
    with torch.no_grad():
        for name, value in made.module.named_parameters():
            if "lora_B" in name:  # zero at the start, where the adapter changes nothing
                value.normal_()
    pair = random_pairs(1)[0]
    batch = collate([pair], PAD_ID)
    found, expected = Scorer(made.lm, True)(batch).logps, slow_logps(made.lm, pair)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    with made.start():
        assert (Scorer(made.lm, True)(batch).logps - expected).abs().max() > 0.1
    found.sum().backward()
    assert all(value.abs().max() > 0 for value in gradients(made.module).values())
    assert len(gradients(made.module)) == 2
