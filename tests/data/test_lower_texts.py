"""``data.sft``: the lower level has texts of its own, drawn beside the pairs."""

import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, command
from fitting import SOLVERS, Watch, config, fitted, objective, scored, snapshot
from safetensors.torch import load_file
from tiny import in_float64, lora, policy, random_pairs, slow_logps
from torch.nn.functional import softplus

from spo_lightning.config import knobs
from spo_lightning.data.batch import draws
from spo_lightning.data.load import load, load_to_look
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.train import train
from spo_lightning.training.outer_steps import OuterSteps

UNIT = partial(torch.optim.SGD, lr=1.0)  # the step is the direction


def texts(lm, count=7, shift=None):
    """Rows without a rejected side, scored."""
    rows = [replace(pair, rejected=()) for pair in random_pairs(count, seed=9)]
    return scored(lm, rows, shift)


# -- what is drawn


def bare(count, seed):
    pairs = random_pairs(count, seed=seed)
    return Pairs(pairs, [torch.zeros(len(p.chosen) + len(p.rejected)) for p in pairs], 257)


def drawn(*, lower=True, seed=0, start=0, rank=0, world=1, steps=6, size=8, micro=3, count=12):
    """[steps][microbatches] rows of the pairs and of the texts."""
    module = SimpleNamespace(
        trainer=SimpleNamespace(global_rank=rank, world_size=world, max_steps=100),
        batch_size=size,
        outer_step=start,
    )
    own = bare(5, seed=1) if lower else None
    data = iter(OuterSteps(bare(count, 2), module, micro=micro, seed=seed, lower=own))
    items = [next(data) for _ in range(steps)]
    return [
        [(part.rows.tolist(), part.lower and part.lower.rows.tolist()) for part in item]
        for item in items
    ]


def test_as_many_texts_as_pairs_in_an_order_of_their_own():
    found = drawn()
    expected = draws(5, 8, 1, 0)
    for item in found:
        assert [len(rows) for rows, _ in item] == [len(below) for _, below in item] == [3, 3, 2]
        assert [row for _, below in item for row in below] == next(expected)
    assert found == drawn() != drawn(seed=1)
    without = drawn(lower=False)
    assert [[rows for rows, _ in item] for item in found] == [
        [rows for rows, below in item if below is None] for item in without
    ]


def test_a_run_goes_on_with_the_texts_where_it_stopped():
    assert drawn(start=4, steps=2) == drawn()[4:]


def test_ranks_share_the_texts_of_a_step():
    for step, whole in enumerate(drawn()):
        shares = [drawn(rank=rank, world=2)[step] for rank in (0, 1)]
        for side in (0, 1):
            merged = [row for share in shares for part in share for row in part[side]]
            assert sorted(merged) == sorted(row for part in whole for row in part[side])
        assert all(len(rows) == len(below) for share in shares for rows, below in share)


# -- what is made of them


def by_hand(lm, given, own, parameters, *, beta, weight, unit):
    """grad F(pairs) + weight * scale * grad G(texts), by direct autograd."""
    rows, below = next(draws(len(given), 8, 0, 0)), next(draws(len(own), 8, 1, 0))
    upper, lower = [], []
    for row in rows:
        pair, before = given.pairs[row], given.references[row]
        gap = slow_logps(lm, pair) - before
        margin = gap[: len(pair.chosen)].sum() - gap[len(pair.chosen) :].sum()
        upper.append(softplus(-beta * margin))
    for row in below:
        text = own.pairs[row]
        scale = beta * len(text.chosen) if unit == "sequence" else 1.0
        lower.append(-scale * slow_logps(lm, text).mean())
    total = torch.stack(upper).mean() + weight * torch.stack(lower).mean()
    return torch.autograd.grad(total, parameters)


