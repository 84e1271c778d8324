"""Our log-probabilities and ten steps of each loss against TRL 1.16's own, on real pairs and
weights."""

import math
from functools import partial
from pathlib import Path

import peer
import pytest
import torch
from fitting import fitted, objective, scored
from sources import facts
from test_peers import SAME

from spo_lightning import losses
from spo_lightning.data.batch import draws
from spo_lightning.data.encode import encode_pairs
from spo_lightning.data.tasks.gsm8k import gsm8k
from spo_lightning.models import policy as policies
from spo_lightning.models.scorer import reference_logps

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL, DATA = SHARED / "models/stories260k", SHARED / "data/gsm8k"
LENGTH, BETA, STEPS, SIZE, LR, CLIP = 512, 0.1, 10, 4, 3e-5, 1.0

pytestmark = pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")


def opened():
    return policies.load(
        pretrained=str(MODEL),
        revision=None,
        trust_remote_code=False,
        dtype="float32",
        attention="sdpa",
        config={},
        seed=0,
    )


@pytest.fixture(scope="module")
def rows():
    """100 pairs of gsm8k, short ones, so that neither side cuts any."""
    task = gsm8k(
        path=str(DATA),
        eval_path=None,
        eval_fraction=0.1,
        max_rows=800,
        seed=0,
        ground_truth=False,
    )
    tokenizer = opened().tokenizer
    kept = [row for row in task.train if whole(row, tokenizer)]
    assert len(kept) >= 100, len(kept)
    return kept[:100]


def whole(row, tokenizer):
    found = [len(tokenizer(row["prompt"] + row[side])["input_ids"]) for side in SIDES]
    return max(found) < 260 and row["chosen"] != row["rejected"]


SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def encoded(rows):
    found = encode_pairs(
        rows,
        opened().tokenizer,
        max_length=LENGTH,
        on_mismatch="split",
        strict=True,
        scored="assistant",
        where="gsm8k",
    )
    assert found.counts["kept"] == 100 and found.counts["truncated"] == 0
    return found.pairs


def trl_trainer(rows, directory, loss_type="sigmoid", **more):
    """TRL's trainer over ``rows`` in the given order."""
    trl = peer.trl()
    from datasets import Dataset

    policy = opened()
    settings = trl.DPOConfig(
        output_dir=str(directory),
        beta=BETA,
        loss_type=[loss_type],
        max_length=LENGTH,
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        adam_beta1=0.9,
        adam_beta2=0.999,
        adam_epsilon=1e-8,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
        **more,
    )
    columns = [{name: row[name] for name in ("prompt", *SIDES)} for row in rows]
    return peer.in_order(trl.DPOTrainer)(
        model=policy.lm,
        ref_model=opened().lm,
        args=settings,
        train_dataset=Dataset.from_list(columns),
        processing_class=policy.tokenizer,
    )


def test_log_probabilities_equal_trls(rows, encoded, tmp_path):
    trainer = trl_trainer(rows, tmp_path)
    theirs = []
    for start in range(0, 100, 10):
        some = [trainer.train_dataset[i] for i in range(start, start + 10)]
        inputs = trainer.data_collator(some)
        with torch.no_grad():
            theirs.append(torch.stack(trainer.compute_ref_log_probs(trainer.model, inputs), 1))
    given = scored(opened().lm, encoded)
    ours = reference_logps(given.batch(range(100))).sums
    torch.testing.assert_close(ours, torch.cat(theirs), rtol=1e-6, atol=0)


def test_values_at_the_start(encoded):
    given = scored(opened().lm, encoded)
    for name, options, expected in (
        ("dpo", {"label_smoothing": 0.0}, math.log(2)),
        ("ipo", {}, 1 / (4 * BETA**2)),
        ("ipo_norm", {}, 1 / (4 * BETA**2)),
    ):
        fit = fitted(
            opened(),
            (partial(getattr(losses, name), beta=BETA, **options), objective()[1], BETA),
            given,
            steps=1,
            batch_size=SIZE,
            micro=2,
        )
        first = fit.numbers[0]
        # ipo's slope is 1 / beta per nat: rounding of 1e-5 nats in a margin shows tenfold
        assert first["train/loss"] == pytest.approx(expected, abs=1e-5 if name == "dpo" else 1e-3)
        assert abs(first["train/rewards/margins"]) < 1e-5


SEEN = ("dpo",)  # the others are of the same kinds, and take minutes together


@pytest.mark.parametrize(
    ("theirs", "name", "keys", "settings"),
    [
        pytest.param(*case, marks=[] if case[1] in SEEN else [pytest.mark.slow], id=case[1])
        for case in SAME
    ],
)
def test_a_trajectory_equals_trls(theirs, name, keys, settings, rows, encoded, tmp_path):
    steps = draws(100, SIZE, 0, 0)
    order = [row for _ in range(STEPS) for row in next(steps)]
    trainer = trl_trainer([rows[i] for i in order], tmp_path, theirs, **settings)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    made, whole = opened(), facts(name)[1]
    words = [f"loss.{key}={value}" for key, value in {"beta": BETA, **keys}.items()]
    fit = fitted(
        made,
        objective(f"loss={name}", *words, "solver=none"),
        scored(made.lm, encoded),
        steps=STEPS,
        batch_size=SIZE,
        micro=SIZE if whole else 2,
        whole_batch=whole,
        clip_norm=CLIP,
        optimizer=partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
    )
    assert len(logged) == len(fit.numbers) == STEPS
    for key, tolerance in (
        ("loss", 1e-4),
        ("rewards/chosen", 1e-3),
        ("rewards/margins", 1e-3),
        ("grad_norm", 1e-2),
        ("logps/chosen", 1e-2),
    ):
        mine, its = [row[f"train/{key}"] for row in fit.numbers], [row[key] for row in logged]
        off = max(abs(a - b) / max(1, abs(b)) for a, b in zip(mine, its, strict=True))
        print(f"{name} {key}: {off:.1e} in {STEPS} steps, from {mine[0]:.4f} to {mine[-1]:.4f}")
        assert off < tolerance, key  # of numbers above 1 as a share of them
    assert max(abs(row["rewards/margins"]) for row in logged) > 0.02  # it has moved
    assert [row["train/num_tokens"] for row in fit.numbers] == [
        row["num_tokens"] for row in logged
    ]
