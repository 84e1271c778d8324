"""Each loss against hand-worked numbers, an independent rewrite, finite differences and TRL."""

import inspect
import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF, pairs, random_lengths, random_sums
from torch import nn

from spo_lightning import losses
from spo_lightning.losses import Moments

# l_w, l_l = -4, -7; r_w, r_l = -5, -6; n_w, n_l = 2, 4
LENGTHS = (2, 4)
REFERENCE = pairs(-5.0, -6.0, *LENGTHS)
HALF = Moments(0.5, 0.25)

# name, hyper-parameters, value, d value / d l_w (None: not given there)
BY_HAND = [
    ("dpo", dict(beta=0.1, label_smoothing=0.0), 0.598138869, -0.045016600),
    ("dpo", dict(beta=0.1, label_smoothing=0.1), 0.618138869, None),
    ("ipo", dict(beta=0.1), 9.0, -6.0),
    ("ipo_norm", dict(beta=0.1), 18.0625, -4.25),
    ("hinge", dict(beta=0.05), 0.9, -0.05),
    ("hinge", dict(beta=0.1), 0.8, -0.1),
    ("sft", dict(beta=0.1), 2.0, -0.5),
    ("simpo", dict(beta=2.0, gamma_beta_ratio=0.5), 1.701413278, -0.817574476),
    ("simpo", dict(beta=2.5, gamma_beta_ratio=0.55), 2.126928011, None),
    ("cpo", dict(beta=0.1, alpha=1.0), 2.554355244, -0.542555748),
    ("orpo", dict(beta=0.1), 2.085175748, None),
    ("dpop", dict(beta=0.3, dpop_lambda=50.0), 0.437487950, -0.106303108),
    ("rdpo", dict(beta=0.1, alpha=0.05), 0.644396660, -0.047502081),
    ("rpo", dict(beta=0.01, eta=0.005), 0.683397180, None),
    ("cal_dpo", dict(beta=0.1, coefficient=0.5), 16.126928011, None),
    ("alpha_dpo", dict(beta=10.0, gamma_beta_ratio=0.4, alpha=0.05), 7.000911466, -4.995444744),
    ("alpha_dpo", dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2), 2.694936200, None),
    ("alpha_dpo", dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.0), 2.237822279, None),
]

KNOBS = {
    "sft": dict(beta=0.3),
    "dpo": dict(beta=0.3, label_smoothing=0.2),
    "ipo": dict(beta=0.3),
    "ipo_norm": dict(beta=0.3),
    "hinge": dict(beta=0.3),
    "simpo": dict(beta=1.7, gamma_beta_ratio=0.4),
    "cpo": dict(beta=0.3, alpha=0.7),
    "orpo": dict(beta=0.6),
    "dpop": dict(beta=0.3, dpop_lambda=3.0),
    "rdpo": dict(beta=0.3, alpha=0.05),
    "rpo": dict(beta=0.3, eta=0.4),
    "cal_dpo": dict(beta=0.3, coefficient=0.7),
    "alpha_dpo": dict(beta=1.7, gamma_beta_ratio=0.4, alpha=0.3),
}


def value(name, chosen, rejected, lengths=LENGTHS, reference=REFERENCE, moments=HALF, **knobs):
    policy = pairs(chosen, rejected, *lengths)
    return losses.evaluate(partial(getattr(losses, name), **knobs), policy, reference, moments)


@pytest.mark.parametrize(("name", "knobs", "expected", "slope"), BY_HAND)
def test_hand_worked(name, knobs, expected, slope):
    chosen = torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    (found,) = value(name, chosen, -7.0, **knobs)
    assert found.item() == pytest.approx(expected, abs=1e-9)
    if slope is not None:
        (along,) = torch.autograd.grad(found, chosen)
        assert along.item() == pytest.approx(slope, abs=1e-9)


def test_dpop_with_a_fallen_chosen_answer():
    chosen = torch.tensor(-5.5, dtype=torch.float64, requires_grad=True)
    (found,) = value("dpop", chosen, -7.0, beta=0.3, dpop_lambda=50.0)
    (along,) = torch.autograd.grad(found, chosen)
    assert found.item() == pytest.approx(7.350642386, abs=1e-9)
    assert along.item() == pytest.approx(-15.290174651, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "knobs", "expected"),
    [
        ("dpo", dict(label_smoothing=0.0), math.log(2)),
        ("dpo", dict(label_smoothing=0.3), math.log(2)),
        ("hinge", {}, 1.0),
        ("ipo", {}, 25.0),
        ("ipo_norm", {}, 25.0),
        ("dpop", dict(dpop_lambda=5.0), math.log(2)),
        ("rpo", dict(eta=0.0), math.log(2)),
        ("cal_dpo", dict(coefficient=0.5), math.log(2) + 25.0),
    ],
)
def test_where_policy_is_reference(name, knobs, expected):
    (found,) = value(name, -5.0, -6.0, beta=0.1, **knobs)
    assert found.item() == pytest.approx(expected, abs=1e-12)


