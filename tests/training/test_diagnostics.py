"""Diagnostics: right against direct computations, free of side effects, absent when off."""

import csv
import json
import logging
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
from conftest import SMALL
from fitting import PAD_ID, config, objective, scored
from safetensors.torch import load_file
from tiny import policy, random_contexts, random_pairs
from watching import setting, watched

from spo_lightning.config import knobs
from spo_lightning.data.batch import Microbatches, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.train import train
from spo_lightning.training.callbacks.displacement import DisplacementAlarm
from spo_lightning.training.callbacks.evolution import Evolution
from spo_lightning.training.callbacks.geometry import Geometry, numbers
from spo_lightning.training.callbacks.overoptimisation import OverOptimisation
from spo_lightning.training.callbacks.probes import Probes, probe_set
from spo_lightning.training.callbacks.quality import Quality

ALL = (
    "diagnostics.evolution.every_n_steps=2",
    "diagnostics.geometry.every_n_steps=3",
    "diagnostics.ches.every_n_steps=4",
    "diagnostics.probes.every_n_steps=2",
    "diagnostics.overoptimisation.every_n_steps=2",
    "diagnostics.quality.every_n_steps=4",
)


# -- gradient geometry


def test_geometry_equals_direct_gradients():
    made = policy()
    given = scored(made.lm, random_pairs(8), shift=lambda n, r: 0.3 * math.sin(n) * r)
    loss, _, _ = objective("loss=dpo", "solver=none")
    scorer, batch = Scorer(made.lm, True), given.batch(range(8))
    found, reference = scorer(batch), reference_logps(batch)
    theta = [p for p in scorer.parameters() if p.requires_grad]
    lower = (-found.chosen / found.chosen_length).mean()
    four = (found.chosen.mean(), found.rejected.mean(), loss(found, reference).mean(), lower)
    w, r, u, v = (
        torch.cat([g.flatten() for g in torch.autograd.grad(x, theta, retain_graph=True)])
        for x in four
    )
    _, rows = watched(Geometry(setting(), every_n_steps=2), made, given=given, micro=3)
    assert "train/geometry/overlap" in rows[0] and "train/geometry/overlap" not in rows[2]
    expected = {
        "norm/chosen": w.norm(),
        "norm/rejected": r.norm(),
        "norm/upper": u.norm(),
        "norm/lower": v.norm(),
        "cosine/chosen_rejected": w @ r / w.norm() / r.norm(),
        "cosine/upper_lower": u @ v / u.norm() / v.norm(),
        "overlap": w @ r / (w @ w),
        "violation": torch.relu(-(u @ v) / u.norm()),
    }
    for name, value in expected.items():
        assert rows[0][f"train/geometry/{name}"] == pytest.approx(float(value), rel=1e-9), name
    assert rows[0]["train/grad_norm"] == pytest.approx(float(u.norm()), rel=1e-9)


def test_geometry_takes_the_lower_levels_own_texts():
    made = policy()
    diagnostic = Geometry(setting(), every_n_steps=1)
    fit, _ = watched(diagnostic, made, steps=1)
    texts = [replace(pair, rejected=()) for pair in random_pairs(8, seed=9)]
    below = collate(texts, PAD_ID)
    part = replace(scored(made.lm, random_pairs(8)).batch(range(8)), lower=below)
    *_, lower = diagnostic._gradients(fit.trainer, fit.module, Microbatches([part]))
    theta = tuple(fit.module.trainable().values())
    expected = torch.autograd.grad(-fit.module.scorer(below).mean_chosen.mean(), theta)
    torch.testing.assert_close(lower, expected, rtol=1e-9, atol=1e-12)


def test_geometry_of_hand_worked_gradients():
    def vector(*values):
        return (torch.tensor(values[:1]), torch.tensor(values[1:]))

    found = numbers(vector(3.0, 4.0), vector(6.0, 8.0), vector(0.0, 2.0), vector(1.0, -3.0))
    assert found["cosine/chosen_rejected"] == pytest.approx(1) and found["overlap"] == 2
    assert found["violation"] == pytest.approx(3)  # one unit against u = (0, 2): G rises by 3
    assert found["cosine/upper_lower"] == pytest.approx(-3 / math.sqrt(10))
    along = numbers(vector(1.0, 0.0), vector(0.0, 0.0), vector(0.0, 2.0), vector(1.0, 3.0))
    assert along["violation"] == 0 and along["cosine/chosen_rejected"] == 0


# -- displacement alarm

