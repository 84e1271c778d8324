"""The losses that TRL 1.16 has, against its own trainers: values and gradients, token by token."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import yaml
from pairs import CONF, random_lengths, random_sums
from sources import built, node, of_sums, value
from torch import nn

from spo_lightning import losses
from spo_lightning.models.scorer import PairLogps


class Table(nn.Module):
    """A language model whose log-probabilities are given: row i of the batch reads row i."""

    def __init__(self, logps, squares):
        super().__init__()
        self.logps, self.squares = nn.Parameter(logps), squares

    def forward(self, input_ids, labels=None, **_):
        logps = self.logps.masked_fill(labels[:, 1:] == -100, 0.0)
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps,
            entropy=zeros,
            mean_logits=zeros,
            is_top1=zeros.bool(),
            log_sum_sq_probs=self.squares,
        )


@pytest.fixture(scope="module")
def trl_parts():
    """A tiny model, a tokenizer and one row: enough to build TRL's real trainers offline."""
    pytest.importorskip("trl")
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", "a", "b", "c", "d"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    shape = dict(n_layer=1, n_head=1, n_embd=8, n_positions=64, vocab_size=len(words))
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**shape, bos_token_id=1, eos_token_id=1, pad_token_id=0))
    rows = Dataset.from_list([{"prompt": "a b", "chosen": "c d", "rejected": "d"}])
    return SimpleNamespace(model=model, tokenizer=tokenizer, rows=rows)


def build(trainer, config, parts, folder, **knobs):
    args = config(
        output_dir=str(folder), report_to=[], use_cpu=True, bf16=False, save_strategy="no", **knobs
    )
    return trainer(
        model=parts.model, args=args, train_dataset=parts.rows, processing_class=parts.tokenizer
    )


@pytest.fixture(scope="module")
def dpo_trainer(trl_parts, tmp_path_factory):
    """TRL's DPOTrainer; what its loss reads of its settings is set anew for every comparison."""
    from trl import DPOConfig, DPOTrainer

    where = tmp_path_factory.mktemp("dpo")
    return build(DPOTrainer, DPOConfig, trl_parts, where, precompute_ref_log_probs=True)