@pytest.mark.parametrize(
    ("adapters", "unit", "micro"),
    [(False, "sequence", 3), (False, "token", 8), (True, "sequence", 8), (True, "token", 3)],
)
def test_the_direction_is_grad_f_of_pairs_and_grad_g_of_texts(monkeypatch, adapters, unit, micro):
    in_float64(monkeypatch)
    made = lora(policy()) if adapters else policy()
    for name, value in made.module.named_parameters():
        if "lora_B" in name:  # zero at the start, which would hide lora_A's gradient
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(1))
    given = scored(made.lm, shift=lambda number, r: 0.1 if number % 2 else -0.2)
    own = texts(made.lm)
    parameters = [p for p in made.module.parameters() if p.requires_grad]
    expected = by_hand(made.lm, given, own, parameters, beta=0.3, weight=0.7, unit=unit)
    start = [p.detach().clone() for p in parameters]
    chosen = objective(
        "loss=dpo", "loss.beta=0.3", "solver=penalty", "solver/phi=linear", "solver.weight=0.7",
        f"solver.unit={unit}",
    )  # fmt: skip
    fit = fitted(made, chosen, given, steps=1, micro=micro, optimizer=UNIT, lower=own)
    assert len(fit.module.trainable()) == len(parameters)
    for value, before, slope in zip(parameters, start, expected, strict=True):
        assert slope.norm() > 0
        torch.testing.assert_close(before - value.detach(), slope, rtol=1e-9, atol=1e-11)


def test_v_and_the_numbers_are_those_of_the_texts():
    """The hinge, active on the texts that the reference knows better; all by hand."""
    weight, beta = 0.7, 0.3
    made = policy()
    given = scored(made.lm)
    own = texts(made.lm, shift=lambda number, r: 0.2 if number % 2 else -0.1)
    with torch.no_grad():
        mine = [slow_logps(made.lm, text).mean().item() for text in own.pairs]
    chosen = objective(
        "loss=dpo", f"loss.beta={beta}", "solver=penalty", f"solver.weight={weight}"
    )
    fit = fitted(made, chosen, given, steps=1, micro=3, lower=own)
    rows, below = next(draws(12, 8, 0, 0)), next(draws(7, 8, 1, 0))
    odd = [row for row in below if row % 2]
    sizes = {row: len(own.pairs[row].chosen) for row in below}
    pairs = [given.pairs[row] for row in rows]
    # DPO's own slope at policy = reference is beta / 2 per token
    expected = {
        "solver/active": len(odd) / 8,
        "solver/value": sum(-own.references[row].mean().item() for row in below) / 8,
        "solver/violation": sum(0.2 if row % 2 else -0.1 for row in below) / 8,
        "loss/lower": sum(-mine[row] for row in below) / 8,
        "loss/upper": 0.6931471805599453,
        "loss": 0.6931471805599453 + sum(weight * beta * sizes[row] * 0.2 for row in odd) / 8,
        "solver/slope_ratio": sum(weight * beta * sizes[row] for row in odd)
        / sum(beta / 2 * len(pair.chosen) for pair in pairs),
        "displacement/rate": 0.0,
        "num_tokens": sum(2 * len(p.prompt) + len(p.chosen) + len(p.rejected) for p in pairs)
        + sum(len(own.pairs[row]) for row in below),
    }
    assert 0 < len(odd) < 8
    for name, value in expected.items():
        found = fit.numbers[0][f"train/{name}"]
        assert found == pytest.approx(value, rel=1e-6, abs=1e-12), name


KINDS = ("linear", "inner", "second", "gap")
MORE = ("barrier", "unrolled", "implicit", "coin")


