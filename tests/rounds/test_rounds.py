"""Loops of tiny models: rounds stand on one another, go on after a stop, or are refused."""

import json
import random
import signal
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from conftest import SMALL, end, start
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pairs import CONF
from safetensors.torch import load_file

from spo_lightning.config.knobs import Given
from spo_lightning.data.load import load
from spo_lightning.data.rows import Task
from spo_lightning.errors import UserError
from spo_lightning.records.progress import silent
from spo_lightning.rounds import page
from spo_lightning.rounds.asked import refuse
from spo_lightning.rounds.compare import report
from spo_lightning.rounds.drawing import shared
from spo_lightning.rounds.loop import iterate
from spo_lightning.run.record import Read
from spo_lightning.sweep import again
from spo_lightning.world import ALONE

WAYS = ("whole", "cut")  # left alone, and killed
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


def test_it_is_compared_with_itself(whole, tmp_path):
    place, record = whole
    lines = report([place], tmp_path / "out").splitlines()
    assert lines[0].startswith("| setting | round | seeds | score | win: start |")
    assert lines[4].startswith(f"| run | 2 | 1 | {record['rounds'][1]['judged']['after']:.3f} |")


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


def test_apo_begins_ahead_and_lower_texts_grow(tmp_path, cache):
    """Also the reference at the loop's start: the formula, and what the second run is told."""
    words = ("loop=apo", "loop.betas=[0.05,0.5]", "loop.reference=start", "loop.lower=all")
    walked(tmp_path, cache, *words, "solver=penalty", "loop.answers=4")
    start, one, ahead = (
        weights(tmp_path / name) for name in ("start", "round-1/model", "ahead-1")
    )
    for name, value in ahead.items():
        wanted = one[name].double() + 0.3 * (one[name].double() - start[name].double())
        assert (value.double() - wanted).abs().max() <= 1e-7 * max(1, wanted.abs().max())
        assert not torch.equal(value, one[name])
    first, second = (OmegaConf.load(tmp_path / f"round-{n}/config.yaml") for n in (1, 2))
    assert second.model.pretrained == str(tmp_path / "ahead-1")
    assert second.model.reference == str(tmp_path / "start") and first.model.reference is None
    assert (first.loss.beta, second.loss.beta, second.solver.beta) == (0.05, 0.5, 0.5)
    pairs = [rows(tmp_path / f"pairs-{n}.jsonl") for n in (1, 2)]
    texts = [row["completion"] for row in rows(tmp_path / "lower-2.jsonl")]
    assert texts == [row["chosen"] for some in pairs for row in some]
    assert second.data.sft == str(tmp_path / "lower-2.jsonl")
    assert not (tmp_path / "ahead-2").exists()


def test_alpha_0_is_iterative():
    apo = composed("loop=apo", "loop.alpha=0", "loop.betas=null", "loop.answers=4")
    assert apo == composed("loop=iterative")


def test_spin_chooses_the_datas_answer(tmp_path, cache):
    """Of this round and the last one; here the answers are SFT rows, and a judge only looks on."""
    walked(tmp_path, cache, "loop=spin")
    given = {row["prompt"]: row["completion"] for row in load(composed().data).sft}
    for number in (1, 2):
        pairs = rows(tmp_path / f"pairs-{number}.jsonl")
        assert pairs and all(row["chosen"] == given[row["prompt"]] for row in pairs)
        assert all(row["rejected"] != row["chosen"] for row in pairs)
    both = OmegaConf.load(tmp_path / "round-2/config.yaml").data.pairs
    assert both == [str(tmp_path / f"pairs-{n}.jsonl") for n in (1, 2)]


def test_rso_keeps_some_of_many(tmp_path, cache):
    words = ("loop=rso", "loop.answers=12", "strategy.keep=4", "strategy.beta=1")
    record = walked(tmp_path, cache, *words, "loop.rounds=1", "loop.prompts=6")
    (one,) = record["rounds"]
    drawn = rows(tmp_path / "pairs-1.samples.jsonl")[1:]
    assert len(drawn) == one["prompts"] == 6 and {len(d["samples"]) for d in drawn} == {12}
    pairs = rows(tmp_path / "pairs-1.jsonl")
    assert 0 < len(pairs) <= 12
    with initialize_config_dir(str(CONF), version_base="1.3"):
        own = compose("iterate", ["loop=rso"])
    assert own.loss.beta == 0.05 and own.solver._target_.endswith("NoLower")


def test_xpo_judges_an_answer_beside_the_starts(tmp_path, cache):
    words = ("loop=xpo", "loss=xpo", "loop.rounds=2", "loop.prompts=64", "data.prompts=64")
    walked(tmp_path, cache, *words)
    sides = set()
    for number in (1, 2):
        drawn = {
            one["number"]: one for one in rows(tmp_path / f"pairs-{number}.samples.jsonl")[1:]
        }
        theirs = rows(tmp_path / f"beside-{number}.samples.jsonl")[1:]
        assert len(theirs) == 64 and all(one["scores"] == [None] for one in theirs)
        for one in theirs:
            assert drawn[one["number"]]["samples"][1:] == one["samples"]
        pairs = rows(tmp_path / f"pairs-{number}.jsonl")
        sides |= {row["reference_side"] for row in pairs}
        for row in pairs:
            own, other = drawn[row["prompt_number"]]["samples"]
            assert row[row["reference_side"]] == other != own and "beside" not in row
            assert row["chosen_score"] > row["rejected_score"]
    assert sides == {"chosen", "rejected"}
    run = OmegaConf.load(tmp_path / "round-2/config.yaml")
    assert run.model.reference == str(tmp_path / "start") != run.model.pretrained
    assert all("reference_side" in row for row in load(run.data).train)


