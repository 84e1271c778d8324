"""A mixture in the plane: exact likelihood against closed form, surrogates, whole runs."""

import csv
import json
import math
from functools import partial

import pytest
import torch
from conftest import forked
from fitting import config
from numpy.polynomial.hermite_e import hermegauss
from stops import Killed, ending, nowhere

from spo_lightning import losses
from spo_lightning.config.build import built
from spo_lightning.config.studies import goes_on, heeds
from spo_lightning.diffusion.objective import TARGETS, Schedule, bound
from spo_lightning.diffusion.scorer import ImageScorer
from spo_lightning.errors import Interrupted, UserError
from spo_lightning.mixture import measures
from spo_lightning.mixture.likelihood import shares
from spo_lightning.mixture.training import Denoiser, Learner, Method
from spo_lightning.mixture.truth import Mixture, Preference
from spo_lightning.report.reading import read
from spo_lightning.report.run_page import sections
from spo_lightning.solvers.none import NoLower
from spo_lightning.studies.denoiser import Schedule as Noising

EXPERIMENT = "experiment=diffusion_mixture"
METHODS = ("SFT", "DPO", "DMPO", "SPO", "SPO-DMPO")
PACE = {"log_every": 2, "checkpoint_every": 4}
TINY = (
    *("study.rows=200", "study.denoiser.width=8", "study.denoiser.depth=1"),
    *(
        "study.denoiser.steps=4",
        "study.annealing.steps=2",
        "study.denoiser.batch_size=16",
        "study.pairs=40",
    ),
    *("study.batch_size=4", "study.draws=2", "study.flow_steps=4", "study.grid.side=6"),
    *("study.measuring.pairs=6", "study.measuring.draws=3", "study.measuring.moments=[2,5]"),
    *("log.every_n_steps=2", "checkpoint.every_n_steps=4"),
)
FILES = ("metrics.csv", "metrics.json", "start.csv", "moments.csv", "pairs.csv", "density.csv")


def study(*overrides):
    return built(config(EXPERIMENT, *overrides).study)


@pytest.fixture(scope="module")
def shipped():
    """The experiment as it is shipped; its nets are not trained here."""
    return study()


@pytest.fixture(scope="module")
def start(shipped):
    """A denoiser that has learned nothing."""
    return Denoiser(shipped.denoiser.net(2, 2, 0), shipped.flow).eval().requires_grad_(False)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# -- the truth


def test_the_density_of_one_gaussian_is_by_hand():
    one = Mixture([[1.0, -2.0]], 0.5)
    point = torch.tensor([[1.5, -1.0]], dtype=torch.float64)
    # with half of the image and noise of 0.3: variance 0.0625 + 0.09, centre (0.5, -1)
    variance = 0.1525
    by_hand = -0.5 * 1.0 / variance - math.log(2 * math.pi * variance)
    assert one.log_density(point, 0.5, 0.3).item() == pytest.approx(by_hand, abs=1e-12)
    assert one.noise(point, 0.5, 0.3)[0].tolist() == pytest.approx([0.3 / variance, 0.0])


@pytest.mark.parametrize("noise", [0.05, 0.7, 1.0])
def test_the_expected_noise_is_the_score_by_finite_differences(shipped, noise):
    points = torch.randn(20, 2, generator=seeded(), dtype=torch.float64)
    at = partial(shipped.mixture.log_density, image=math.sqrt(1 - noise**2), noise=noise)
    told = shipped.mixture.noise(points, math.sqrt(1 - noise**2), noise)
    for side in range(2):
        off = torch.zeros(2, dtype=torch.float64)
        off[side] = 1e-5
        score = (at(points + off) - at(points - off)) / 2e-5
        torch.testing.assert_close(told[:, side], -noise * score, rtol=1e-6, atol=1e-6)


def test_pairs_are_chosen_as_often_as_the_preference_says():
    preference = Preference([[0.0, 0.0]], [2.0], 0.5)
    points = torch.tensor([[0.0, 0.0], [9.0, 9.0]]).repeat(20000, 1)
    pairs = preference.pairs(points, seeded())
    assert preference.reward(points[:2]).tolist() == [2.0, 0.0]
    won = (pairs[:, 0] == 0).all(1).double().mean().item()
    assert won == pytest.approx(1 / (1 + math.exp(-2)), abs=0.01)