@pytest.mark.parametrize(
    "solver", [*KINDS, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
)
def test_accumulation_changes_nothing_with_texts(solver):
    found = []
    for micro in (8, 3):
        made = policy("gpt2", n_layer=1)
        given = scored(made.lm, shift=lambda number, r: 0.03 if number % 2 else -0.02)
        own = texts(made.lm, shift=lambda number, r: 0.02 if number % 2 else -0.03)
        chosen = objective("loss=dpo", *SOLVERS[solver])
        found.append(fitted(made, chosen, given, steps=3, micro=micro, lower=own))
    one, two = found
    for mine, theirs in zip(one.numbers, two.numbers, strict=True):
        assert mine == {name: pytest.approx(v, rel=1e-9, abs=1e-9) for name, v in theirs.items()}
    for name, value in snapshot(one.module).items():
        torch.testing.assert_close(snapshot(two.module)[name], value, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", ["coin", "unrolled", "inner"])
def test_only_adapters_move(solver):
    made = lora(policy())
    start = {n: p.detach().clone() for n, p in made.module.named_parameters()}
    own, watch = texts(made.lm), Watch(keep=True)
    fitted(made, objective("loss=dpo", *SOLVERS[solver]), steps=3, watch=watch, lower=own)
    first, second = watch.parameters[:2]
    assert all(not first[name].equal(second[name]) for name in first)
    for name, value in made.module.named_parameters():
        assert value.equal(start[name]) == (not value.requires_grad), name


# -- through a whole run

RUN = (*SMALL, "loss=dpo", "solver=penalty", "solver/phi=linear", "max_steps=3")
RUN = (*RUN, "eval.every_n_steps=0", "checkpoint.monitor=null", "eval.max_rows=4")


def weights(place, *words):
    numbers = train(config(*words), place)
    assert numbers["steps"] == 3
    return load_file(place / "model/model.safetensors")


def same(one, two):
    return all(one[name].equal(two[name]) for name in one)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_own_is_a_file_of_the_same_rows_and_not_the_chosen(tmp_path, cache):
    path = write(tmp_path / "own.jsonl", load(config(*RUN).data).sft)
    chosen = weights(tmp_path / "null", *RUN, cache)
    own = weights(tmp_path / "own", *RUN, cache, "data.sft=own")
    read = weights(tmp_path / "file", *RUN, cache, f"data.sft={path}")
    assert same(own, read) and not same(own, chosen)


def test_pairs_and_mixtures_train_with_texts(tmp_path):
    small = [word for word in RUN if not word.startswith(("data", "sft"))]
    rows = [{"prompt": f"{n}+1=", "chosen": "4", "rejected": "55"} for n in range(30)]
    pairs = write(tmp_path / "pairs.jsonl", rows)
    sft = write(tmp_path / "sft.jsonl", [{"prompt": "1", "completion": f"{n}"} for n in range(5)])
    given = [*small, "data=pairs", f"data.path={pairs}", f"cache.dir={tmp_path}"]
    own = weights(tmp_path / "one", *given, f"data.sft={sft}")
    assert not same(own, weights(tmp_path / "two", *given))
    mixed = [f"data.sources.{part}.{key}" for part in ("short", "long") for key in SIZES]
    given = [*small, "data=mixture", *mixed, "sft.max_steps=2", f"cache.dir={tmp_path}"]
    own = weights(tmp_path / "three", *given, "data.sft=own")
    assert not same(own, weights(tmp_path / "four", *given))


SIZES = ("sft_rows=20", "prompts=16", "eval_prompts=4")


@pytest.mark.slow
def test_the_command_draws_them_and_inspect_counts_them(tmp_path, cache):
    given = (*SMALL, cache, "data.sft=own", "max_steps=2", "hydra.run.dir=run")
    done = command(tmp_path, *given)
    assert (done.code, done.err) == (0, "")
    assert "Texts (lower level): kept 32 of 32" in done.out
    looked = [word for word in SMALL if word.startswith("data")]
    done = command(tmp_path, *looked, "data.sft=own", module=("-m", "spo_lightning.inspect"))
    assert (done.code, done.err) == (0, "")
    assert "lower-level rows 32" in done.out


@pytest.mark.parametrize(
    ("words", "idle"),
    [
        (["data=slips", "data.sft=own", "loss=spo"], False),
        (["data=slips", "data.sft=own", "loss=dpo"], True),
        (["data=slips", "data.sft=own", "loss=spo", "max_steps=0"], True),
        (["data=slips", "data.sft=null", "loss=dpo"], False),
        (["data=slips", "data.sft_rows=5", "loss=dpo"], False),
        # the file is what the warm start reads
        (["data=pairs", "data.sft=a.jsonl", "loss=dpo", "sft.max_steps=5"], False),
        (["data=pairs", "data.sft=a.jsonl", "loss=dpo"], True),
        (["data=pairs", "data.sft=a.jsonl", "loss=dpo", "model.pretrained=x"], True),
    ],
)
def test_texts_that_nothing_reads_are_refused(words, idle):
    groups = [word for word in words if word.split("=")[0] in ("data", "loss")]
    touched = [word.split("=")[0] for word in words]
    line = knobs.Given(touched, {"data": "", "loss": ""}, config(*groups))
    if not idle:
        knobs.check(config(*words), line)
        return
    with pytest.raises(UserError, match="data.sft has no effect: no lower level reads it"):
        knobs.check(config(*words), line)


def test_a_command_that_trains_nothing_leaves_the_texts_unread(tmp_path):
    node = config("data=slips", f"data.sft={tmp_path / 'absent.jsonl'}").data
    assert not load_to_look(node).lower
    with pytest.raises(UserError, match="absent.jsonl"):
        load(node)
