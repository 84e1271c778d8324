"""Loops of tiny models: rounds stand on one another, go on after a stop, and refuse in one line."""

import json
import random
from pathlib import Path

import pytest
import torch
from conftest import SMALL, forked
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairs import CONF
from safetensors.torch import load_file

from spo_lightning.config.knobs import Given
from spo_lightning.errors import UserError
from spo_lightning.rounds import page
from spo_lightning.rounds.asked import refuse
from spo_lightning.rounds.loop import iterate
from spo_lightning.world import ALONE

MODULE = ("-m", "spo_lightning.iterate")
# the small run, of answers that the data's own judge tells apart
ARITHMETIC = [w.replace("slips", "arithmetic") for w in SMALL]
LITTLE = (
    *ARITHMETIC,
    *("data.prompts=16", "data.eval_prompts=6", "max_steps=2", "loss=dpo"),
    *("report.enabled=false", "eval.every_n_steps=0", "loop.rounds=2", "optimizer.lr=3e-3"),
)


def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("iterate", [*LITTLE, *words])


def walked(place: Path, *words):
    return iterate(composed(*words), place, {}, [], ALONE)


def weights(place: Path) -> dict[str, torch.Tensor]:
    return load_file(place / "model.safetensors")


def same(one: Path, other: Path) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, cache):
    """Two rounds of ``iterative``, and what its record holds."""
    place = tmp_path_factory.mktemp("whole") / "loop"
    return place, walked(place, cache)


def test_each_round_begins_where_the_last_one_ended(whole):
    place, record = whole
    assert [one["number"] for one in record["rounds"]] == [1, 2]
    for number, begins in ((1, "start"), (2, "round-1/model")):
        run = OmegaConf.load(place / f"round-{number}" / "config.yaml")
        assert run.model.pretrained == str(place / begins) and "loop" not in run
        assert run.data.pairs == [str(place / f"pairs-{number}.jsonl")]
        assert run.model.reference is None
        pairs = rows(place / f"pairs-{number}.jsonl")
        assert pairs and all(row["chosen_score"] > row["rejected_score"] for row in pairs)
        assert {row["model"] for row in pairs} == {str(place / begins)}
    assert not same(place / "start", place / "round-1/model")
    assert not same(place / "round-1/model", place / "round-2/model")


def test_the_page_shows_the_rounds(whole):
    place, record = whole
    last = record["rounds"][-1]
    judged = last["judged"]
    told = rows(place / "round-2/samples.jsonl")
    before, after = ([row[end].count(",") for row in told] for end in ("before", "after"))
    assert judged["after"] == sum(after) / len(after)
    wins = [(a > b) + (a == b) / 2 for a, b in zip(after, before)]
    assert judged["last"]["win_rate"] == sum(wins) / len(wins)
    found = (place / page.NAME).read_text()
    for title in ("Win rate", "Displacement", "Prompts with a usable pair"):
        assert title in found
    assert page.table(record["rounds"]).splitlines()[0].split()[:2] == ["round", "score"]


def test_a_loop_that_ended_goes_on_to_more_rounds_and_draws_nothing_again(whole, tmp_path, cache):
    """One round, then the same to two: the end of two at once; a third try does nothing."""
    place, _ = whole
    mine = tmp_path / "loop"
    walked(mine, cache, "loop.rounds=1")
    kept = (mine / "pairs-1.samples.jsonl").stat().st_mtime_ns
    walked(mine, cache)
    assert same(mine / "round-2/model", place / "round-2/model")
    assert (mine / "pairs-1.samples.jsonl").stat().st_mtime_ns == kept
    before = (mine / "round-2/metrics.json").stat().st_mtime_ns
    walked(mine, cache)
    assert (mine / "round-2/metrics.json").stat().st_mtime_ns == before
    with pytest.raises(UserError, match="optimizer.lr is 0.003 in .* and 0.1 here"):
        walked(mine, cache, "optimizer.lr=0.1")
