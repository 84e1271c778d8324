"""Solvers on Llama, Qwen2 and GPT-2: what the second-order ones need of a real model."""

import pytest
import torch
from conftest import SMALL
from fitting import SOLVERS, config, fitted, objective, snapshot
from lightning import Callback
from safetensors.torch import load_file
from tiny import in_float64, lora, policy

from spo_lightning.models.attention import RECOMPUTED
from spo_lightning.models.scorer import Scorer
from spo_lightning.solvers.products import Automatic, Exact, FiniteDifference
from spo_lightning.train import train
from spo_lightning.training.observation import Observation

FAMILIES = (
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama-grouped", "qwen2")),
    "gpt2",
)
PRODUCTS = {"exact": Exact(), "finite": FiniteDifference(None), "auto": Automatic(None)}
WAYS = {
    "plain": {},
    "adapters": {"adapters": True},
    "padded": {"attention": "sdpa"},
    "eager": {"attention": "eager"},
    "checkpointing": {"checkpointing": True},
    "checkpointing, eager": {"checkpointing": True, "attention": "eager"},
    "checkpointing, adapters": {"checkpointing": True, "adapters": True},
    "chunks": {"rows": 5},
    "all": {"checkpointing": True, "adapters": True, "rows": 5},
}


class Look(Callback):
    """H v of the first batch, along a random v, by every product."""

    def on_train_batch_start(self, trainer, module, batch, index):
        problem = module._problem(batch, Observation(0.1, False, False))
        generator = torch.Generator().manual_seed(1)
        along = tuple(
            torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t)
            for t in problem.theta
        )
        away = tuple(t.detach() + 1e-3 * v for t, v in zip(problem.theta, along))
        self.found = {
            name: torch.cat([h.flatten() for h in product(problem, theta, along)])
            for name, product in PRODUCTS.items()
            for name, theta in ((name, problem.theta), (f"{name}, away", away))
        }


def made_by(family, dtype="float64", adapters=False, checkpointing=False, attention="auto"):
    made = policy(family, dtype=dtype, attention=attention)
    made = lora(made) if adapters else made
    for name, value in made.module.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide half of the Hessian
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
    if checkpointing:
        made.lm.gradient_checkpointing_enable(RECOMPUTED)
    made.lm.train()
    return made


def looked(family, **how):
    look = Look()
    made = made_by(family, **how)
    fitted(
        made, objective("loss=dpo", "solver=none"), steps=1, batch_size=4, micro=3,
        callbacks=[look],
    )  # fmt: skip
    return look.found


def off(one, two):
    return ((one - two).norm() / two.norm()).item()


@pytest.mark.parametrize("family", FAMILIES)
def test_products_agree_whatever_the_model_does(family, monkeypatch):
    in_float64(monkeypatch)
    plain = {}
    for name, how in WAYS.items():
        how = dict(how)
        with monkeypatch.context() as patch:
            if rows := how.pop("rows", None):
                patch.setattr(Scorer, "_rows", lambda self, rows=rows: rows)
            found = looked(family, **how)
        adapters = how.get("adapters", False)
        same = plain.setdefault(adapters, found)
        for place in ("", ", away"):
            exact = found[f"exact{place}"]
            assert exact.norm() > 0
            assert off(found[f"finite{place}"], exact) < 1e-6, (name, place)
            assert found[f"auto{place}"].equal(exact), (name, place)
            assert off(exact, same[f"exact{place}"]) < 1e-10, (name, place)
        assert off(found["exact"], found["exact, away"]) > 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_in_float32(family):
    found = looked(family, dtype="float32")
    assert off(found["finite"], found["exact"]) < 2e-2
    assert off(found["finite, away"], found["exact, away"]) < 2e-2


TRAINED = {  # gamma: wide weights have curvatures of -100
    "second": SOLVERS["second"],
    "implicit": [*SOLVERS["implicit"], "solver.gamma=1e-3", "solver.lower_lr=1e-3"],
    "inner": SOLVERS["inner"],
    "barrier": SOLVERS["barrier"],
}


@pytest.mark.parametrize(
    "solver",
    [
        "second",
        "implicit",
        *(pytest.param(s, marks=pytest.mark.slow) for s in ("inner", "barrier")),
    ],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_activations_and_chunks_train_the_same(family, solver, monkeypatch):
    def trained(rows, **how):
        made = made_by(family, **how)
        with monkeypatch.context() as patch:
            patch.setattr(Scorer, "_rows", lambda self: rows)
            chosen = objective("loss=dpo", *TRAINED[solver])
            fit = fitted(made, chosen, steps=2, batch_size=4, micro=3)
        return snapshot(fit.module)

    in_float64(monkeypatch)
    plain, other = trained(1000), trained(5, checkpointing=True)
    for name, value in plain.items():
        torch.testing.assert_close(other[name], value, rtol=1e-9, atol=1e-10)


def test_a_run_with_recomputed_activations(tmp_path, cache):
    def weights(place, *words):
        second = ("loss=dpo", *SOLVERS["second"], "max_steps=2", "eval.every_n_steps=0")
        cfg = config(*SMALL, *second, "checkpoint.monitor=null", cache, *words)
        train(cfg, tmp_path / place)
        return load_file(tmp_path / place / "model/model.safetensors")

    plain = weights("plain")
    for name, value in weights("less", "hardware.activation_checkpointing=true").items():
        torch.testing.assert_close(value, plain[name], rtol=1e-5, atol=1e-6)
