"""Loops beside each other: means by hand, and a loop that was walked."""

import json
import math

import pytest
import yaml

from spo_lightning.errors import UserError
from spo_lightning.records.directory import CHOICES
from spo_lightning.rounds.compare import differences, loops, report, settings

LOOPS = {("none", 0): (0.5, 0.6), ("none", 1): (0.7, 0.8), ("penalty", 0): (0.6, 0.9)}
LOOPS |= {("penalty", 1): (0.7, 1.0)}


def a_loop(place, solver, seed, matches, loop="iterative", loss="dpo"):
    """Of two rounds, which ends with these exact matches; all begin with .4."""
    place.mkdir(parents=True)
    choices = {"loop": loop, "loss": loss, "solver": solver}
    config = {"seed": seed, "solver": {"_target_": solver}, "sft": {"seed": seed}}
    config |= {"loop": {"rounds": len(matches)}}
    text = f"{CHOICES}{json.dumps(choices)}\n{yaml.safe_dump(config)}"
    (place / "config.yaml").write_text(text)
    rounds = [
        {
            "number": n,
            "init": {"exact_match": 0.4, "displacement/rate": 0.0},
            "final": {"exact_match": match, "displacement/rate": 0.25, "tasks/a/acc": 0.5},
            "judged": {"before": -1.0, "after": -0.5, "start": {"win_rate": 0.75}},
            "usable": 0.5,
        }
        for n, match in enumerate(matches, 1)
    ]
    (place / "loop.json").write_text(json.dumps({"rounds": rounds}))


def test_means_by_round_and_differences_by_seed(tmp_path):
    for number, ((solver, seed), matches) in enumerate(LOOPS.items()):
        a_loop(tmp_path / "in" / str(number), solver, seed, matches)
    text = report([tmp_path / "in"], tmp_path / "out")
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()]
    head, _, start, _, last, _, _, spo, *_ = lines
    told = [dict(zip(head, cells)) for cells in (start, last, spo)]
    assert [one["setting"] for one in told] == ["solver=none"] * 2 + ["solver=penalty"]
    assert [one["round"] for one in told] == ["0", "2", "2"]
    assert told[0]["exact_match"] == "0.400 ± 0.000" and told[0]["score"] == "-1.000 ± 0.000"
    assert told[0]["displacement/rate"] == told[0]["usable"] == told[0]["win: start"] == ""
    half = 12.706 * math.sqrt(0.02 / 2)  # of .6 and .8
    assert told[1]["exact_match"] == f"0.700 ± {half:.3f}"
    assert told[1]["win: start"] == "0.750 ± 0.000" and told[1]["tasks/a/acc"] == "0.500 ± 0.000"
    apart = dict(zip(lines[-3], lines[-1]))
    assert apart["less"] == "solver=penalty less solver=none" and apart["round"] == "2"
    half = 12.706 * math.sqrt(0.005 / 2)  # of .3 and .2
    assert apart["exact_match"] == f"+0.250 ± {half:.3f}"
    assert apart["displacement/rate"] == "+0.000 ± 0.000"
    assert (tmp_path / "out/compare.html").stat().st_size > 10_000
    assert (tmp_path / "out/figures/tasks-a-acc.png").exists()


def test_a_loop_on_its_way_counts_as_far_as_it_came(tmp_path):
    a_loop(tmp_path / "a", "none", 0, (0.5,))
    a_loop(tmp_path / "b", "none", 1, (0.5, 0.7))
    (some,) = settings(loops([tmp_path]))
    assert [len(one.runs) for one in some.every] == [2, 2, 1]
    assert some.every[2].values("exact_match") == {1: 0.7}


def test_a_loop_that_brings_a_loss_differs_in_one_word(tmp_path):
    for seed in (0, 1):
        a_loop(tmp_path / f"a{seed}", "none", seed, (0.5,))
        a_loop(tmp_path / f"b{seed}", "none", seed, (0.5, 0.9), "xpo", "xpo")
        a_loop(tmp_path / f"c{seed}", "penalty", seed, (0.5,), "xpo", "xpo")
    rows = differences(settings(loops([tmp_path])), ["exact_match"])
    assert [(row[0], row[1]) for row in rows] == [
        ("loop=xpo loss=xpo solver=none less loop=iterative loss=dpo solver=none", 1),
        ("loop=xpo loss=xpo solver=penalty less loop=xpo loss=xpo solver=none", 1),
    ]


def test_what_is_no_loop_is_told_in_one_line(tmp_path):
    with pytest.raises(UserError, match="no loop that has come to the end of a round in"):
        report([tmp_path], tmp_path / "out")
    (tmp_path / "loop.json").write_text('{"rounds": [{}]}')
    with pytest.raises(UserError, match=r"loop\.json: not as a loop writes it"):
        report([tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()
