"""The module driven through Lightning: batches, counters, rates, clipping, failure, memory."""

import copy
import gc
import math
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from fitting import SOLVERS, Watch, fitted, objective, scored, snapshot
from lightning import Callback
from tiny import in_float64, lora, policy, random_pairs, slow_logps

from spo_lightning.data.batch import draws
from spo_lightning.errors import Diverged
from spo_lightning.models.scorer import Scorer
from spo_lightning.solvers import Step, Terms
from spo_lightning.training.callbacks.start import StartCheck
from spo_lightning.training.fit import Schedule

DPO = ("loss=dpo", "solver=none")
LOSSES = ("dpo", "simpo", "sft", "alpha_dpo")


USUAL = ("none", "penalty", "softplus", "linear", "mean", "ramp", "unrolled")
PAIRED = [(s, "dpo") for s in SOLVERS] + [(s, loss) for s in USUAL for loss in LOSSES[1:]]
# each way a step is made, and each loss once; how they go together is slow
FEW = [(s, "dpo") for s in ("none", "penalty", "inner", "unrolled")]
FEW += [("penalty", loss) for loss in LOSSES[1:]]


@pytest.mark.parametrize(
    ("solver", "loss"),
    [pytest.param(*two, marks=[] if two in FEW else [pytest.mark.slow]) for two in PAIRED],
)
def test_accumulation_changes_nothing(solver, loss):
    found = []
    for micro in (8, 1, 4, 3):
        made = policy("gpt2")
        chosen = objective(f"loss={loss}", *SOLVERS[solver])
        # at policy = reference rounding would decide on which side of a hinge a pair is
        given = scored(made.lm, shift=lambda number, r: 0.03 if number % 2 else -0.02)
        found.append(fitted(made, chosen, given, steps=4, micro=micro))
    whole = found[0]
    for other in found[1:]:
        for mine, theirs in zip(whole.numbers, other.numbers, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                assert theirs[name] == pytest.approx(value, rel=1e-10, abs=1e-10), name
        for name, value in snapshot(whole.module).items():
            moved = snapshot(other.module)[name]
            torch.testing.assert_close(moved, value, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("solver", SOLVERS)
def test_one_optimizer_step_per_batch_and_parameters_move_on_each(solver, adapters):
    made = lora(policy()) if adapters else policy()
    start = {n: p.detach().clone() for n, p in made.module.named_parameters()}
    watch = Watch(keep=True)
    fit = fitted(made, objective("loss=dpo", *SOLVERS[solver]), steps=4, watch=watch)
    assert fit.module.outer_step == fit.trainer.global_step == len(watch.rates) == 4
    assert fit.module.pairs_seen == 32
    first, second = watch.parameters[:2]
    moved = {name for name in first if not first[name].equal(second[name])}
    assert moved == first.keys()
    for name, value in made.module.named_parameters():
        assert value.equal(start[name]) == (not value.requires_grad), name


@pytest.mark.parametrize("warmup, rise", [(0.0, []), (0.3, [1 / 3, 2 / 3, 1.0])])
@pytest.mark.parametrize("shape", ["constant", "linear", "cosine"])
def test_the_learning_rate_follows_its_curve(shape, warmup, rise):
    steps, lr = 10, 0.02
    fit = fitted(
        policy("gpt2"),
        objective(*DPO),
        steps=steps,
        batch_size=2,
        optimizer=partial(torch.optim.SGD, lr=lr),
        schedule=Schedule(shape, steps, warmup),
    )
    left = steps - len(rise)
    curve = {
        "constant": [1.0] * left,
        "linear": [1 - n / left for n in range(left)],
        "cosine": [(1 + math.cos(math.pi * n / left)) / 2 for n in range(left)],
    }[shape]
    expected = pytest.approx([lr * share for share in rise + curve], rel=1e-12)
    assert fit.watch.rates == expected
    assert [row["train/learning_rate"] for row in fit.numbers] == expected


def test_clipping_scales_the_direction_and_reports_the_norm_before():
    def moved(clip_norm):
        made = policy()
        start = [p.detach().clone() for p in made.lm.parameters()]
        optimizer = partial(torch.optim.SGD, lr=1.0)
        fit = fitted(made, objective(*DPO), steps=1, clip_norm=clip_norm, optimizer=optimizer)
        change = [p.detach() - s for p, s in zip(made.lm.parameters(), start)]
        return fit.numbers[0]["train/grad_norm"], torch.cat([c.flatten() for c in change])

    norm, free = moved(None)
    assert free.norm().item() == pytest.approx(norm, rel=1e-10)
    for clip_norm in (norm / 3, norm * 3):
        reported, change = moved(clip_norm)
        assert reported == pytest.approx(norm, rel=1e-12)
        # torch divides by the norm plus 1e-6
        scale = min(1.0, clip_norm / (norm + 1e-6))
        torch.testing.assert_close(change, scale * free, rtol=1e-9, atol=1e-12)


def solvers_that_see_the_upper_level():
    usual = ("none", "penalty", "inner", "unrolled", "implicit", "coin")
    for name in SOLVERS:
        if name != "gap":  # here it takes every step but the first on the lower level
            yield pytest.param(name, marks=[] if name in usual else [pytest.mark.slow])


@pytest.mark.parametrize("where", ["value", "gradient"])
@pytest.mark.parametrize("solver", solvers_that_see_the_upper_level())
def test_a_loss_that_is_not_finite_stops_and_leaves_the_parameters(solver, where):
    class Breaking(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            self.before = snapshot(module)
            self.step, self.broken = module.outer_step, module.outer_step >= 2

    breaking = Breaking()
    dpo, built, beta = objective("loss=dpo", *SOLVERS[solver])

    def loss(policy, reference):
        value = dpo(policy, reference)
        if not breaking.broken:
            return value
        # sqrt at 0: the value is finite, its slope is not
        return value * math.nan if where == "value" else value + (value - value.detach()).sqrt()

    made = policy()
    with pytest.raises(Diverged) as caught:
        fitted(made, (loss, built, beta), steps=9, micro=3, callbacks=[breaking])
    # a whole step for the lower level alone does not see it
    assert breaking.step == 2 or solver == "coin"
    order = draws(12, 8, 0, breaking.step)
    rows = ", ".join(str(row) for row in next(order))
    assert f"rows of this batch: {rows}." in str(caught.value)
    assert f"outer step {breaking.step + 1}:" in str(caught.value)
    for name, value in Scorer(made.lm, True).named_parameters():
        assert value.equal(breaking.before[name]), name


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_start_check_knows_the_reference_from_another(family, adapters, dtype):
    def run(given):
        check = StartCheck(given, seed=0, size=8, half=False, precision=nullcontext)
        return fitted(made, objective(*DPO), given, steps=1, callbacks=[check])

    made = policy(family, dtype=dtype)
    made = lora(made) if adapters else made
    fresh = scored(made.lm)
    fit = run(fresh)
    # ln 2 within 0.69314 to 0.69316
    assert 0.69314 < fit.numbers[0]["train/loss"] < 0.69316
    assert abs(fit.numbers[0]["train/rewards/margins"]) < 1e-5
    with pytest.raises(RuntimeError, match="at step 0 the policy should be the reference"):
        run(scored(made.lm, shift=lambda number, r: 0.05 * torch.arange(len(r)) / len(r)))


def lengths_of_a_run():
    few = ("unrolled",)
    yield from ((solver, 200) for solver in few)
    yield from (pytest.param(solver, 500, marks=pytest.mark.slow) for solver in SOLVERS)


@pytest.mark.parametrize(("solver", "steps"), lengths_of_a_run())
@pytest.mark.slow
def test_memory_is_flat(solver, steps):
    class Count(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if module.outer_step in (20, (20 + steps) // 2, steps):
                gc.collect()
                alive = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
                self.counts.append((len(alive), sum(x.numel() for x in alive)))

    count = Count()
    count.counts = []
    made = policy("llama", num_hidden_layers=1)
    given = scored(made.lm, random_pairs(8, longest=3))
    chosen = objective("loss=alpha_dpo", *SOLVERS[solver])
    # two pairs, of always the same shapes
    same = type(given)(given.pairs[:2], given.references[:2], given.pad_id)
    fitted(
        made,
        chosen,
        same,
        steps=steps,
        batch_size=2,
        micro=1,
        optimizer=partial(torch.optim.Adam, lr=1e-4),
        callbacks=[count],
    )
    assert len(count.counts) == 3 and len(set(count.counts)) == 1, count.counts


def test_unrolled_ends_where_two_steps_by_hand_end(monkeypatch):
    in_float64(monkeypatch)
    lower_lr, lr = 0.05, 0.03
    made = policy()
    hand, given = copy.deepcopy(made.lm), scored(made.lm)
    dpo, _, beta = objective(*DPO)
    chosen = objective(
        "loss=dpo", "solver=unrolled", "solver.steps=1", f"solver.lower_lr={lower_lr}"
    )
    optimizer = partial(torch.optim.SGD, lr=lr)
    fit = fitted(made, chosen, given, steps=1, micro=3, optimizer=optimizer)
    rows = next(draws(12, 8, 0, 0))

    def descend(value, rate):
        slopes = torch.autograd.grad(value, list(hand.parameters()))
        with torch.no_grad():
            for p, slope in zip(hand.parameters(), slopes):
                p -= rate * slope
        return math.sqrt(sum(slope.square().sum().item() for slope in slopes))

    def sums(lm):  # [8, 2]
        both = []
        for row in rows:
            pair = given.pairs[row]
            both.append(torch.stack([s.sum() for s in halves(slow_logps(lm, pair), pair)]))
        return torch.stack(both)

    def halves(logps, pair):
        return logps[: len(pair.chosen)], logps[len(pair.chosen) :]

    lengths = torch.tensor([len(given.pairs[row].chosen) for row in rows])
    with torch.no_grad():
        reference = sums(hand)
    descend((-sums(hand)[:, 0] / lengths).mean(), lower_lr)
    gap = (sums(hand) - reference) @ torch.tensor([1.0, -1.0], dtype=torch.float64)
    norm = descend(torch.nn.functional.softplus(-beta * gap).mean(), lr)
    assert fit.numbers[0]["train/grad_norm"] == pytest.approx(norm, rel=1e-10)
    for mine, theirs in zip(made.lm.parameters(), hand.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-10)


def test_looking_ahead_restores_the_parameters_bit_for_bit():
    class Look:
        """Takes gradients elsewhere, then stays where it is."""

        def init(self, theta):
            return {}

        def step(self, problem, state):
            before = [t.detach().clone() for t in problem.theta]
            ahead = tuple(t.detach() * 1.1 + 1e-9 for t in problem.theta)
            here = problem.gradient(self.lower, problem.theta)
            away = problem.gradient(self.lower, ahead)
            assert not all(a.equal(b) for a, b in zip(here.direction, away.direction))
            assert all(t.equal(b) for t, b in zip(problem.theta, before))
            again = problem.gradient(self.lower, problem.theta)
            assert all(a.equal(b) for a, b in zip(here.direction, again.direction))
            # values at another theta, by functional call, agree with values there
            torch.testing.assert_close(
                problem.lower(ahead).mean(), away.means["lower"], rtol=1e-10, atol=0
            )
            return Step(tuple(torch.zeros_like(t) for t in before), None, state, {})

        def lower(self, part):
            lower = part.lower(part.theta)
            return Terms((lower,), {"lower": lower.detach()})

    made = policy()
    start = [p.detach().clone() for p in made.lm.parameters()]
    loss, _, beta = objective(*DPO)
    fitted(made, (loss, Look(), beta), steps=2, micro=3)
    assert all(p.equal(s) for p, s in zip(made.lm.parameters(), start))


@pytest.mark.parametrize("loss", LOSSES)
def test_penalty_of_weight_zero_is_no_solver_bitwise(loss):
    plain, priced = (
        fitted(
            policy(dtype="float32"),
            objective(f"loss={loss}", *solver),
            steps=5,
            micro=3,
            optimizer=partial(torch.optim.AdamW, lr=1e-2),
            clip_norm=1.0,
        )
        for solver in (["solver=none"], ["solver=penalty", "solver.weight=0"])
    )
    for name, value in snapshot(plain.module).items():
        assert value.equal(snapshot(priced.module)[name]), name
    for mine, theirs in zip(plain.numbers, priced.numbers):
        assert mine == {name: theirs[name] for name in mine}


def test_what_is_logged_equals_hand_computation():
    """DPO with the hinge active on some pairs, from sums of the slow loop."""
    weight, beta = 0.7, 0.3
    made = policy()
    # the reference finds odd pairs better than the policy does, and even ones worse
    given = scored(made.lm, shift=lambda number, r: 0.2 if number % 2 else -0.1)
    chosen = objective(
        "loss=dpo", f"loss.beta={beta}", "solver=penalty", f"solver.weight={weight}"
    )
    with torch.no_grad():
        before = [slow_logps(made.lm, pair) for pair in given.pairs]
    fit = fitted(made, chosen, given, steps=1, micro=3)
    rows = next(draws(12, 8, 0, 0))
    upper, price, added, plain, fell, tokens, moved, nll = 0.0, 0.0, 0.0, 0.0, 0, 0, 0.0, 0.0
    for row in rows:
        pair, mine = given.pairs[row], before[row]
        n = len(pair.chosen)
        shift = 0.2 if row % 2 else -0.1
        margin = beta * (-shift * n + shift * len(pair.rejected))
        violation = shift  # nats per token, of G - V
        upper += math.log1p(math.exp(-margin))
        price += weight * beta * n * max(0.0, violation)
        added += n * weight * beta * (violation > 0)
        plain += n * beta / (1 + math.exp(margin))
        fell += violation > 0
        moved += -shift * n
        nll -= mine[:n].sum().item()
        tokens += n
    numbers = fit.numbers[0]
    expected = {
        "loss/upper": upper / 8,
        "loss": (upper + price) / 8,
        "solver/slope_ratio": added / plain,
        "solver/active": fell / 8,
        "solver/weight": weight,
        "displacement/rate": fell / 8,
        "displacement/chosen": moved / 8,
        "rewards/chosen": beta * moved / 8,
        "nll/chosen": nll / tokens,
        "loss/lower": sum(
            -before[row][: len(given.pairs[row].chosen)].mean().item() for row in rows
        )
        / 8,
        "num_tokens": sum(
            2 * len(given.pairs[r].prompt) + len(given.pairs[r].chosen + given.pairs[r].rejected)
            for r in rows
        ),
    }
    assert 0 < fell < 8
    for name, value in expected.items():
        assert numbers[f"train/{name}"] == pytest.approx(value, rel=1e-6), name