# -- exact likelihood


def exact(mixture, points, u):
    return mixture.noise(points, *shares(u))


def test_the_flow_of_the_exact_score_has_the_mixtures_density(shipped):
    """To 1e-3 nats at the shipped steps, to 1e-4 at twice as many; also far outside."""
    points = shipped.mixture.drawn(200, seeded()).double()
    points = torch.cat([points, torch.tensor([[0.0, 0.0], [2.4, -2.4]], dtype=torch.float64)])
    image, noise = shares(shipped.flow.low)
    closed = shipped.mixture.log_density(points, 1.0, noise / image)
    for steps, most in ((shipped.flow_steps, 1e-3), (2 * shipped.flow_steps, 1e-4)):
        flow = study(f"study.flow_steps={steps}").flow
        found = flow.log_density(partial(exact, shipped.mixture), points)
        assert (found - closed).abs().max() < most


def test_a_net_has_a_density_that_adds_to_one(shipped, start):
    """Whatever it says of the noise; where it says s x, nothing moves: N(0, I) is the density."""

    def predict(points, u):
        return shares(u)[1] * points + 0.3 * start.predict(points, u)

    grid = measures.Grid(6.0, 48)
    found = shipped.flow.log_density(predict, grid.points)
    assert grid.mass(found) == pytest.approx(1, abs=5e-3)
    plain = shipped.flow.log_density(lambda points, u: shares(u)[1] * points, grid.points)
    normal = -0.5 * grid.points.square().sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(plain, normal, rtol=0, atol=5e-3)
    assert (found - plain).abs().max() > 0.1


def test_the_bound_of_the_exact_denoiser_is_the_likelihood():
    """Its surrogate's differences between points are those of the log-density, point by point:
    the bound is tight where the denoiser is its own density's (Kong et al. 2023, 2302.03792)."""
    mixture = Mixture([[1.0, 0.0], [-0.8, 0.6]], 0.4)
    kept = Noising(400, 2.5e-4, 0.05).kept
    schedule = Schedule(kept.sqrt(), (1 - kept).sqrt(), kept, TARGETS["epsilon"])
    nodes, masses = (torch.tensor(it) for it in hermegauss(24))  # the mean over noise, exactly
    noise = torch.cartesian_prod(nodes, nodes)
    mass = torch.outer(masses, masses).flatten() / (2 * math.pi)
    pair = torch.tensor([[1.0, 0.2], [-0.5, -0.9]], dtype=torch.float64)
    surrogate = torch.zeros(2, dtype=torch.float64)
    for a, s, weight in zip(schedule.image.tolist(), schedule.noise.tolist(), bound(schedule)):
        errors = [
            mass @ (noise - mixture.noise(a * x + s * noise, a, s)).square().mean(1) for x in pair
        ]
        surrogate -= weight * torch.stack(errors) / len(schedule)  # scale 1: half of two
    truth = mixture.log_density(pair)
    assert surrogate.diff().item() == pytest.approx(truth.diff().item(), abs=0.02)
    assert abs(truth.diff().item()) > 5


# -- the surrogate and what trains on it


def learner(shipped, start, method, lr=1e-2):
    weights = shipped.weights(shipped.schedule)
    return Learner(method, start, shipped.schedule, lr, scale=12.0, weights=weights)


def test_at_the_reference_the_margin_is_nothing(shipped, start):
    reference = ImageScorer(start, shipped.schedule, scale=12.0, weights=shipped.schedule.image)
    batch = shipped.batch(shipped.drawn_pairs(8, "some"), reference, 3)
    assert torch.equal(reference(batch).logps, batch.reference)
    sides = study(*TINY).sight(scale=12.0, weights=shipped.schedule.image).under(start)
    assert all(not it.any() for it in sides.less(sides))


