"""A reward model's training against TRL 1.16's RewardTrainer: the same weights, rows and steps."""

from functools import partial

import peer
import pytest
import torch
from fitting import fitted, objective
from tiny import policy

from spo_lightning.data.batch import draws
from spo_lightning.data.encode import encode_pairs
from spo_lightning.data.sets import Pairs
from spo_lightning.models.policy import to_rewards
from spo_lightning.models.rewards import to_reward
from spo_lightning.models.sharing import scorer_for

STEPS, SIZE, LR, CLIP = 12, 4, 3e-3, 1.0
ROWS = [
    {
        "prompt": f"{a}+{b}=",
        "chosen": f"{a + b}" + "." * (a % 3),
        "rejected": f"{a - b}!" + "?" * (b % 4),
        "margin": 0.25 * (1 + a % 4),
    }
    for a in range(5)
    for b in range(1, 5)
]


def rewarding(padding):
    """A reward model in float32, whose padding is a token of its own or the end mark."""
    made = policy("llama", dtype="float32")
    made.tokenizer.pad_token = padding
    return to_rewards(made, seed=0)


def encoded(made):
    how = {"max_length": 64, "on_mismatch": "split", "strict": True, "scored": "assistant"}
    return encode_pairs(ROWS, made.tokenizer, where="rows", **how).pairs


def trl_trainer(made, rows, directory, coefficient):
    trl = peer.trl()
    from datasets import Dataset

    made.lm.set_attn_implementation("sdpa")
    settings = trl.RewardConfig(
        output_dir=str(directory),
        center_rewards_coefficient=coefficient,
        max_length=64,
        max_steps=STEPS,
        per_device_train_batch_size=SIZE,
        learning_rate=LR,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=CLIP,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    given = {"model": made.lm, "args": settings, "processing_class": made.tokenizer}
    return peer.in_order(trl.RewardTrainer)(train_dataset=Dataset.from_list(rows), **given)


@pytest.mark.parametrize(
    ("padding", "margin", "coefficient"),
    [("<pad>", True, 0.01), ("<pad>", False, None), ("</s>", True, 0.01)],
)
def test_a_trajectory_equals_trls(tmp_path, padding, margin, coefficient):
    made = rewarding(padding)
    pairs = encoded(made)
    assert [pair.row for pair in pairs] == list(range(len(ROWS)))
    steps = draws(len(pairs), SIZE, 0, 0)
    order = [row for _ in range(STEPS) for row in next(steps)]
    kept = ["prompt", "chosen", "rejected", *(["margin"] if margin else [])]
    rows = [{name: ROWS[row][name] for name in kept} for row in order]
    trainer = trl_trainer(rewarding(padding), rows, tmp_path, coefficient)
    trainer.train()
    logged = [row for row in trainer.state.log_history if "loss" in row]
    scorer = scorer_for(made.lm, longest=100, share=True)
    assert scorer.packs
    fit = fitted(
        made,
        objective(
            "loss=reward",
            f"loss.margin={str(margin).lower()}",
            f"loss.center_rewards_coefficient={coefficient or 0.0}",
        ),
        to_reward(Pairs(pairs, None, made.tokenizer.pad_token_id), made.lm),
        steps=STEPS,
        batch_size=SIZE,
        micro=2,
        clip_norm=CLIP,
        optimizer=partial(torch.optim.AdamW, lr=LR, weight_decay=0.0),
        scorer=scorer,
    )
    assert len(logged) == len(fit.numbers) == STEPS
    for ours, theirs in (
        ("loss", "loss"),
        ("rewards/margins", "margin"),
        ("rewards/accuracies", "accuracy"),
        ("grad_norm", "grad_norm"),
    ):
        mine = [row[f"train/{ours}"] for row in fit.numbers]
        assert mine == pytest.approx([row[theirs] for row in logged], rel=1e-3, abs=1e-4), ours
    mine = [row["train/loss"] for row in fit.numbers]
    assert min(mine) < 0.8 * mine[0]  # it has moved