DEFAULT = {"every_n_steps": 1, "share": 0.5, "tolerance": 0.05, "window": 3, "stop": False}
# rate, fall per token, margin as logged: curves of loss=dpo and loss=spo on data=arithmetic
FALLS = [
    (0, 0, 0),
    (0.3, -0.02, 0.2),
    (0.5, -0.01, 0.4),
    (0.9, 0.25, 0.6),
    (1, 0.3, 1),
    (1, 0.3, 1),
]
HOLDS = [(0, 0, 0), (0.3, -0.02, 0.1), (0.6, 0.01, 0.4), (0.7, 0.03, 0.5), (0.6, 0.02, 0.6)]


def sounded(curve, **changes):
    alarm = DisplacementAlarm(setting(), **{**DEFAULT, **changes})
    return [alarm.sounds(*row) for row in curve]


def test_the_alarm_on_curves():
    assert sounded(FALLS) == [False, False, False, True, True, True]
    assert not any(sounded(HOLDS))
    shallow = [(1.0, 0.04, m) for _, _, m in FALLS]
    assert not any(sounded(shallow)) and any(sounded(shallow, tolerance=0.03))
    few = [(0.4, fall, margin) for _, fall, margin in FALLS]
    assert not any(sounded(few)) and any(sounded(few, share=0.3))
    sinking = [(rate, fall, -margin) for rate, fall, margin in FALLS]
    assert not any(sounded(sinking))
    assert sounded(FALLS, window=1) == [False, False, False, True, True, False]


def test_the_alarm_goes_on_from_its_state():
    one, two = (DisplacementAlarm(setting(), **DEFAULT) for _ in range(2))
    for row in FALLS[:3]:
        one.sounds(*row)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert two.sounds(*FALLS[3])


def test_the_alarm_reads_the_row_and_warns_once(caplog):
    """Reference far above the policy, and a margin that grows."""
    made = policy()
    given = scored(made.lm, random_pairs(8), shift=lambda n, r: 0 * r + 0.5)
    alarm = DisplacementAlarm(setting(), **{**DEFAULT, "window": 1})
    slow = partial(torch.optim.SGD, lr=1e-4)
    with caplog.at_level(logging.WARNING, "spo_lightning"):
        _, rows = watched(alarm, made, given=given, steps=4, optimizer=slow)
    assert [row["train/displacement/alarm"] for row in rows[1:]] == [1.0] * 3
    (said,) = [r.getMessage() for r in caplog.records if r.name.startswith("spo_lightning")]
    assert "by 0.50 nats per token" in said and "\n" not in said
    for remedy in ("solver=penalty", "loss=spo", "solver.weight", "optimizer.lr"):
        assert remedy in said


# -- likelihood over-optimisation

TOLERANCES = {"every_n_steps": 1, "entropy_tolerance": 0.1, "mass_tolerance": 0.1, "patience": 2}
TOLERANCES |= {"stop": True}


def reasons(entropy, mass, **changes):
    judge = OverOptimisation(setting(), **{**TOLERANCES, **changes})
    return [judge.turned(*look) for look in zip(entropy, mass)]


def test_entropy_that_rises_then_turns_down():
    flat = [0.9] * 6
    found = reasons([1.0, 1.3, 1.375, 1.3, 1.2, 1.25], flat)
    assert found[:5] == [None] * 5 and "from 1.3750 to 1.2500 bits" in found[5]
    assert not any(reasons([1.0, 1.3, 1.375, 1.2, 1.3, 1.2], flat))  # patience
    assert not any(reasons([1.4, 1.3, 1.2, 1.1, 1.0, 0.9], flat))  # never rose
    assert any(reasons([1.0, 1.3, 1.375, 1.2, 1.3, 1.2], flat, patience=1))


def test_mass_that_falls_while_entropy_rises():
    rising = [1.0, 1.1, 1.2, 1.3]
    found = reasons(rising, [0.95, 0.94, 0.875, 0.8])
    assert found[:3] == [None] * 3 and "fell by 0.1400 to 0.8000" in found[3]
    assert not any(reasons(rising, [0.95, 0.93, 0.91, 0.89]))  # by too little
    assert not any(reasons(rising, [0.95, 0.75, 0.76, 0.6]))  # not throughout


# -- probes


def test_probes_are_fixed_and_wrong():
    held = random_pairs(30)
    made = probe_set(held, 0.3, seed=1)
    assert made == probe_set(held, 0.3, seed=1) != probe_set(held, 0.3, seed=2)
    source = {pair.row: pair for pair in held}
    for kind, pairs in made.items():
        assert len(pairs) > 15
        for probe in pairs:
            own = source[probe.row]
            assert probe.prompt == own.prompt and probe.chosen != own.chosen
            if kind == "other":
                assert probe.chosen in {pair.chosen for pair in held}
            if kind == "shuffled":
                assert sorted(probe.chosen) == sorted(own.chosen)
                assert probe.chosen[-1] == own.chosen[-1]
            if kind == "corrupted":
                changed = sum(a != b for a, b in zip(probe.chosen, own.chosen, strict=True))
                assert 1 <= changed <= max(1, round(0.3 * len(own.chosen)))


