"""Losses of single answers: numbers by hand, their own steps, and TRL's beside them."""

import random
from dataclasses import replace
from functools import partial

import peer
import pytest
import torch
from fitting import SOLVERS, Watch, fitted, objective, scored, snapshot
from pairs import pairs
from sources import HALF, built
from test_trl import MODEL, opened
from tiny import policy, random_pairs, slow_logps

from spo_lightning import losses
from spo_lightning.data.batch import Pair, draws
from spo_lightning.data.sets import mismatched
from spo_lightning.losses import Moments, balanced
from spo_lightning.models.logps import PairLogps

NAMES = ("kto", "bco", "apo_zero_unpaired")
# what a desirable answer with s = 1 and an undesirable one with s = -1 cost
BY_HAND = {
    "kto": (0.487502604, 0.462570155),
    "bco": (0.653946967, 0.634946102),  # the mean of beta s is .02
    "apo_zero_unpaired": (0.475020813, 0.475020813),
}


def single(sums, good):
    """Rows of one answer each, of four tokens."""
    slot = torch.arange(len(sums)).repeat_interleave(4)
    logps = (torch.tensor(sums, dtype=torch.float64) / 4).repeat_interleave(4)
    return PairLogps(logps, slot, ~torch.tensor(good)[slot], len(sums))


def value(name, policy, reference, kl=0.5, ratio=0.2, **keys):
    moved, moments = torch.tensor(kl), Moments(0.0, 1.0, ratio=ratio)
    return losses.evaluate(built(name, **keys), policy, reference, moments, kl=moved)