def test_torchtune_case():
    policy = pairs([-0.5, -10.0, -1.0], [-0.1, -30.0, -21.0], [1, 9, 3], [2, 5, 7])
    reference = pairs([-0.5, -10.1, -0.1], [-0.1, -20.1, -0.1], [1, 9, 3], [2, 5, 7])
    found = losses.dpo(policy, reference, beta=0.1, label_smoothing=0.0)
    expected = torch.tensor([0.693147, 0.313262, 0.126928], dtype=torch.float64)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def soft(z):
    """log(1 + e^-z) in plain Python."""
    return math.log1p(math.exp(-abs(z))) + max(-z, 0.0)


def odds(mean):
    return mean - math.log1p(-math.exp(mean))


# One pair in plain Python floats, from the definitions. v: sums and lengths; k: the knobs.
REWRITTEN = {
    "sft": lambda v, k: v.nll,
    "dpo": lambda v, k: (
        (1 - k.label_smoothing) * soft(k.beta * v.h) + k.label_smoothing * soft(-k.beta * v.h)
    ),
    "ipo": lambda v, k: (v.h - 0.5 / k.beta) ** 2,
    "ipo_norm": lambda v, k: (v.norm - 0.5 / k.beta) ** 2,
    "hinge": lambda v, k: max(0.0, 1 - k.beta * v.h),
    "simpo": lambda v, k: soft(k.beta * v.gap - k.beta * k.gamma_beta_ratio),
    "cpo": lambda v, k: soft(k.beta * (v.lw - v.ll)) + k.alpha * v.nll,
    "orpo": lambda v, k: v.nll + k.beta * soft(odds(v.lw / v.nw) - odds(v.ll / v.nl)),
    "dpop": lambda v, k: soft(k.beta * v.h - k.beta * k.dpop_lambda * max(0.0, v.rw - v.lw)),
    "rdpo": lambda v, k: soft(k.beta * v.h + k.alpha * (v.nw - v.nl)),
    "rpo": lambda v, k: soft(k.beta * v.h) - k.eta * k.beta * v.lw,
    "cal_dpo": lambda v, k: (
        soft(v.h) + k.coefficient * ((v.sw - 0.5 / k.beta) ** 2 + (v.sl + 0.5 / k.beta) ** 2)
    ),
    "alpha_dpo": lambda v, k: soft(
        k.beta * (v.gap - (k.gamma_beta_ratio + k.alpha * (v.norm - 0.5) / 0.25))
    ),
}


def by_definition(name, policy, reference, lengths):
    (lw, ll), (rw, rl), (nw, nl) = policy, reference, lengths
    v = SimpleNamespace(lw=lw, ll=ll, rw=rw, nw=nw, nl=nl, sw=lw - rw, sl=ll - rl, nll=-lw / nw)
    v.h, v.gap = v.sw - v.sl, lw / nw - ll / nl
    v.norm = v.sw / nw - v.sl / nl
    return REWRITTEN[name](v, SimpleNamespace(**KNOBS[name]))


@pytest.mark.parametrize("name", KNOBS)
def test_against_an_independent_rewrite(name):
    lengths = random_lengths(50, seed=1)
    policy, reference = random_sums(lengths, seed=2), random_sums(lengths, seed=3)
    given = dict(lengths=lengths.T, reference=pairs(*reference.T, *lengths.T))
    found = value(name, *policy.T, **given, **KNOBS[name])
    rows = zip(policy.tolist(), reference.tolist(), lengths.tolist())
    expected = [by_definition(name, *row) for row in rows]
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("name", sorted(set(KNOBS) - {"alpha_dpo"}))
def test_gradients_by_finite_differences(name):
    lengths = random_lengths(6, seed=4)
    sums = random_sums(lengths, seed=5).requires_grad_()
    reference = pairs(*random_sums(lengths, seed=6).T, *lengths.T)

    def of_sums(both):
        return value(name, *both.T, lengths=lengths.T, reference=reference, **KNOBS[name])

    assert torch.autograd.gradcheck(of_sums, sums)