def test_probes_leave_context_in_its_place():
    held = random_contexts(random_pairs(40, longest=30), seed=2)
    held = [pair for pair in held if pair.scored[0]]
    by_row = {pair.row: pair for pair in held}
    for kind, pairs in probe_set(held, 0.3, seed=1).items():
        assert any(probe.chosen_context for probe in pairs)
        for probe in pairs:
            own = by_row[probe.row]
            if kind == "other":
                there = [(pair.chosen, pair.chosen_context) for pair in held]
                assert (probe.chosen, probe.chosen_context) in there
                continue
            assert probe.chosen_context == own.chosen_context
            scored = {place for run in own.scored[0] for place in run}
            for place, (mine, theirs) in enumerate(zip(probe.chosen, own.chosen, strict=True)):
                assert mine == theirs or place in scored


def test_probes_score_nats_per_token():
    made = policy()
    about = setting(given=Pairs(random_pairs(12), None, PAD_ID))
    probes = Probes(about, every_n_steps=2, rows=8, share=0.5, seed=0)
    _, rows = watched(probes, made, steps=3)
    assert all("eval/probe/other" in row for row in rows)  # first, second, last
    for kind, pairs in probe_set(about.held.pairs[:8], 0.5, 0).items():
        batch = collate(pairs, PAD_ID)
        with torch.no_grad():
            expected = float(Scorer(made.lm, True)(batch).logps.mean())
        assert rows[2][f"eval/probe/{kind}"] == pytest.approx(expected, rel=1e-9)
        change = expected - probes.start[kind]
        assert rows[2][f"eval/probe/{kind}_change"] == pytest.approx(change, rel=1e-6)
        assert abs(change) > 1e-6


# -- the command line

REFUSED = {
    "diagnostics.evolution.every_n_steps=-1": "it must be at least 0",
    "diagnostics.probes.rows=50": "diagnostics.probes.every_n_steps is 0",
    "diagnostics.overoptimisation.every_n_steps=70": "a multiple of eval.every_n_steps (50)",
    "diagnostics.displacement.share=1": "it must be at least 0 and below 1",
    "data.drop_high_ches=1": "it must be at least 0 and below 1, or null",
}


@pytest.mark.parametrize("word", REFUSED)
def test_refused_in_one_line(word):
    given = knobs.Given([word.partition("=")[0]], {"loss": "spo"}, config())
    with pytest.raises(UserError) as caught:
        knobs.check(config(word), given)
    assert REFUSED[word] in str(caught.value) and word.partition("=")[0] in str(caught.value)


@pytest.mark.parametrize(
    "word", ["diagnostics.evolution.every_n_steps=1", "data.drop_high_ches=0.05"]
)
def test_accepted(word):
    given = knobs.Given([word.partition("=")[0]], {"loss": "spo"}, config())
    knobs.check(config(word), given)


# -- whole runs


def run(where, cache, *words):
    small = (*SMALL, cache, "loss=dpo", "eval.every_n_steps=2", "eval.max_rows=8", "max_steps=8")
    return train(config(*small, *words), where)


def cells(where, name="metrics.csv"):
    with (where / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if "/time/" not in k} for row in rows]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, cache):
    """The same run without any diagnostic, as by default, and with all of them."""
    home = tmp_path_factory.mktemp("runs")
    run(home / "off", cache, "diagnostics.displacement.every_n_steps=0")
    run(home / "default", cache)
    run(home / "all", cache, *ALL, "checkpoint.every_n_steps=3")
    return home


