"""On a CUDA GPU: every way of attention there, and the step, beside the CPU in float64."""

from itertools import product

import pytest
import torch
from fitting import SOLVERS, fitted, objective, snapshot
from fitting import scored as scored_pairs
from tiny import policy, random_pairs

from spo_lightning.data.batch import collate
from spo_lightning.models import attention
from spo_lightning.models.attention import MathKernel
from spo_lightning.models.policy import DTYPES
from spo_lightning.models.scorer import Scorer

# CI has no GPU: whoever has one runs these
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PAD_ID = 257
FAMILIES = ["llama", "llama-grouped", "qwen2", "gpt2", "mistral", "gemma2"]
WAYS = ["auto", "flex", "sdpa", "eager"]
ONLY_EAGER = "gemma2"  # whatever else is asked for
BIG = {"hidden_size": 64, "head_dim": 16, "initializer_range": 0.1}


def made(family, impl, dtype="float64"):
    changes = {"n_embd": 64, "initializer_range": 0.1} if family == "gpt2" else dict(BIG)
    if family in ("mistral", "gemma2"):
        changes |= {"sliding_window": 7}
    if family == "gemma2":
        changes |= {"query_pre_attn_scalar": 16}
    # the same weights in every type
    drawn = policy(family, attention=impl, dtype="float32", **changes).lm
    return drawn.to(DTYPES[dtype])


def batches():
    """Of many sizes, so that a kernel compiled for one must do for another."""
    pairs = [random_pairs(count, seed=count, longest=40) for count in (1, 3, 6, 9)]
    return [collate([*some, some[0]], PAD_ID) for some in pairs]


def scored(lm, batch, *, apart=False):
    scorer = Scorer(lm, True)
    lm.zero_grad()
    logps = (scorer.apart(batch) if apart else scorer(batch)).logps
    weights = torch.linspace(-1, 1, len(batch.targets)).to(logps)
    (logps * weights).sum().backward()
    slopes = [p.grad.double().cpu().flatten() for p in lm.parameters() if p.grad is not None]
    return logps.detach().double().cpu(), torch.cat(slopes)


@pytest.mark.parametrize(
    "family, impl", [(f, w) for f, w in product(FAMILIES, WAYS) if f != ONLY_EAGER or w == "eager"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_there_equals_the_cpu(family, impl, dtype):
    exact = made(family, "eager")
    lm = made(family, impl, dtype=dtype).cuda()
    windowed = family in ("mistral", "gemma2") and impl in ("sdpa", "eager")
    limit = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    for batch in batches():
        logps, slope = scored(exact, batch, apart=True)
        found, own = scored(lm, batch.to("cuda"), apart=windowed)
        assert (found - logps).abs().max() < limit
        assert (own - slope).norm() < limit * slope.norm()


def test_half_precision_takes_one_call(monkeypatch):
    called = []
    plain = attention.varlen_attn

    def counting(*args, **kwargs):
        called.append(args[0].dtype)
        return plain(*args, **kwargs)

    monkeypatch.setattr(attention, "varlen_attn", counting)
    batch = collate(random_pairs(5), PAD_ID).to("cuda")
    for dtype, calls in (("float32", 0), ("bfloat16", 2)):
        Scorer(made("llama-grouped", "auto", dtype=dtype).cuda(), True)(batch)
        assert len(called) == calls
    mixed = Scorer(made("llama-grouped", "auto", dtype="float32").cuda(), True)
    with torch.autocast("cuda", torch.bfloat16):
        mixed(batch)
    assert called[2:] == [torch.bfloat16] * 2
    with MathKernel():  # twice differentiable
        Scorer(made("llama-grouped", "auto", dtype="bfloat16").cuda(), True)(batch)
    assert len(called) == 4


@pytest.mark.parametrize("name", SOLVERS)
def test_steps_there_equal_the_cpu(name):
    words = ["loss=dpo", *SOLVERS[name]]
    ends = []

    def moved(number, row):  # nothing stands at zero, where rounding decides
        return 0.3 * torch.cos(number + torch.arange(len(row)).double())

    for where in ("cpu", "gpu"):
        made = policy("llama-grouped")
        given = scored_pairs(made.lm, shift=moved)
        done = fitted(made, objective(*words), given, accelerator=where)
        ends.append((done.numbers, {n: p.cpu() for n, p in snapshot(done.module).items()}))
    (numbers, there), (other, here) = ends
    for one, two in zip(numbers, other, strict=True):
        assert one == pytest.approx(two, rel=1e-4, abs=1e-6)
    for key, value in there.items():
        torch.testing.assert_close(here[key], value, rtol=1e-4, atol=1e-5)
