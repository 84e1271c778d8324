"""Probability evolution where it is exact: by hand, by theory, and as the command leaves it."""

import json
import math
from dataclasses import dataclass, replace
from functools import partial
from xml.etree import ElementTree

import pytest
import torch
from conftest import command
from fitting import config

from spo_lightning import losses
from spo_lightning.config.build import built
from spo_lightning.config.knobs import Given, check
from spo_lightning.errors import Diverged, UserError
from spo_lightning.solvers.none import NoLower
from spo_lightning.studies import theory
from spo_lightning.studies.descent import Method, apart, descend, pairs, pulls
from spo_lightning.studies.policies import LogLinear, draw, similar, tabular
from spo_lightning.train import train

EXPERIMENT = "experiment=probability_evolution"
SMALL = ("study.starts=12", "study.steps=30", "study.theory_steps=5")
DPO = partial(losses.dpo, beta=0.5, label_smoothing=0.0)
METHODS = ("DPO", "IPO", "SimPO", "SPO")
FILES = {
    *("config.yaml", "status.json", "train.log", "numbers.json", "table.md"),
    *(f"{name}.csv" for name in ("evolution", "starts", "theory", "condition")),
    *(f"{n}.{e}" for n in ("evolution", "trajectories", "theory") for e in ("svg", "png")),
}


def rows(*values):
    return torch.tensor(values, dtype=torch.float64)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def study(*overrides):
    return built(config(EXPERIMENT, *overrides).study)


@pytest.fixture(scope="module")
def shipped():
    """The experiment as it is shipped; numbers of its runs are not made here."""
    return study()


def only_move(policy, method):
    (move,) = descend(policy, method, 1)
    return move


# -- by hand


def test_a_dpo_step_of_three_answers_by_hand():
    """pi = (0.2, 0.3, 0.5), beta 0.5, so c = 0.25; step 0.01: the logits move by 0.0025, -0.0025.

    d log pi(y_w) = 0.0025 (1 - pi_w + pi_l) = 0.00275, d log pi(y_l) = -0.0025 (1 + pi_w - pi_l)
    = -0.00225, d pi(O) = -0.2 * 0.00275 + 0.3 * 0.00225 = 0.000125: y_l was likelier than y_w.
    """
    policy, method = tabular(rows([0.2, 0.3, 0.5]), seeded()), Method(DPO, NoLower(), 0.01)
    move = only_move(policy, method)
    predicted = rows([0.00275, -0.00225, 0.000125])
    pulled = pulls(policy, method, move)
    torch.testing.assert_close(pulled, rows([0.25, -0.25]))
    torch.testing.assert_close(theory.along(policy, move), predicted)
    torch.testing.assert_close(theory.idealised(policy, move, pulled, method.lr), predicted)
    up, down = 0.2 * math.exp(0.0025), 0.3 * math.exp(-0.0025)
    whole = up + down + 0.5
    exact = [math.log(up / whole / 0.2), math.log(down / whole / 0.3), 0.5 / whole - 0.5]
    torch.testing.assert_close(theory.measured(policy, move), rows(exact))


@pytest.mark.parametrize(
    ("rejected", "excess"),
    # probabilities 1/4, 1/4, 1/2, features 1, f, 0: mean (1 + f) / 4
    # f = 2: g_w = 1/4, g_l = 5/4; f = 1/2: g_w = 5/8, g_l = 1/8
    [(2.0, 5 / 16 - 1 / 16), (0.5, 5 / 64 - 25 / 64)],
)
def test_a_log_linear_step_by_hand(rejected, excess):
    base = rows([0.25, 0.25, 0.5]).log()
    features = torch.tensor([[[1.0], [rejected], [0.0]]], dtype=torch.float64)
    policy = LogLinear(features, base, torch.zeros(1, 1, dtype=torch.float64))
    assert theory.excess(policy.scores(policy.start)).item() == pytest.approx(excess)
    move = only_move(policy, Method(DPO, NoLower(), 1e-4))
    change = theory.measured(policy, move)[0, 0].item()
    assert change == pytest.approx(-1e-4 * 0.25 * excess, rel=1e-3)


