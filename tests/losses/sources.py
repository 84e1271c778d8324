"""Each loss once more, in plain Python from its paper's definition; and each yaml as it is built.

``v`` has one pair's sums, lengths and what follows from them, ``k`` the keys. A loss of a whole
batch is given all pairs and gives a value for each.
"""

import math
from dataclasses import replace
from functools import cache
from types import SimpleNamespace

import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF, pairs

from spo_lightning import losses
from spo_lightning.losses import Moments

YAMLS = sorted(path.stem for path in CONF.joinpath("loss").glob("*.yaml") if path.stem != "spo")
HALF = Moments(0.5, 0.25, summed_mean=1.5, summed_spread=4.0, weight=0.9, steps=3, ratio=0.4)
KL = torch.tensor(0.6, dtype=torch.float64)  # how far a policy has moved, to those that ask
SOME = {
    "mixture": {"parts": {"dpo": {"weight": 0.7}, "sft": {"weight": 0.2}}},
    "aspo": {"alpha": 0.6},
    "beta_dpo": {"filtered": 0.0},  # the draw has a test of its own
}  # to be a loss


@cache
def node(name):
    """The loss node that ``loss=name`` composes."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(None, [f"+loss={name}", "+seed=0"]).loss


def facts(name):
    return node(name).unit, node(name).get("whole_batch", False)


def built(name, **keys):
    """The loss of a yaml with these keys, as a run has it."""
    return _built(name, tuple(keys.items()))


def thawed(keys):
    """Mappings that came as tuples of their items."""
    return {k: thawed(it) if isinstance(it, tuple) else it for k, it in keys}


@cache
def _built(name, keys):
    plain = OmegaConf.to_container(node(name), resolve=True)
    changed = OmegaConf.merge(plain, SOME.get(name, {}), thawed(keys))
    return losses.assembled(instantiate(OmegaConf.to_container(changed)))


def value(name, policy, reference, moments=HALF, **keys):
    return losses.evaluate(built(name, **keys), policy, reference, moments, kl=KL)


def soft(z):
    """log(1 + e^-z)."""
    return math.log1p(math.exp(-abs(z))) + max(-z, 0.0)


def sig(z):
    return math.exp(-soft(z))


def odds(mean):
    return mean - math.log1p(-math.exp(mean))


def smoothed(z, k):
    return (1 - k.label_smoothing) * soft(z) + k.label_smoothing * soft(-z)


def bradley_terry(rw, rl, margin, k):
    apart, asked = k.beta * (rw - rl), margin if k.margin else 0.0
    labels = (1 - k.label_smoothing) * soft(apart - asked)
    labels += k.label_smoothing * soft(-apart - asked)
    return labels + k.center_rewards_coefficient * (rw + rl) ** 2


def exo(p, e):
    return p * (math.log(p) - math.log(1 - e)) + (1 - p) * (math.log(1 - p) - math.log(e))


def sort_of(rows, left, right, k):
    differences = (
        a - b for a, b in zip(sorted(map(left, rows)), sorted(map(right, rows)), strict=True)
    )
    return [smoothed(k.beta * d, k) for d in differences]


def of_strength(rows, k):
    """beta_dpo of all pairs, after batches of mean 1.5 that count 0.9."""
    mean = sum(v.held_sum for v in rows) / len(rows)
    usual = (0.9 * 0.9 * 1.5 + 0.1 * mean) / (0.9 * 0.9 + 0.1)
    strength = max(1e-3, k.beta * (1 + k.alpha * (mean - usual)))
    return [soft(strength * v.h) for v in rows]


def kto(rows, k):
    kw, kl = (max(0.0, sum(getattr(v, s) for v in rows) / len(rows)) for s in ("sw", "sl"))
    return [(1 - sig(k.beta * (v.sw - kl)) + 1 - sig(k.beta * (kw - v.sl))) / 2 for v in rows]


def pilot(v, share):
    """Tokens of a pilot; all of an answer are alike here."""
    return max(math.floor(min(v.nw, v.nl) * share), 1)


def two_sentences(v, weight):
    """s_w where the first token is a sentence, and the others weigh more."""
    if v.nw == 1:
        return v.sw
    first = v.sw / v.nw
    return 2 / (2 + weight) * (first + (1 + weight) * (v.sw - first))


PAIR = {
    "reward": lambda v, k: bradley_terry(v.lw, v.ll, v.margin, k),
    "ranker": lambda v, k: smoothed(k.beta * (v.lw - v.ll), k),
    "sft": lambda v, k: v.nll,
    "dpo": lambda v, k: smoothed(k.beta * v.h, k),
    "rso_sigmoid_norm": lambda v, k: math.log1p(math.exp(-k.beta * v.h)),
    "robust": lambda v, k: (
        ((1 - k.label_smoothing) * soft(k.beta * v.h) - k.label_smoothing * soft(-k.beta * v.h))
        / (1 - 2 * k.label_smoothing)
    ),
    "sigmoid_norm": lambda v, k: soft(k.beta * v.norm),
    "ipo": lambda v, k: (v.h - 0.5 / k.beta) ** 2,
    "ipo_norm": lambda v, k: (v.norm - 0.5 / k.beta) ** 2,
    "hinge": lambda v, k: max(0.0, 1 - k.beta * v.h),
    "rso_hinge_norm": lambda v, k: max(0.0, 1 - k.beta * (v.lw - v.rw - (v.ll - v.rl))),
    "slic": lambda v, k: max(0.0, 1 - k.beta * (v.lw - v.ll)) - k.alpha * k.beta * v.lw,
    "simpo": lambda v, k: soft(k.beta * v.gap - k.beta * k.gamma_beta_ratio),
    "cpo": lambda v, k: soft(k.beta * (v.lw - v.ll)) + k.alpha * v.nll,
    "orpo": lambda v, k: v.nll + k.beta * soft(odds(v.lw / v.nw) - odds(v.ll / v.nl)),
    "dpop": lambda v, k: soft(k.beta * v.h - k.beta * k.dpop_lambda * max(0.0, v.rw - v.lw)),
    "rdpo": lambda v, k: soft(k.beta * v.h + k.alpha * (v.nw - v.nl)),
    "rpo": lambda v, k: soft(k.beta * v.h) - k.eta * k.beta * v.lw,
    "xpo": lambda v, k: smoothed(k.beta * v.h, k) + k.alpha * v.own,
    "odpo": lambda v, k: soft(k.beta * v.h - k.alpha * math.log(v.margin)),
    "exo_pair": lambda v, k: exo(sig(k.beta * v.h), k.label_smoothing),
    "dmpo": lambda v, k: exo(sig(k.beta * v.h), k.alpha),
    "discopop": lambda v, k: (
        (1 - sig(k.beta * v.h / k.tau)) * soft(k.beta * v.h)
        + sig(k.beta * v.h / k.tau) * math.exp(-k.beta * v.h)
    ),
    "two_sided": lambda v, k: (
        soft(k.beta * (v.lw - v.ll - (v.rw - v.rl + k.lower)))
        + soft(k.beta * (v.rw - v.rl + k.upper - (v.lw - v.ll)))
    ),
    "cal_dpo": lambda v, k: (
        soft(v.h) + k.coefficient * ((v.sw - 0.5 / k.beta) ** 2 + (v.sl + 0.5 / k.beta) ** 2)
    ),
    "sppo_hard": lambda v, k: (v.sw - 0.5 / k.beta) ** 2 + (v.sl + 0.5 / k.beta) ** 2,
    "nca_pair": lambda v, k: (
        soft(k.beta * v.sw) + soft(-k.beta * v.sw) / 2 + soft(-k.beta * v.sl) / 2
    ),
    "bco_pair": lambda v, k: soft(k.beta * v.sw) + soft(-k.beta * v.sl),
    "apo_zero": lambda v, k: 1 - sig(k.beta * v.sw) + sig(k.beta * v.sl),
    "apo_down": lambda v, k: sig(k.beta * v.sw) + 1 - sig(k.beta * v.h),
    "smooth_hinge": lambda v, k: (
        max(0.0, 1 - k.beta * v.gap) + k.alpha * math.log1p(math.exp(1 - v.sw / v.nw))
    ),
    "tdpo1": lambda v, k: soft(k.beta * (v.h + v.dw - v.dl)),
    "tdpo2": lambda v, k: soft(k.beta * (v.h + k.alpha * (v.dw - v.dl))),
    "aspo": lambda v, k: soft(k.beta * (two_sentences(v, 0.6) - v.sl)),
    "sgdpo": lambda v, k: (
        soft(k.beta * (v.sw - v.held_sl * pilot(v, k.r2) / v.nl)) / 2
        + soft(k.beta * (v.held_sw * pilot(v, k.r1) / v.nw - v.sl)) / 2
    ),
    "kto": lambda v, k: (
        k.desirable_weight * (1 - sig(k.beta * (v.sw - 0.6))) / 2
        + k.undesirable_weight * (1 - sig(k.beta * (0.6 - v.sl))) / 2
    ),
    "bco": lambda v, k: soft(k.beta * v.sw - k.beta * 0.4) / 2 + soft(k.beta * (0.4 - v.sl)) / 2,
    "apo_zero_unpaired": lambda v, k: (
        k.desirable_weight * (1 - sig(k.beta * v.sw)) / 2
        + k.undesirable_weight * sig(k.beta * v.sl) / 2
    ),
    "alpha_dpo": lambda v, k: soft(
        k.beta * (v.gap - (k.gamma_beta_ratio + k.alpha * (v.held - 0.5) / 0.25))
    ),
}
BATCH = {
    "aot": lambda rows, k: sort_of(rows, lambda v: v.lw - v.ll, lambda v: v.rw - v.rl, k),
    "aot_unpaired": lambda rows, k: sort_of(rows, lambda v: v.sw, lambda v: v.sl, k),
    "kto_pair": kto,
    "beta_dpo": of_strength,
}
# keys with which every term of a loss counts; where there are none its yaml's
KEYS = {
    "reward": dict(beta=0.7, label_smoothing=0.2, margin=True, center_rewards_coefficient=0.01),
    "ranker": dict(beta=0.7, label_smoothing=0.2),
    "dpo": dict(beta=0.3, label_smoothing=0.2),
    "robust": dict(beta=0.3, label_smoothing=0.2),
    "slic": dict(beta=0.3, alpha=0.2),
    "simpo": dict(beta=1.7, gamma_beta_ratio=0.4),
    "cpo": dict(beta=0.3, alpha=0.7),
    "dpop": dict(beta=0.3, dpop_lambda=3.0),
    "rpo": dict(beta=0.3, eta=0.4),
    "xpo": dict(beta=0.3, label_smoothing=0.2, alpha=0.05),
    "odpo": dict(beta=0.3, alpha=0.8),
    "exo_pair": dict(beta=0.1, label_smoothing=0.1),
    "dmpo": dict(beta=0.1, alpha=0.1),
    "discopop": dict(beta=0.05, tau=0.3),
    "two_sided": dict(beta=0.3, lower=1.0, upper=4.0),
    "cal_dpo": dict(beta=0.3, coefficient=0.7),
    "smooth_hinge": dict(beta=0.8, alpha=0.6),
    "tdpo2": dict(beta=0.3, alpha=0.7),
    "sgdpo": dict(beta=0.3, r1=0.45, r2=0.8),
    "alpha_dpo": dict(beta=1.7, gamma_beta_ratio=0.4, alpha=0.3),
    "kto": dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
    "bco": dict(beta=0.3),
    "apo_zero_unpaired": dict(beta=0.3, desirable_weight=1.2, undesirable_weight=0.7),
    "aot": dict(beta=0.3, label_smoothing=0.2),
    "aot_unpaired": dict(beta=0.3, label_smoothing=0.2),
}


def rewritten(name, policy, reference, lengths, margins, held=None, **keys):
    """[B] as plain floats; sums and lengths are [B][2]. ``held``: the policy of what has no
    gradient."""
    k = SimpleNamespace(**(dict(node(name)) | keys))
    rows = []
    given = zip(policy, reference, lengths, margins, held or policy, strict=True)
    for (lw, ll), (rw, rl), (nw, nl), margin, (hw, hl) in given:
        v = SimpleNamespace(lw=lw, ll=ll, rw=rw, rl=rl, nw=nw, nl=nl, nll=-lw / nw, margin=margin)
        v.sw, v.sl, v.gap = lw - rw, ll - rl, lw / nw - ll / nl
        v.h, v.norm = v.sw - v.sl, v.sw / nw - v.sl / nl
        v.dw, v.dl = (d * n for d, n in zip(DIVERGENCES, (nw, nl)))
        v.own = (lw, ll, 0.0)[int(2 * margin) % 3]  # the reference's own answer
        v.held_sw, v.held_sl = hw - rw, hl - rl
        v.held, v.held_sum = (hw - rw) / nw - (hl - rl) / nl, hw - rw - (hl - rl)
        rows.append(v)
    return BATCH[name](rows, k) if name in BATCH else [PAIR[name](v, k) for v in rows]


DIVERGENCES = (0.03, 0.05)  # of every token of a chosen and of a rejected answer


def with_margins(policy, margins, divergences=DIVERGENCES):
    """The same PairLogps with score differences, with divergences, with two sentences, of which
    the first is a token, and with an answer of the reference's own, chosen by the score."""
    of_token = torch.tensor(divergences, dtype=policy.logps.dtype)[policy.side.long()]
    scores = torch.as_tensor(margins, dtype=policy.logps.dtype)
    second = (policy.places > 0) & ~policy.side
    which = {"sentences": second.long(), "similarities": second.to(policy.logps)}
    which["reference_sides"] = torch.tensor([0.0, 1.0, torch.nan])[(2 * scores).long() % 3]
    return replace(policy, margins=scores, divergences=of_token, **which)


def of_sums(sums, lengths, margins=None):
    """PairLogps of [B, 2] sums and lengths."""
    made = pairs(*sums.T, *lengths.T, dtype=sums.dtype)
    return made if margins is None else with_margins(made, margins)