def test_a_step_descends_the_loss_by_finite_differences(shipped, start):
    """The direction of DPO is the slope of its mean over the batch's pairs."""
    method = Method(partial(losses.dpo, beta=0.3, label_smoothing=0.0), NoLower())
    made = learner(shipped, start, method)
    made.denoiser.double()
    batch = shipped.batch(shipped.drawn_pairs(8, "some").double(), made.scorer, 0)
    before = [p.detach().clone() for p in made.theta]
    problem = made._problem(batch, 0, {})
    direction = method.solver.step(problem, {}).direction
    along = [torch.randn(p.shape, generator=seeded(1), dtype=p.dtype) for p in before]
    values = []
    for length in (1e-5, -1e-5):
        with torch.no_grad():
            for p, at, by in zip(made.theta, before, along):
                p.copy_(at + length * by)
        values.append(problem.upper(made.theta).mean().item())
    slope = sum((d * by).sum().item() for d, by in zip(direction, along))
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("solver", ["none", "penalty", "unrolled", "implicit", "alternating"])
def test_every_solver_moves_it(solver):
    made = study(*TINY, "loss=ipo", "loss/divergence=js", f"solver={solver}")
    assert [*made.trained][:-1] == [*METHODS]
    net = Denoiser(made.denoiser.net(2, 2, 0), made.flow).eval().requires_grad_(False)
    surrogate = {"scale": 12.0, "weights": made.schedule.image}
    reference = ImageScorer(net, made.schedule, **surrogate)
    one = Learner([*made.trained.values()][-1], net, made.schedule, 1e-3, **surrogate)
    before = [p.detach().clone() for p in one.theta]
    one.step(made.batch(made.drawn_pairs(8, "some"), reference, 0), 0)
    assert any(not torch.equal(p, at) for p, at in zip(one.theta, before))


def test_what_loss_says_is_one_more_method_if_it_is_none_of_them():
    assert [*study().trained] == [*METHODS]
    assert [*study("loss=ipo").trained] == [*METHODS, "ipo"]
    assert [*study("loss=ipo", "loss/divergence=js").trained] == [*METHODS, "ipo"]
    parts = ("loss.parts.dpo.weight=1", "loss.parts.sft.weight=0.1")
    assert [*study("loss=mixture", *parts).trained] == [*METHODS, "mixture"]
    assert [*study("loss=spo").trained] == [*METHODS]
    assert [*study("loss=hinge", "solver=penalty").trained] == [*METHODS, "hinge, Penalty"]


def test_measures_by_hand():
    one, other = torch.tensor([1.0, 2.0, 3.0, 10.0]), torch.tensor([2.0, 4.0, 9.0, 11.0])
    assert measures.spearman(one, other) == pytest.approx(1)
    assert measures.slope(2 * other, other) == pytest.approx(2)
    assert measures.pearson(one, -one) == pytest.approx(-1)
    half, most = torch.tensor([0.5, 0.5]).log(), torch.tensor([0.75, 0.25]).log()
    by_hand = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    assert measures.kl(half + 3, most) == pytest.approx(by_hand, abs=1e-6)
    grid = measures.Grid(1.0, 2)
    assert grid.points.tolist() == [[-0.5, -0.5], [-0.5, 0.5], [0.5, -0.5], [0.5, 0.5]]
    assert grid.mass(torch.zeros(4)) == pytest.approx(4)
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    found = measures.by_centre(torch.tensor([0.1, 0.2, 0.3, 0.4]).log(), grid.points, centres)
    assert found == pytest.approx([0.3, 0.7])


# -- runs


def left(directory):
    return {name: (directory / name).read_bytes() for name in FILES}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing stopped."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "checkpoints").mkdir()
    study(*TINY).run(directory, nowhere, **PACE)
    return directory


@pytest.mark.parametrize(
    "end, at",
    [
        (Interrupted(143, "stopped"), 3),  # the denoiser
        (Killed(), 3),  # no checkpoint yet
        (Interrupted(143, "stopped"), 9),  # the methods, past a moment
        (Killed(), 11),
    ],
)
def test_a_stopped_mixture_ends_as_if_it_had_not_been(whole, tmp_path, end, at):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(type(end)):
        study(*TINY).run(tmp_path, ending(end, at), **PACE)
    assert not (tmp_path / "metrics.json").exists()
    study(*TINY).run(tmp_path, nowhere, **PACE)
    assert left(tmp_path) == left(whole)