def test_scores_are_gradients():
    policy = similar(
        draw(3, 5, (0.1, 0.5), seeded()), seeded(), dimensions=3, cosine=(0, 1), length=(1, 2)
    )
    theta = torch.randn(3, 3, generator=seeded(1), dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(policy.logps, theta)
    own = torch.stack([jacobian[n, :, n] for n in range(3)])
    torch.testing.assert_close(policy.scores(theta), own)


def test_pulls_of_every_method(shipped):
    """At the reference: DPO beta / 2, IPO 1 / beta, SimPO beta sig(-(beta z - gamma)); SPO adds
    weight * beta to y_w's while the margin is not reached."""
    start = rows([0.1, 0.3, 0.6])
    policy = tabular(start, seeded())
    gap = 2.0 * (math.log(0.1 / 0.3) - 0.5)
    simpo = 2.0 / (1 + math.exp(gap))
    expected = {"DPO": (0.05, -0.05), "IPO": (10, -10), "SimPO": (simpo, -simpo)}
    expected["SPO"] = (0.05 + 5 * 0.1, -0.05)
    for name, method in shipped.methods.items():
        found = pulls(policy, method, only_move(policy, method))
        torch.testing.assert_close(found, rows(expected[name]), msg=name)


def test_one_token_pairs():
    scored = pairs(rows([-1, -2, -3], [-4, -5, -6]))
    assert scored.chosen.tolist() == [-1, -4]
    assert scored.rejected.tolist() == [-2, -5]
    assert scored.lengths.tolist() == [[1, 1], [1, 1]]


def test_start_probabilities():
    initial = draw(400, 6, (0.01, 0.5), seeded())
    torch.testing.assert_close(initial.sum(1), torch.ones(400, dtype=torch.float64))
    assert 0.01 <= initial[:, 0].min() < 0.012 and 0.45 < initial[:, 0].max() <= 0.5
    for make in (tabular, partial(similar, dimensions=3, cosine=(0.5, 0.5), length=(2, 2))):
        policy = make(initial, seeded())
        torch.testing.assert_close(policy.logps(policy.start).exp(), initial)


def test_similar_features():
    initial = draw(50, 4, (0.1, 0.5), seeded())
    policy = similar(initial, seeded(), dimensions=4, cosine=(0.2, 0.9), length=(1.5, 1.5))
    won, lost = policy.features[:, 0], policy.features[:, 1]
    cosine = (won * lost).sum(1) / 1.5
    assert 0.2 <= cosine.min() < 0.3 and 0.8 < cosine.max() <= 0.9
    torch.testing.assert_close(lost.norm(dim=1), torch.full((50,), 1.5, dtype=torch.float64))


# -- theory


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("policy", "steps"), [("tabular", 200), ("similar", 50)])
def test_first_order_theory_predicts_every_step(shipped, policy, steps, name):
    made, _ = shipped.made()
    seen = theory.compare(made[policy], shipped.methods[name], lr=1e-5, steps=steps)
    assert seen.measured.shape == (steps, 200, 3)
    for number in range(3):
        for predicted in (seen.along, seen.idealised):
            correlation, slope = theory.agreement(
                predicted[..., number], seen.measured[..., number]
            )
            assert correlation >= 0.99
            assert abs(slope - 1) <= 0.01


@pytest.mark.parametrize("name", ["DPO", "IPO", "SimPO"])
def test_y_w_falls_exactly_where_the_condition_holds(shipped, name):
    initial = draw(500, 8, (0.005, 0.8), seeded(3))
    policy = similar(initial, seeded(4), dimensions=4, cosine=(-1, 1), length=(0.5, 3))
    method = replace(shipped.methods[name], lr=1e-7)
    fell = theory.measured(policy, only_move(policy, method))[:, 0] < 0
    holds = theory.excess(policy.scores(policy.start)) > 0
    assert 50 < holds.sum() < 450
    assert torch.equal(fell, holds)


def test_a_tabular_policy_never_lowers_y_w(shipped):
    policy = tabular(draw(300, 8, (1e-4, 0.99), seeded()), seeded())
    assert (theory.excess(policy.scores(policy.start)) < 0).all()
    for move in descend(policy, shipped.methods["DPO"], 50):
        assert (theory.measured(policy, move)[:, 0] > 0).all()


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_sufficient_weight(shipped, share):
    """lambda >= c (<g_w, g_l> / |g_w|^2 - 1) keeps y_w from falling, and less does not."""
    policy = shipped.made()[0]["similar"]
    excess = theory.excess(policy.scores(policy.start))
    at = excess.argsort()[int(share * len(excess))].item()
    policy = policy.only(slice(at, at + 1))
    (won,) = policy.scores(policy.start)[:, 0]
    needed = 0.5 * max(0.0, excess[at].item() / won.square().sum().item())  # of beta: c = beta / 2
    assert needed > 0
    method = replace(shipped.methods["SPO"], lr=1e-7)
    for weight, falls in ((0.99 * needed, True), (1.01 * needed, False)):
        priced = replace(method, solver=replace(method.solver, weight=weight))
        assert (theory.measured(policy, only_move(policy, priced))[0, 0].item() < 0) == falls