def test_diagnostics_leave_the_run_as_it_is(runs):
    weights = [load_file(runs / name / "model/model.safetensors") for name in ("off", "all")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for mine, theirs in zip(cells(runs / "off"), cells(runs / "all"), strict=True):
        assert mine.items() <= theirs.items()
    numbers = [json.loads((runs / n / "metrics.json").read_text()) for n in ("off", "all")]
    assert numbers[0]["final"] == numbers[1]["final"]


def test_off_means_off(runs):
    off, default, every = (set(cells(runs / name)[0]) for name in ("off", "default", "all"))
    assert default - off == {"train/displacement/alarm"}
    others = len(Evolution(setting(), every_n_steps=1).names) + len(Quality.names)
    assert len(every - default) == others + 8 + 6 + 1
    files = [{path.name for path in (runs / name).iterdir()} for name in ("off", "default")]
    assert files[0] == files[1]
    assert {"evolution.csv", "ches.csv"} == {p.name for p in (runs / "all").iterdir()} - files[0]


def test_rows_come_when_due(runs):
    rows = cells(runs / "all")
    due = {
        name: [int(r["step"]) for r in rows if r[name]]
        for name in ("train/evolution/slope/chosen", "train/geometry/overlap", "eval/probe/other")
    }
    assert [*due.values()] == [[1, 2, 4, 6, 8], [1, 3, 6], [1, 2, 4, 6, 8]]
    steps = [int(row["step"]) for row in cells(runs / "all", "evolution.csv")]
    assert steps == [step for step in (1, 2, 4, 6, 8) for _ in range(4)]


def test_quality_is_that_of_the_end(runs):
    rows, final = cells(runs / "all"), json.loads((runs / "all/metrics.json").read_text())["final"]
    name = "eval/exact_match"
    assert [int(row["step"]) for row in rows if row[name]] == [4, 8]
    assert float(rows[-1][name]) == final["exact_match"]


def test_a_resumed_run_has_the_same_diagnostics(runs, tmp_path, cache):
    words = (*ALL, "checkpoint.every_n_steps=3")
    run(tmp_path, cache, *words, "max_steps=5")
    late = {"step": "7", **dict.fromkeys(list(cells(tmp_path, "evolution.csv")[0])[1:], "1")}
    with (tmp_path / "evolution.csv").open("a") as file:  # as a kill after the checkpoint leaves
        file.write(",".join(late.values()) + "\n")
    run(tmp_path, cache, *words, "ckpt_path=last")
    # the run's first part ended at step 5, where probes look too
    probes = [name for name in cells(tmp_path)[0] if name.startswith("eval/probe")]
    whole, parts = (
        [{k: v for k, v in row.items() if k not in probes} for row in cells(place)]
        for place in (runs / "all", tmp_path)
    )
    assert whole == parts
    assert [r[probes[0]] for r in cells(tmp_path)][5:] == [
        r[probes[0]] for r in cells(runs / "all")
    ][5:]
    for name in ("evolution.csv", "ches.csv"):
        assert (tmp_path / name).read_bytes() == (runs / "all" / name).read_bytes(), name
    one, two = (load_file(p / "model/model.safetensors") for p in (runs / "all", tmp_path))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_an_alarm_without_a_stop(tmp_path, cache, caplog):
    words = [f"diagnostics.overoptimisation.{word}" for word in STOPS["overoptimisation"]]
    with caplog.at_level(logging.INFO, "spo_lightning"):
        done = run(tmp_path, cache, *words, OVEROPT, "optimizer.lr=0.03", "max_steps=60")
    assert done["steps"] == 60
    (said,) = [r.getMessage() for r in caplog.records if "Over-optimised" in r.getMessage()]
    alarms = {int(r["step"]): r[ALARM] for r in cells(tmp_path) if r[ALARM]}
    first = next(step for step, alarm in alarms.items() if float(alarm))
    assert f"since outer step {first}: top-10" in said
    assert [float(alarms[step]) for step in alarms] == [float(step >= first) for step in alarms]


ALARM, OVEROPT = "eval/overoptimisation/alarm", "diagnostics.overoptimisation.stop=false"
STOPS = {
    "overoptimisation": (
        "every_n_steps=2",
        "entropy_tolerance=0",
        "mass_tolerance=0",
        "patience=1",
    ),
    "displacement": ("stop=true", "share=0", "tolerance=0", "window=1"),
}


@pytest.mark.parametrize("name", STOPS)
def test_an_early_stop_ends_a_run_as_finished(tmp_path, cache, caplog, name):
    words = [f"diagnostics.{name}.{word}" for word in STOPS[name]]
    lr = "optimizer.lr=0.03"  # far enough for either to happen within the run
    with caplog.at_level(logging.INFO, "spo_lightning"):
        done = run(tmp_path, cache, *words, lr, "max_steps=60")
    assert 2 <= done["steps"] < 60
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", done["steps"])
    assert cells(tmp_path)[-1]["step"] == str(done["steps"])
    saved = torch.load(tmp_path / "checkpoints/last.ckpt", weights_only=True)
    assert saved["spo_lightning"]["outer_step"] == done["steps"]
    said = f"outer step {done['steps']}: top-10" if name != "displacement" else "Training stops"
    assert said in caplog.text
    again = run(tmp_path, cache, *words, lr, "max_steps=60", "ckpt_path=last")
    assert again["steps"] == done["steps"] and again["final"] == done["final"]