@pytest.mark.slow
def test_the_command_trains_reports_goes_on_and_refuses(whole, tmp_path):
    words = (EXPERIMENT, *TINY, "hydra.run.dir=run")
    done = forked(tmp_path, *words, "study.mixture.spread=0")
    assert done.code == 2
    (line,) = done.err.strip().splitlines()
    assert line == "error: study.mixture.spread must be above 0, not 0"
    done = forked(tmp_path, *words)
    assert done.code == 0, done.err
    run = tmp_path / "run"
    assert left(run) == left(whole)  # same seed, same numbers
    for name in ("methods.md", "report.html", "figures/densities.svg", "figures/pairs.png"):
        assert (run / name).stat().st_size
    done = forked(tmp_path, EXPERIMENT, "hydra.run.dir=run", "ckpt_path=last")
    assert done.code == 0, done.err
    assert left(run) == left(whole)


def test_what_a_mixture_leaves_is_shown(whole):
    numbers = json.loads((whole / "metrics.json").read_text())
    assert set(numbers["init"]) == {"start/kl", "start/score"}
    final = numbers["final"]
    for name in ("pearson/surrogate", "spearman/bound", "displaced/truth", "kl_from_best"):
        assert {f"{name}/{method}" for method in METHODS} <= final.keys()
    modes = [final[f"mode{n}/best"] for n in range(1, 7)]
    assert sum(modes) == pytest.approx(1)
    with (whole / "moments.csv").open() as file:
        rows = [*csv.DictReader(file)]
    assert [(row["method"], row["step"]) for row in rows[-5:]] == [(m, "5") for m in METHODS]
    run = read(whole, "run", {})
    titles = [section.title for section in sections(run)]
    assert {"Does the surrogate follow the likelihood?", "Densities"} <= {*titles}
    assert final["pearson"] == pytest.approx(
        sum(final[f"pearson/surrogate/{method}"] for method in METHODS) / len(METHODS)
    )


def test_other_seeds_have_other_mixtures(whole, tmp_path):
    (tmp_path / "checkpoints").mkdir()
    study(*TINY, "seed=1").run(tmp_path, nowhere, **PACE)
    assert all(left(tmp_path)[name] != content for name, content in left(whole).items())


def test_what_the_mixture_heeds():
    cfg = config(EXPERIMENT)
    assert goes_on(cfg) and heeds(cfg, "loss.beta") and heeds(cfg, "solver.weight")
    assert not heeds(cfg, "max_steps") and not heeds(cfg, "optimizer.lr")


@pytest.mark.parametrize(
    "words, said",
    [
        (["study.measuring.moments=[30,10]"], "moments=.30, 10. must be steps that rise"),
        (["study.preference.heights=[1,2]"], "3 centres and 2 heights"),
        (["study.grid.side=1"], "study.grid.side=1"),
        (["study.lr=0"], "study.lr must be above 0, not 0"),
        (["loss=tdpo1"], "this loss reads a distribution over tokens, which points lack: take"),
        (["loss=dpo", "loss.wpo=true"], "this loss reads the probabilities of other tokens"),
    ],
)
def test_a_mixture_that_cannot_be_meant_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        study(*words)


@pytest.mark.slow
def test_seeds_of_a_mixture_are_shown_with_intervals(tmp_path):
    words = ("seed=0,1", "hydra.sweep.dir=sweep")
    done = forked(tmp_path, "-m", EXPERIMENT, *TINY, *words, timeout=300)
    assert done.code == 0, done.err
    assert "Each method over the seeds" in (tmp_path / "sweep/report.html").read_text()
    done = forked(tmp_path, "sweep", module=("-m", "spo_lightning.report"))
    assert done.code == 0, done.err
    assert "2 seeds. Densities" in (tmp_path / "sweep/table.md").read_text()