def drawn(seed, dtype):
    """A batch of pairs, token by token: log-probabilities under policy and reference [2, B, T]."""
    seeded = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 12, (2, PAIRS), generator=seeded)
    inside = torch.arange(int(lengths.max())) < lengths[..., None]
    policy, reference, squares = (
        -(0.01 + 3 * torch.rand(inside.shape, generator=seeded, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    )
    return inside, policy * inside, reference * inside, squares * inside


def ours(inside, policy, reference, squares):
    """The same as PairLogps of policy and reference."""
    kept = inside.transpose(0, 1)  # pair by pair, chosen before rejected
    pair, side, _ = kept.nonzero(as_tuple=True)
    both = [
        PairLogps(table.transpose(0, 1)[kept], pair, side == 1, PAIRS)
        for table in (policy, reference)
    ]
    return replace(both[0], squares=squares.transpose(0, 1)[kept]), both[1]


def trl_loss(trainer, inside, policy, reference, squares, *, ld_alpha, **settings):
    for name, setting in {"ld_alpha": ld_alpha, **settings}.items():
        assert hasattr(trainer, name), name
        setattr(trainer, name, setting)
    mask = torch.nn.functional.pad(inside.flatten(0, 1).long(), (1, 0))  # one token of prompt
    kept = reference
    if ld_alpha is not None:  # the trainer has these sums from its cache
        past = torch.arange(inside.shape[-1]) >= inside.sum(-1).amin(0)[:, None]
        kept = torch.where(past, ld_alpha * reference, reference)
    sums = kept.sum(-1)
    inputs = {
        "input_ids": torch.full_like(mask, 3),
        "attention_mask": torch.ones_like(mask),
        "completion_mask": mask,
        "ref_chosen_logps": sums[0],
        "ref_rejected_logps": sums[1],
    }
    table = Table(policy.flatten(0, 1), squares.flatten(0, 1))
    loss = trainer.compute_loss(table, inputs)
    if settings["use_weighting"] and settings["loss_types"] == ["hinge"]:
        return loss.detach(), None  # it weighs in place what relu keeps for its gradient
    (along,) = torch.autograd.grad(loss, table.logps)
    return loss.detach(), along.view_as(policy)


def differences(trainer, name, keys, dtype=torch.float64, **settings):
    """Largest difference of values and of gradients over 50 batches; of numbers above 1 as a share
    of them."""
    loss, worst = built(name, **keys), [0.0, 0.0]
    for seed in range(50):
        inside, policy, reference, squares = tables = drawn(seed, dtype)
        theirs, slopes = trl_loss(trainer, *tables, **DEFAULTS | settings)
        policy.requires_grad_()
        found = losses.evaluate(loss, *ours(*tables), None).mean()
        (along,) = torch.autograd.grad(found, policy)
        if theirs.isnan():  # discopop's 0 * inf
            assert found.isfinite() and along.isfinite().all()
            continue
        both = (found.detach(), theirs), (along, along if slopes is None else slopes)
        for place, (mine, its) in enumerate(both):
            off = (mine - its.to(dtype)).abs() / its.abs().clamp(min=1)
            worst[place] = max(worst[place], off.max().item())
    return worst


def divergence(kind, **keys):
    target = yaml.safe_load((CONF / f"loss/divergence/{kind}.yaml").read_text())["_target_"]
    return {"divergence": (("_target_", target), ("_partial_", True), *keys.items())}


PAIRS, BETA = 4, 0.3
DEFAULTS = dict(
    **dict(beta=BETA, label_smoothing=0.0, loss_types=["sigmoid"], loss_weights=[1.0]),
    **dict(f_divergence_type="reverse_kl", f_alpha_divergence_coef=0.5, use_weighting=False),
    ld_alpha=None,
)
# TRL's name, ours, keys, settings of TRL's
SAME = [
    ("sigmoid", "dpo", {}, {}),
    ("sigmoid_norm", "sigmoid_norm", {}, {}),
    ("hinge", "hinge", {}, {}),
    ("ipo", "ipo_norm", {}, {}),
    ("exo_pair", "exo_pair", {"label_smoothing": 0.1}, {"label_smoothing": 0.1}),
    ("nca_pair", "nca_pair", {}, {}),
    ("robust", "robust", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("bco_pair", "bco_pair", {}, {}),
    ("sppo_hard", "sppo_hard", {}, {}),
    ("aot", "aot", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("aot_unpaired", "aot_unpaired", {"label_smoothing": 0.2}, {"label_smoothing": 0.2}),
    ("apo_zero", "apo_zero", {}, {}),
    ("apo_down", "apo_down", {}, {}),
    ("discopop", "discopop", {"tau": 0.05}, {}),
]
# what stands around a loss: our keys, TRL's settings
AROUND = {
    "nothing": ({}, {}),
    "ld_alpha": ({"ld_alpha": 0.4}, {"ld_alpha": 0.4}),
    "wpo": ({"wpo": True}, {"use_weighting": True}),
    "forward_kl": (divergence("forward_kl"), {"f_divergence_type": "forward_kl"}),
    "js": (divergence("js"), {"f_divergence_type": "js_divergence"}),
    "alpha": (divergence("alpha", coefficient=0.5), {"f_divergence_type": "alpha_divergence"}),
}
# a loss that has not the key in its yaml cannot have it around
CASES = [
    (around, *case)
    for around, (keys, _) in AROUND.items()
    for case in SAME
    if {*keys} <= {*node(case[1])}
]


def beside_trl(trainer, around, theirs, name, keys, settings):
    """The largest differences from one of TRL's losses, and how large they may be."""
    mine, its = AROUND[around]
    # TRL has the alpha-divergence in float32 alone
    dtype, most = (torch.float32, 2e-5) if around == "alpha" else (torch.float64, 1e-6)
    how = {"loss_types": [theirs], **settings, **its}
    return differences(trainer, name, {"beta": BETA, **keys, **mine}, dtype, **how), most


@pytest.mark.parametrize(("around", "theirs", "name", "keys", "settings"), CASES)
def test_as_trl_dpo_trainer(around, theirs, name, keys, settings, dpo_trainer):
    found, most = beside_trl(dpo_trainer, around, theirs, name, keys, settings)
    assert max(found) < most


def test_what_can_stand_around_which_loss():
    """AOT weighs no pairs, means per token shorten none, divergences are of margins alone."""
    counts = Counter(around for around, *_ in CASES)
    scored = dict.fromkeys(("forward_kl", "js", "alpha"), 7)
    assert counts == {"nothing": 14, "ld_alpha": 12, "wpo": 12, **scored}


def test_as_trl_mixes(dpo_trainer):
    """TRL's MPO; its SFT is the token mean of the microbatch, ours of each pair: here of one."""
    parts = {"dpo": {"weight": 0.8, "beta": BETA}, "bco_pair": {"weight": 0.2, "beta": BETA}}
    parts["sft"] = {"weight": 0.0}
    mixed = {"loss_types": ["sigmoid", "bco_pair"], "loss_weights": [0.8, 0.2]}
    assert max(differences(dpo_trainer, "mixture", {"parts": freeze(parts)}, **mixed)) < 1e-6


def freeze(parts):
    return tuple((name, tuple(keys.items())) for name, keys in parts.items())


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_as_trl_cpo_trainer_preference_term(loss_type, trl_parts, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    knobs = dict(loss_type=loss_type, beta=0.7, simpo_gamma=0.35)
    trainer = build(CPOTrainer, CPOConfig, trl_parts, tmp_path, **knobs)
    lengths = random_lengths(200, seed=11)
    policy = random_sums(lengths, seed=12)
    mine = (
        of_both("cpo", policy, lengths, beta=0.7, alpha=0.0)
        if loss_type == "sigmoid"
        else of_both("simpo", policy, lengths, beta=0.7, gamma_beta_ratio=0.5)
    )
    given = policy if loss_type == "sigmoid" else policy / lengths
    torch.testing.assert_close(mine, trainer.cpo_loss(*given.T)[0], rtol=1e-6, atol=1e-6)


def test_as_trl_orpo_trainer_preference_term(trl_parts, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = build(ORPOTrainer, ORPOConfig, trl_parts, tmp_path, beta=0.7)
    lengths = random_lengths(200, seed=11)
    policy = random_sums(lengths, seed=12)
    mine = of_both("orpo", policy, lengths, beta=0.7)
    plain = of_both("orpo", policy, lengths, beta=0.0)
    theirs = -trainer.odds_ratio_loss(*(policy / lengths).T)[0].double()
    # TRL works in float32 here
    torch.testing.assert_close(mine - plain, theirs, rtol=1e-6, atol=1e-6)


def of_both(name, sums, lengths, **keys):
    """Of a loss that needs no reference."""
    return value(name, of_sums(sums, lengths), None, **keys)


def one_pair(seed):
    """Prompt-free responses for CPO and ORPO: their SFT terms then cover the response alone."""
    seeded = torch.Generator().manual_seed(seed)
    n = torch.randint(2, 12, (2,), generator=seeded).tolist()
    ids = [torch.randint(3, 7, (1, 1 + k), generator=seeded) for k in n]
    batch = {}
    for side, row in zip(("chosen", "rejected"), ids):
        batch[f"{side}_input_ids"], batch[f"{side}_attention_mask"] = row, torch.ones_like(row)
        batch[f"{side}_labels"] = row.clone()
        batch[f"{side}_labels"][:, 0] = -100  # the prompt is one token
    return n, ids, batch


@pytest.mark.parametrize("name", ["cpo", "orpo"])
def test_as_trl_totals_of_one_pair(name, trl_parts, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer, config = {"cpo": (CPOTrainer, CPOConfig), "orpo": (ORPOTrainer, ORPOConfig)}[name]
    extra = dict(loss_type="sigmoid", cpo_alpha=0.8) if name == "cpo" else {}
    built = build(trainer, config, trl_parts, tmp_path, beta=0.7, **extra)
    model = trl_parts.model.double().eval()
    for seed in range(200):
        n, ids, batch = one_pair(seed)
        with torch.no_grad():
            theirs, _ = built.get_batch_loss_metrics(model, batch)
            logps = [model(row).logits.log_softmax(-1)[:, :-1] for row in ids]
        sums = [lp.gather(2, row[:, 1:, None]).sum() for lp, row in zip(logps, ids)]
        knobs = dict(beta=0.7, alpha=0.8) if name == "cpo" else dict(beta=0.7)
        (mine,) = of_both(name, torch.stack(sums)[None], torch.tensor([n]), **knobs)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)