def test_prompts_are_asked_in_turn():
    cfg = composed("loop.prompts=3")
    task = Task(train=[{"prompt": p} for p in "abcd"], held_out=[])
    at = Read(cfg, ALONE, silent(), {}, task)
    asked = ["".join(row["prompt"] for row in shared(n, None, at).task.train) for n in (1, 2, 3)]
    assert asked == ["abc", "dab", "cda"]
    with pytest.raises(UserError, match="this data has no prompts"):
        shared(1, None, Read(cfg, ALONE, silent(), {}, Task(train=[{"prompt": ""}], held_out=[])))


@pytest.mark.parametrize(
    "words, told",
    [
        (["max_steps=0"], "no round would train"),
        (["loss=reward"], "what gives rewards writes no answers"),
        (["data.pairs=x.jsonl"], "a loop makes its pairs"),
        (["ckpt_path=last"], "goes on with resume=DIR"),
        (["model.lora.rank=4"], "set model.lora.merge=true"),
        (["loop.lower=all"], "solver=none has no lower level"),
        (["data.sft=own", "solver=penalty"], "data.sft has no effect: loop.lower is round"),
        (["loop=apo", "loop.rounds=4"], "give 4 numbers above 0"),
        (["loop=apo", "loss.beta=1"], "loss.beta has no effect"),
        (["loop=rso", "loop.answers=4"], "strategy.keep=8 of loop.answers=4"),
        (["loop=spin", "strategy=all_pairs"], "strategy has no effect"),
        (["engine=openai", "engine.model=m"], "a round's answers are its own policy's"),
        (["loop.reference=start", "model.reference_sync=hard"], "moves a round's own start"),
        (["loss=xpo"], "turns away from what the loop's start answers: take loop=xpo"),
        (["loss=mixture", "loss.parts.xpo.weight=1"], "take loop=xpo"),
        (["loop=spin", "loop.beside=1"], "loop.beside has no effect"),
        (["loop=xpo", "loss=xpo", "loop.reference=round"], "take loop=xpo"),
    ],
)
def test_refused_before_anything_is_read(words, told):
    cfg = composed(*words)
    keys = [word.partition("=")[0] for word in words]
    with pytest.raises(UserError, match=told) as refused:
        refuse(cfg, Given(keys, {}, cfg))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "words, told",
    [
        (["data=slips"], "judge=task: this data has none"),
        (["loop.answers=1"], "a judge tells answers apart"),
        (["data=slips", "loop=xpo", "loss=xpo"], "judge=task: this data has none"),
        (["judge=function", "judge.path=test_rounds.alike"], "its answers are all alike"),
    ],
)
def test_refused_at_the_first_round(words, told, tmp_path, cache):
    with pytest.raises(UserError, match=told):
        walked(tmp_path, cache, *words)
    left = {path.name for path in tmp_path.iterdir()}
    drawn = {"config.yaml", "loop.json", "pairs-1.samples.jsonl", "start"}
    assert left == (drawn if "alike" in words[-1] else set())


def alike(row, text):
    return 1.0


def test_a_command_is_found_again(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "l").mkdir()
    record = {"command": ["loop=apo", "hydra.run.dir=l"], "cwd": str(tmp_path), "rounds": []}
    (tmp_path / "l" / again.LOOP).write_text(json.dumps(record))
    words = again.words(["resume=l", "loop.rounds=4"])
    place = tmp_path / "l"
    assert words == ["loop=apo", "loop.rounds=4", f"hydra.run.dir={place}", f"resume={place}"]
    with pytest.raises(UserError, match="no loop to go on with"):
        again.words(["resume=elsewhere"])


def changed(process: subprocess.Popen, place: Path, times: int) -> bool:
    """Wait until its directory has changed so often, or it has ended; whether it still runs."""
    before: set[Path] = set()
    while process.poll() is None and times:
        with suppress(FileNotFoundError):  # of a folder that went away meanwhile
            now = set(place.rglob("*"))
            times, before = times - (now != before), now
        time.sleep(0.01)
    return process.poll() is None


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("loop", ["apo", "spin", "xpo"])
def test_killed_ten_times_at_random_moments(loop, tmp_path, cache):
    """The end of a loop that was left alone, and the same records of answers."""
    chance, words = random.Random(loop), (*LITTLE, cache, f"loop={loop}", "loop.rounds=3")
    words += ("loss=xpo", "data.prompts=64") if loop == "xpo" else ()
    left = end(start(tmp_path, *words, "hydra.run.dir=whole", module=MODULE), 900)
    assert left.code == 0, left.err
    cut = tmp_path / "cut"
    process = start(tmp_path, *words, "hydra.run.dir=cut", module=MODULE)
    kills = 0
    while kills < 10 and changed(process, cut, chance.randint(1, 5)):
        process.send_signal(chance.choice([signal.SIGKILL, signal.SIGTERM]))
        end(process, 300)
        kills += 1
        more = ["resume=cut"] if (cut / again.LOOP).exists() else [*words, "hydra.run.dir=cut"]
        process = start(tmp_path, *more, module=MODULE)
    ended = end(process, 900)
    assert ended.code == 0 and kills == 10, ended.err
    for number in (1, 2, 3):
        assert same(*(tmp_path / way / f"round-{number}/model" for way in WAYS))
        one, two = (rows(tmp_path / way / f"pairs-{number}.samples.jsonl") for way in WAYS)
        assert [answers["samples"] for answers in one[1:]] == [a["samples"] for a in two[1:]]