def test_alpha_dpo_takes_no_gradient_through_its_target():
    # at the same target SimPO has the same gradient
    z, chosen = 1.0, torch.tensor(-4.0, dtype=torch.float64, requires_grad=True)
    (shifted,) = value("alpha_dpo", chosen, -7.0, beta=2.5, gamma_beta_ratio=0.3, alpha=0.2)
    (plain,) = value("simpo", chosen, -7.0, beta=2.5, gamma_beta_ratio=0.3 + 0.2 * z)
    found, expected = (torch.autograd.grad(it, chosen)[0] for it in (shifted, plain))
    assert found.item() == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize("name", KNOBS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sign", [1, -1])
def test_finite_far_out(name, dtype, sign):
    knobs = KNOBS[name]
    far = 1e4 / knobs["beta"]
    both = [-1.0, -1.0 - far][::sign]
    sums = torch.tensor([both], dtype=dtype, requires_grad=True)
    policy = pairs(*sums.T, 1, 1, dtype=dtype)
    reference = pairs(-1.0, -1.0, 1, 1, dtype=dtype)
    found = losses.evaluate(partial(getattr(losses, name), **knobs), policy, reference, HALF)
    (along,) = torch.autograd.grad(found.sum(), sums)
    assert found.isfinite().all() and along.isfinite().all()


def test_orpo_survives_a_certain_answer():
    chosen = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    (found,) = value("orpo", chosen, -7.0, beta=0.1)
    (along,) = torch.autograd.grad(found, chosen)
    assert found.isfinite() and along.isfinite()


def test_label_smoothing_of_a_half_is_symmetric():
    here = value("dpo", -4.0, -7.0, beta=0.4, label_smoothing=0.5)
    mirrored = value("dpo", -6.0, -5.0, beta=0.4, label_smoothing=0.5)  # margin -2 instead of 2
    torch.testing.assert_close(here, mirrored, rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["sft", "simpo", "cpo", "orpo"])
def test_reference_free_losses_ask_for_none(name):
    loss = partial(getattr(losses, name), **KNOBS[name])
    policy = pairs(-4.0, -7.0, *LENGTHS)
    torch.testing.assert_close(
        losses.evaluate(loss, policy, None, None), losses.evaluate(loss, policy, REFERENCE, HALF)
    )


def test_only_alpha_dpo_keeps_moments():
    wanting = [n for n in KNOBS if losses.needs_moments(partial(getattr(losses, n), **KNOBS[n]))]
    assert wanting == ["alpha_dpo"]


def test_moments_before_and_after_updates():
    assert losses.moments_of({}) == (0.0, 1.0)
    once = losses.update({}, 3.0, 0.5)
    assert losses.moments_of(once) == pytest.approx((3.0, 0.5))  # the bias is corrected
    twice = losses.update(once, 1.0, 1.5)
    assert losses.moments_of(twice) == pytest.approx(((0.9 * 3 + 1) / 1.9, (0.45 + 1.5) / 1.9))
    assert all(type(it) is float for it in twice.values())
    assert losses.update(twice, 1.0, math.nan) == twice  # one pair has no standard deviation


def test_alpha_dpo_floors_the_spread():
    knobs = dict(beta=2.5, gamma_beta_ratio=0.6, alpha=0.2)
    still = value("alpha_dpo", -4.0, -7.0, moments=Moments(0.75, 0.0), **knobs)
    plain = value("simpo", -4.0, -7.0, beta=2.5, gamma_beta_ratio=0.6)
    torch.testing.assert_close(still, plain)  # the margin is the mean, whatever the spread
    assert value("alpha_dpo", -4.0, -7.0, moments=Moments(0.0, 0.0), **knobs).isfinite().all()


YAMLS = sorted(path.stem for path in CONF.joinpath("loss").glob("*.yaml") if path.stem != "spo")


def from_yaml(name):
    node = OmegaConf.load(CONF / "loss" / f"{name}.yaml")
    unit = node.pop("unit")
    return instantiate(node), unit


def test_every_loss_has_a_yaml_and_every_knob_stands_there():
    assert sorted(KNOBS) == YAMLS
    for name in YAMLS:
        knobs = set(OmegaConf.load(CONF / "loss" / f"{name}.yaml")) - {
            "_target_",
            "_partial_",
            "unit",
        }
        parameters = inspect.signature(getattr(losses, name)).parameters.values()
        assert knobs == {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
        assert all(p.default is p.empty for p in parameters)


def test_every_yaml_is_another_loss():
    lengths = random_lengths(1, seed=7)
    policy, reference = (pairs(*random_sums(lengths, s).T, *lengths.T) for s in (8, 9))
    values = {n: losses.evaluate(from_yaml(n)[0], policy, reference, HALF).item() for n in YAMLS}
    assert len({round(v, 9) for v in values.values()}) == len(YAMLS), values


@pytest.mark.parametrize("name", YAMLS)
def test_unit_says_what_the_margin_is_measured_in(name):
    # twice the tokens at the same log-probability each: only a per-token margin stays
    loss, unit = from_yaml(name)
    means = ((-0.3, -0.5), (-0.4, -0.3))

    def at(lengths):
        sums = ((chosen * lengths[0], rejected * lengths[1]) for chosen, rejected in means)
        policy, reference = (pairs(*both, *lengths) for both in sums)
        return losses.evaluate(loss, policy, reference, HALF).item()

    assert (at((3, 5)) == pytest.approx(at((6, 10)), rel=1e-12)) == (unit == "token")


class Table(nn.Module):
    """A language model whose log-probabilities are given: row i of the batch reads row i."""

    def __init__(self, logps):
        super().__init__()
        self.logps = nn.Parameter(logps)

    def forward(self, input_ids, labels=None, **_):
        logps = self.logps.masked_fill(labels[:, 1:] == -100, 0.0)
        zeros = torch.zeros_like(logps)
        return SimpleNamespace(
            log_probs=logps, entropy=zeros, mean_logits=zeros, is_top1=zeros.bool()
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


def draws(count):
    lengths = random_lengths(count, seed=11)
    return lengths, random_sums(lengths, seed=12), random_sums(lengths, seed=13)


@pytest.mark.parametrize(
    ("loss_type", "name", "knobs"),
    [
        ("sigmoid", "dpo", dict(label_smoothing=0.0)),
        ("hinge", "hinge", {}),
        ("ipo", "ipo_norm", {}),
        ("sft", "sft", {}),
    ],
)
def test_as_trl_dpo_trainer(loss_type, name, knobs, trl_parts, tmp_path):
    from trl import DPOConfig, DPOTrainer

    trainer = build(
        DPOTrainer, DPOConfig, trl_parts, tmp_path, beta=0.1, loss_type=[loss_type],
        precompute_ref_log_probs=True,
    )  # fmt: skip
    lengths, policy, reference = draws(200)
    loss = partial(getattr(losses, name), beta=0.1, **knobs)
    for n, p, r in zip(lengths, policy, reference):
        ours = pairs(p[:1], p[1:], n[:1], n[1:])
        mine = losses.evaluate(loss, ours, pairs(r[:1], r[1:], n[:1], n[1:]), None)
        mask = torch.zeros(2, int(n.max()) + 1, dtype=torch.long)  # the prompt is one token
        table = torch.zeros(2, int(n.max()), dtype=torch.float64)
        for side in range(2):
            mask[side, 1 : 1 + n[side]] = 1
            table[side, : n[side]] = p[side] / n[side]
        inputs = {
            "input_ids": torch.full_like(mask, 3),
            "attention_mask": torch.ones_like(mask),
            "completion_mask": mask,
            "ref_chosen_logps": r[:1],
            "ref_rejected_logps": r[1:],
        }
        theirs = trainer.compute_loss(Table(table), inputs)
        torch.testing.assert_close(mine[0], theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["sigmoid", "simpo"])
def test_as_trl_cpo_trainer_preference_term(loss_type, trl_parts, tmp_path):
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    knobs = dict(loss_type=loss_type, beta=0.7, simpo_gamma=0.35)
    trainer = build(CPOTrainer, CPOConfig, trl_parts, tmp_path, **knobs)
    lengths, policy, _ = draws(200)
    mine = (
        value("cpo", *policy.T, lengths=lengths.T, beta=0.7, alpha=0.0)
        if loss_type == "sigmoid"
        else value("simpo", *policy.T, lengths=lengths.T, beta=0.7, gamma_beta_ratio=0.5)
    )
    given = policy if loss_type == "sigmoid" else policy / lengths
    torch.testing.assert_close(mine, trainer.cpo_loss(*given.T)[0], rtol=1e-6, atol=1e-6)


def test_as_trl_orpo_trainer_preference_term(trl_parts, tmp_path):
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    trainer = build(ORPOTrainer, ORPOConfig, trl_parts, tmp_path, beta=0.7)
    lengths, policy, _ = draws(200)
    mine = value("orpo", *policy.T, lengths=lengths.T, beta=0.7)
    plain = value("orpo", *policy.T, lengths=lengths.T, beta=0.0)
    theirs = -trainer.odds_ratio_loss(*(policy / lengths).T)[0].double()
    # TRL works in float32 here
    torch.testing.assert_close(mine - plain, theirs, rtol=1e-6, atol=1e-6)


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
        (mine,) = value(name, *sums, lengths=n, **knobs)
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6, check_dtype=False)