def test_spo_keeps_what_dpo_loses(shipped):
    policy = shipped.made()[0]["similar"]
    lowest = {}
    for name in ("DPO", "SPO"):
        brief = replace(shipped, steps=200, theory_steps=1)
        curve, _ = brief.train(policy, shipped.methods[name], lambda: None)
        lowest[name] = (curve[1:, :, 0] / curve[0, :, 0]).amin(0)
        ratio = curve[:, :, 0] / curve[:, :, 1]
        assert (ratio[-1] > ratio[0]).all(), "the preference is learned"
    assert (lowest["DPO"] < 1).double().mean() > 0.95
    assert lowest["DPO"].median() < 0.5
    assert (lowest["SPO"] >= 1).all()


def test_losses_of_the_margin_follow_one_line(shipped):
    """d log pi(y_w) - d log pi(y_l) is linear in theta: only how far they go differs."""
    policy = shipped.made()[0]["similar"]
    line = policy.features[:, 0] - policy.features[:, 1]
    for name in ("DPO", "IPO", "SimPO"):
        *_, last = descend(policy, shipped.methods[name], 50)
        moved = last.after - policy.start
        cosine = torch.cosine_similarity(moved, line)
        torch.testing.assert_close(cosine, torch.ones_like(cosine))


# -- every start by itself


@dataclass(frozen=True)
class Crowd(NoLower):
    """A solver that looks at all rows: the more there are, the shorter its step."""

    def step(self, problem, state):
        step = super().step(problem, state)
        return step._replace(direction=tuple(d / len(problem.size) for d in step.direction))


def test_starts_train_apart(shipped):
    for policy in shipped.made()[0].values():
        for method in shipped.methods.values():
            assert apart(policy, method)
    crowd = replace(shipped.methods["DPO"], solver=Crowd())
    assert not apart(policy, crowd)
    with pytest.raises(ValueError, match="Crowd.solver judges all starts together"):
        replace(shipped, methods={"Crowd": crowd})


# -- the experiment


def test_same_seed_same_numbers(tmp_path):
    texts = []
    for name, seed in (("one", 0), ("again", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        study(*SMALL, f"seed={seed}").run(tmp_path / name, lambda: None)
        texts.append([(tmp_path / name / f).read_text() for f in ("numbers.json", "starts.csv")])
    assert texts[0] == texts[1]
    assert texts[0][1] != texts[2][1]


@pytest.mark.slow
def test_the_command_leaves_numbers_table_and_figures(tmp_path):
    done = command(tmp_path, EXPERIMENT, *SMALL, "hydra.run.dir=run")
    assert (done.code, done.err) == (0, "")
    left = tmp_path / "run"
    assert {path.name for path in left.iterdir()} == FILES
    status = json.loads((left / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2 * 4 * 30)
    numbers = json.loads((left / "numbers.json").read_text())
    table = (left / "table.md").read_text()
    assert [row["method"] for row in numbers["trained"]] == [*METHODS] * 2
    for row in numbers["trained"]:
        assert sum(row[f"{p}_after"] for p in ("chosen", "rejected", "others")) == pytest.approx(1)
        assert f"| {row['policy']} | {row['method']} |" in table
    for path in left.glob("*.svg"):
        ElementTree.parse(path)
    for path in left.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="holds a study: take another hydra.run.dir"):
        train(config(EXPERIMENT, *SMALL), left)


def test_what_the_study_does_not_read_is_refused(tmp_path):
    done = command(tmp_path, EXPERIMENT, "model=gpt2", "hydra.run.dir=run")
    assert done.code == 2
    assert done.err.startswith("error: model has no effect") and done.err.count("\n") == 1
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize("key", ["loss.beta", "loss", "solver.phi", "max_steps", "ckpt_path"])
def test_idle_keys(key):
    cfg = config(EXPERIMENT)
    with pytest.raises(UserError, match=f"^{key} has no effect"):
        check(cfg, Given([key], {}, cfg))
    check(
        cfg,
        Given(["experiment", "seed", "study.steps"], {"experiment": "probability_evolution"}, cfg),
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("study.starts=0", "study.starts must be at least 1"),
        ("study.answers=2", "at least one other"),
        ("study.chosen=[0.5,0.1]", "lowest <= highest"),
        ("study.theory_lr=0", "study.theory_lr must be above 0"),
        ("study.methods.DPO.lr=0", "lr must be above 0"),
        ("study.methods.SPO.solver.weight=-1", "solver.weight"),
        ("study.policies.similar.cosine=[0.9,2]", "cosine="),
        ("study.policies.similar.length=[0,1]", "length="),
        ("study.sweep.dimensions=1", "dimensions=1"),
    ],
)
def test_bad_settings_are_the_users(override, words):
    with pytest.raises(UserError, match=words):
        study(override)


def test_a_step_too_long_says_so(tmp_path):
    cfg = config(EXPERIMENT, *SMALL, "study.methods.IPO.lr=100")
    with pytest.raises(Diverged, match="tabular, IPO: a probability vanished"):
        train(cfg, tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