@pytest.mark.parametrize("name", NAMES)
def test_by_hand(name):
    good = [True, False]
    found = value(name, single([-4.0, -7.0], good), single([-5.0, -6.0], good), beta=0.1)
    assert found.tolist() == pytest.approx(BY_HAND[name], abs=1e-9)
    both = value(name, pairs(-4.0, -7.0, 2, 4), pairs(-5.0, -6.0, 2, 4), beta=0.1)
    assert both.item() == pytest.approx(sum(BY_HAND[name]) / 2, abs=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_a_row_has_the_loss_of_its_own_label(name):
    sums, shift = torch.linspace(-9.0, -2.0, 6).tolist(), [0.5, -1.0, 2.0, 0.1, -0.4, 1.1]
    policy = [a + b for a, b in zip(sums, shift)]
    mixed = [True, False, False, True, True, False]
    whole = value(name, single(policy, mixed), single(sums, mixed))
    for label in (True, False):
        alone = value(name, single(policy, [label] * 6), single(sums, [label] * 6))
        assert alone.isfinite().all()
        for place in (n for n, own in enumerate(mixed) if own is label):
            assert whole[place].item() == alone[place].item()


@pytest.mark.parametrize(
    "labels, given, expected, told",
    [
        ((3, 3), (None, None), (1.0, 1.0), "3 desirable rows and 3 undesirable ones, which weigh"),
        ((4, 3), (None, None), (1.0, 1.0), "so 1.33 to 1"),
        ((2, 10), (None, None), (5.0, 1.0), "weigh 5 and 1 each and so 1 to 1"),
        ((10, 2), (None, None), (1.0, 3.75), "weigh 1 and 3.75 each and so 1.33 to 1"),
        ((10, 2), (0.5, None), (0.5, 1.875), "so 1.33 to 1"),
        ((10, 2), (None, 1.0), (4 / 15, 1.0), "so 1.33 to 1"),
        ((10, 2), (1.0, 1.0), (1.0, 1.0), "so 5 to 1 (1 to 1.33 is usual)"),
        ((4, 0), (None, None), (1.0, 1.0), "4 desirable rows and 0 undesirable ones"),
    ],
)
def test_weights_that_follow_from_the_counts(labels, given, expected, told):
    keys = dict(zip(("desirable_weight", "undesirable_weight"), given))
    loss, said = balanced(built("kto", **keys), [True] * labels[0] + [False] * labels[1])
    found = [loss.keywords[name] for name in keys]
    assert found == pytest.approx(expected) and told in said and "\n" not in said


def test_mismatched_rows_are_a_cyclic_shift():
    one = Pair((1, 2), (3, 4, 5), (), chosen_context=(1, 2))
    other = Pair((6,), (), (7, 8))
    both = Pair((9,), (10,), (11,))
    found = mismatched([one, other, both], max_length=3)
    assert [(p.prompt, p.chosen, p.rejected) for p in found] == [
        *(((1, 2), (11,), ()), ((6,), (3, 4), ()), ((9,), (7, 8), ()), ((9,), (10,), ()))
    ]
    assert [p.chosen_context for p in found] == [(), (1, 2), (), ()]
    assert mismatched([one], max_length=9) == []


def answers(count=12, good=(0, 3, 5, 8, 9)):
    """Ragged rows of one answer each."""
    return [
        replace(p, rejected=()) if n in good else replace(p, chosen=())
        for n, p in enumerate(random_pairs(count))
    ]


def fits(name, solver, rows, **how):
    made = policy("gpt2")
    given = scored(made.lm, rows, shift=lambda number, r: 0.03 if number % 2 else -0.02)
    return fitted(made, objective(f"loss={name}", *SOLVERS[solver]), given, **how)


SEEN = [("kto", "penalty", (0, 3, 5, 8, 9)), ("kto", "unrolled", (4, 7)), ("bco", "mean", (4, 7))]
MORE = [("kto", solver, good) for solver in SOLVERS for good in ((0, 3, 5, 8, 9), (4, 7))]


@pytest.mark.parametrize(
    "name, solver, good",
    [
        *SEEN,
        *(pytest.param(*one, marks=pytest.mark.slow) for one in MORE if one not in SEEN),
    ],
)
def test_accumulation_changes_nothing(name, solver, good):
    """Microbatches of one row have one label; of two good rows some outer steps have none."""
    rows, found = answers(good=good), []
    for micro in (4, 1, 3):
        found.append(fits(name, solver, rows, steps=4, batch_size=4, micro=micro))
    whole = found[0]
    for other in found[1:]:
        for mine, theirs in zip(whole.numbers, other.numbers, strict=True):
            assert mine.keys() == theirs.keys()
            for key, number in mine.items():
                assert theirs[key] == pytest.approx(number, rel=1e-9, abs=1e-9), key
        for key, number in snapshot(whole.module).items():
            torch.testing.assert_close(snapshot(other.module)[key], number, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("good", [(), tuple(range(12)), (1, 2)])
def test_labels_that_are_missing_leave_all_finite(name, good):
    fit = fits(name, "penalty", answers(good=good), steps=3, batch_size=4, micro=2)
    for row in fit.numbers:
        assert all(torch.tensor(number).isfinite() for number in row.values()), row
        assert ("train/rewards/chosen" in row) or ("train/rewards/rejected" in row)
        assert ("train/kl" in row) == (name == "kto")
    assert good or not any("train/nll/chosen" in row for row in fit.numbers)


class ByHand:
    """The steps of a loss in plain PyTorch: rows, their draws, forwards of one answer each."""

    def __init__(self, name, rows, beta, lr):
        self.name, self.rows, self.beta = name, rows, beta
        self.lm, self.start = policy("gpt2").lm, policy("gpt2").lm
        self.optimizer = torch.optim.SGD(self.lm.parameters(), lr=lr)
        self.seen = []

    def ratio(self, pair):
        return slow_logps(self.lm, pair).sum() - slow_logps(self.start, pair).sum().detach()

    def step(self, places):
        some = [self.rows[place] for place in places]
        ratios = torch.stack([self.ratio(pair) for pair in some])
        with torch.no_grad():
            others = [self.ratio(pair) for pair in mismatched(some, 512)]
        kl = max(0.0, float(sum(others)) / len(others))
        mean = self.beta * sum(self.seen) / max(1, len(self.seen))
        found = []
        for pair, ratio in zip(some, ratios):
            sign = 1.0 if pair.chosen else -1.0
            found.append(
                1 - torch.sigmoid(sign * self.beta * (ratio - kl))
                if self.name == "kto"
                else torch.log1p(torch.exp(-sign * (self.beta * ratio - mean)))
            )
        loss = torch.stack(found).mean()
        self.seen += ratios.tolist()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item(), kl


@pytest.mark.parametrize("name", ["kto", "bco"])
def test_a_trajectory_by_hand(name):
    rows, beta, lr = answers(), 0.5, 0.05
    slow, order = ByHand(name, rows, beta, lr), draws(12, 4, 0, 0)
    expected = [slow.step(next(order)) for _ in range(5)]
    made, watch = policy("gpt2"), Watch()
    chosen = objective(f"loss={name}", f"loss.beta={beta}", "solver=none")
    sgd = partial(torch.optim.SGD, lr=lr)
    how = {"steps": 5, "batch_size": 4, "micro": 2, "optimizer": sgd, "watch": watch}
    fitted(made, chosen, scored(made.lm, rows), **how)
    assert [row["train/loss"] for row in watch.numbers] == pytest.approx(
        [loss for loss, _ in expected], abs=1e-9
    )
    if name == "kto":
        moved = [row["train/kl"] for row in watch.numbers]
        assert moved == pytest.approx([kl for _, kl in expected], abs=1e-9) and max(moved) > 0.1
    for mine, theirs in zip(made.lm.parameters(), slow.lm.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_by_central_differences(name):
    good, reference = [True, False, False], single([-5.0, -6.0, -3.0], [True, False, False])

    def of_policy(sums):
        slot = torch.arange(3)
        mine = PairLogps(sums, slot, ~torch.tensor(good), 3)
        return losses.evaluate(built(name), mine, reference, HALF, kl=torch.tensor(0.3))

    at = torch.tensor([-4.0, -7.0, -2.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(of_policy, at)


STEPS, SIZE, LR = 10, 4, 3e-3


def trl_trainer(rows, directory, loss_type):
    """TRL's KTO trainer over ``rows`` in the given order."""
    trl = peer.trl()
    from datasets import Dataset

    how = {"bf16": False, "use_cpu": True, "report_to": [], "disable_tqdm": True}
    how |= {"lr_scheduler_type": "constant", "weight_decay": 0.0, "max_grad_norm": 1.0}
    how |= {"gradient_checkpointing": False, "logging_steps": 1, "save_strategy": "no"}
    how |= {"learning_rate": LR, "per_device_train_batch_size": SIZE, "max_steps": STEPS}
    settings = trl.KTOConfig(str(directory), loss_type=loss_type, max_length=512, **how)
    made = opened()
    return trl.KTOTrainer(
        model=made.lm,
        ref_model=opened().lm,
        args=settings,
        train_dataset=Dataset.from_list(rows),
        processing_class=made.tokenizer,
    )


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_a_trajectory_equals_trls(name, tmp_path):
    from spo_lightning.data.encode import encode_pairs
    from spo_lightning.data.labels import on_its_side

    chance, words = (
        random.Random(0),
        ["the", "cat", "a", "dog", "ran", "sat", "on", "mat", "big", "red"],
    )
    rows = [
        {"prompt": " ".join(chance.choices(words, k=5)), "label": chance.random() < 0.8}
        | {"completion": " " + " ".join(chance.choices(words, k=chance.randint(2, 9)))}
        for _ in range(24)
    ]
    steps = draws(24, SIZE, 0, 0)
    order = [row for _ in range(STEPS) for row in next(steps)]
    trainer = trl_trainer([rows[place] for place in order], tmp_path, name)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    made = opened()
    how = {"on_mismatch": "split", "strict": True, "scored": "assistant", "where": "rows"}
    mine = map(on_its_side, rows)
    encoded = encode_pairs([*mine], made.tokenizer, max_length=512, **how).pairs
    weights = ("loss.desirable_weight=1", "loss.undesirable_weight=1")
    fit = fitted(
        made,
        objective(f"loss={name}", *weights, "loss.beta=0.1", "solver=none"),
        scored(made.lm, encoded),
        steps=STEPS,
        batch_size=SIZE,
        micro=2,
        clip_norm=1.0,
        optimizer=partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    )
    names = ["loss", *(["kl"] if name == "kto" else []), "rewards/chosen", "rewards/rejected"]
    for key in names:
        theirs = [row.get(key) for row in logged]
        found = [row.get(f"train/{key}") for row in fit.numbers]
        known = [(a, b) for a, b in zip(found, theirs) if None not in (a, b)]
        off = max(abs(a - b) for a, b in known)
        print(f"{name} {key}: {off:.1e} in {len(known)} steps, last {known[-1][0]:.4f}")
        assert off < 1e-4 if key == "loss" else off < 1e-3, key
        assert len(known) >= STEPS // 2
    assert abs(fit.numbers[-1]["train/loss"] - 0.5) > 0.01  # it has moved
    assert name != "kto" or fit.numbers[-1]["train/kl"] > 1
