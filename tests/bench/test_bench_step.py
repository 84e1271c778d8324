"""what=step: ours beside the floor and TRL's. Equality, arithmetic, refusals; never a time."""

import json
import math
from dataclasses import replace

import pytest
import torch
from benches import STEP, bench_config, measured, refused
from conftest import command, forked
from torch.utils.flop_counter import FlopCounterMode

from spo_lightning.bench import asked, output, step
from spo_lightning.bench.cell import Cell, as_text, drawn, save_model, word_tokenizer
from spo_lightning.bench.contestants import CONTESTANTS, dense, flops, race_of
from spo_lightning.bench.ours import Ours, Watch
from spo_lightning.config import knobs as checks
from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import encode_pairs
from spo_lightning.errors import Diverged

CELL = Cell("chat", 512, (4, 9), (3, 6))
LORA = ("model.lora.rank=4",)
needs_trl = pytest.mark.skipif(not CONTESTANTS["trl"].installed, reason="needs TRL")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """One cell of two contestants, and its directory."""
    directory = tmp_path_factory.mktemp("step")
    return measured(directory, *STEP, "contestants=[ours,floor]", "peak_flops=1e9"), directory


def test_what_it_leaves_behind(found):
    numbers, directory = found
    left = {path.name for path in directory.iterdir()}
    assert left == {"config.yaml", "bench.json", "table.md", "step.svg", "step.png"}
    assert json.loads((directory / "bench.json").read_text()) == numbers
    (cell,) = numbers["cells"]
    assert cell["shape"] == "chat" and cell["vocabulary"] == 512
    assert {name: len(taken) for name, taken in cell["seconds"].items()} == {"ours": 2, "floor": 2}
    ratio = cell["over_floor"]
    assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert numbers["mean"]["over_floor"] == pytest.approx(ratio["median"])
    assert "trl_over" not in cell and cell["trajectory_difference"] is None
    assert cell["utilisation"]["floor"] > 0
    assert len(cell["losses"]) == 10 and cell["losses"][0] == pytest.approx(math.log(2), abs=1e-6)
    text = (directory / "table.md").read_text()
    assert "ours / floor" in text and "TRL" not in text.split("- cpu")[0]
    assert "floor: a bare forward and backward" in text


@needs_trl
@pytest.mark.slow
def test_all_three_from_the_command(tmp_path):
    words = [word for word in STEP if word != "memory=false"]
    done = command(tmp_path, *words, "hydra.run.dir=run", module=("-m", "spo_lightning.bench"))
    assert (done.code, done.err) == (0, "")
    numbers = json.loads((tmp_path / "run/bench.json").read_text())
    (cell,) = numbers["cells"]
    assert cell["trajectory_difference"] <= 1e-4 and min(cell["losses"]) < 0.6
    assert list(cell["seconds"]) == list(cell["memory_mib"]) == ["ours", "floor", "trl"]
    assert cell["trl_over"]["median"] > 0 and cell["memory_over_trl"] > 0
    text = (tmp_path / "run/table.md").read_text()
    assert text in done.out and "On the CPU it scores every position" in text
    assert "losses differ by" in text and "memory 3/3" in done.out
    tight = ["tolerance=1e-30", "hydra.run.dir=tight"]
    done = command(tmp_path, *STEP, *tight, module=("-m", "spo_lightning.bench"))
    assert done.code == 1
    assert done.err.startswith("error: chat 512: our losses and TRL's differ by ")
    assert done.err.count("\n") == 1


@needs_trl
@pytest.mark.slow
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_adapters_on_few_bits_one_contestant_at_a_time(tmp_path, bits):
    """TRL's adapters are in bfloat16 there, and the two losses as near as that."""
    pytest.importorskip("bitsandbytes")
    wide = ("model.config.hidden_size=64", "model.config.intermediate_size=96")
    words = (*wide, *LORA, f"model.quantize={bits}", "apart=true", "peak_flops=1e9")
    numbers = measured(tmp_path / "run", *STEP, *words, "tolerance=0.03")
    (cell,) = numbers["cells"]
    assert {name: len(taken) for name, taken in cell["seconds"].items()} == {
        "ours": 2, "floor": 2, "trl": 2
    }  # fmt: skip
    assert cell["utilisation"]["ours"] > 0 and cell["losses"][-1] != cell["losses"][0]


@pytest.mark.parametrize(
    "word, says",
    [
        ("contestants=[ours,them]", "some of ours, floor, trl, liger"),
        ("contestants=[floor]", "ours must be among them"),
        ("vocabularies=[4]", "must be at least 8"),
        ("vocabularies=[]", "name at least one"),
        ("shapes.chat.prompt=[9,4]", "shapes.chat.prompt=[9, 4]"),
        ("only=[absent]", "absent is none of shapes"),
        ("tolerance=0", "must be above 0"),
        ("peak_flops=-1", "must be above 0"),
        ("model.pretrained=here", "model.pretrained has no effect"),
        ('train=["nothing=1"]', "train=['nothing=1']"),
        ('train=["hardware.threads=2"]', "hardware.threads=2 stands on this command line"),
    ],
)
def test_refused(tmp_path, word, says):
    refused(tmp_path / "run", says, *STEP, word)


def test_few_bits_are_of_the_model_that_the_bench_builds():
    line = checks.Given(["model.lora.rank", "model.quantize"], {"what": "step"}, bench_config())
    checks.check(bench_config(*LORA, "model.quantize=nf4"), line)


def test_one_line_of_the_command(tmp_path):
    for words, says in ((["base=none"], "base"), (["contestants=[them]"], "contestants")):
        done = forked(tmp_path, *words, "hydra.run.dir=run", module=("-m", "spo_lightning.bench"))
        assert done.code == 2, done.err
        assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err


def test_without_trl_its_column_is_left_out(tmp_path, monkeypatch):
    missing = CONTESTANTS["trl"]._replace(needs=("no_such_package",))
    monkeypatch.setattr(step, "CONTESTANTS", {**CONTESTANTS, "trl": missing})
    numbers = measured(tmp_path / "run", *STEP, "contestants=[ours,trl]", "repetitions=1")
    (cell,) = numbers["cells"]
    assert list(cell["seconds"]) == ["ours"]
    assert "TRL is left out: it is not installed here" in (tmp_path / "run/table.md").read_text()


def test_the_training_commands_keys_hold_for_our_side(tmp_path):
    from hydra import compose, initialize_config_dir
    from pairs import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        words = ("model.attention=eager", "hardware.activation_checkpointing=true")
        cfg = compose("bench", [*STEP, *words, 'train=["log.every_n_steps=3"]'])
        mine = asked.trained(cfg)
    assert mine.model.attention == "eager" and mine.hardware.activation_checkpointing
    assert mine.log.every_n_steps == 3 and mine.optimizer.lr == 0.01
    assert mine.batch_size == 2 and mine.solver._target_.endswith("NoLower")


# -- what the contestants are made from


def test_text_and_tokens_say_the_same():
    pairs = drawn(CELL, 20, seed=1)
    tokenizer = word_tokenizer(512)
    kept = encode_pairs(
        as_text(pairs),
        tokenizer,
        max_length=CELL.longest,
        on_mismatch="error",
        strict=True,
        scored="assistant",
        where="here",
    )
    assert kept.pairs == pairs
    assert drawn(CELL, 20, seed=1) == pairs != drawn(CELL, 20, seed=2)
    for pair in pairs:
        assert 4 <= len(pair.prompt) <= 9 and pair.chosen[-1] == tokenizer.eos_token_id
        assert 3 <= len(pair.chosen) <= 6 and 3 <= len(pair.rejected) <= 6
    assert {len(pair.prompt) for pair in pairs} == {4, 5, 6, 7, 8, 9}


def race(directory, *words):
    """The pairs of ``CELL`` in their own order."""
    from hydra import compose, initialize_config_dir
    from pairs import CONF

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("bench", [*STEP, *words])
        mine = asked.trained(cfg)
    save_model(directory / "model", cfg.model, 512, seed=0)
    return replace(race_of(cfg, mine, CELL, directory), order=tuple(range(8)))


class Counted(Watch):
    """A watch that counts."""

    def __init__(self):
        self.begun = self.started = self.stopped = 0

    def begin(self):
        self.begun += 1

    def start(self):
        self.started += 1

    def stop(self):
        self.stopped += 1


@pytest.mark.slow
@pytest.mark.parametrize("name", [*CONTESTANTS])
def test_a_contestant_runs_again_as_before(tmp_path, name):
    kind = CONTESTANTS[name]
    if not kind.installed:
        pytest.skip(f"needs {kind.needs}")
    made = kind.make(race(tmp_path))
    first, second = Counted(), Counted()
    one, two = made.run(3, first), made.run(3, second)
    assert (first.begun, first.started, first.stopped) == (1, 3, 3) == tuple(vars(second).values())
    if name == "trl":
        assert len(one) == 3 and one == two
    if name == "ours":
        assert one[0] == two[0] == pytest.approx(math.log(2), abs=1e-6)


@needs_trl
@pytest.mark.parametrize("words", [(), LORA], ids=" ".join)
def test_ours_and_trls_losses_agree(tmp_path, words):
    stored = race(tmp_path, *words)
    ours = Ours.on(stored.cfg, stored.pairs).logging()
    mine = ours.run(4, Counted())
    given = replace(stored, order=tuple(ours.rows))
    theirs = CONTESTANTS["trl"].make(given).run(4, Counted())
    assert mine == pytest.approx(theirs, abs=1e-4)
    assert abs(mine[-1] - mine[0]) > 1e-3  # they moved
    assert step.agree(CELL, mine, theirs, 1e-4) <= 1e-4


def test_losses_that_differ_end_the_measurement():
    with pytest.raises(Diverged, match="differ by 0.5 in step 2 of 3"):
        step.agree(CELL, [0.7, 0.6, 0.5], [0.7, 0.1, 0.5], 1e-4)
    with pytest.raises(Diverged):
        step.agree(CELL, [math.nan], [0.7], 1e-4)


def test_the_floors_rows():
    pairs = [Pair((1, 2, 3), (4, 5), (6, 7, 8)), Pair((1, 2), (3, 4, 5), (6, 7))]
    ids, rows, columns, targets = dense(pairs, torch.device("cpu"))
    assert ids.tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 1, 2, 3, 4, 5, 6]]  # 15 tokens, 14 fit
    assert rows.tolist() == [0] * 5 + [1] * 5 and columns.tolist() == [6, 5, 4, 3, 2] * 2
    assert len(targets) == 10


# -- arithmetic


def test_ratios_within_a_round():
    assert output.ratio([2.0, 3.0, 16.0], [1.0, 2.0, 4.0]) == {"median": 2, "min": 1.5, "max": 4}
    assert output.spread({"median": 2, "min": 1.5, "max": 4}, 1) == "2.0 (1.5..4.0)"
    with pytest.raises(ValueError):
        output.ratio([1.0], [1.0, 2.0])


def test_comparisons_and_their_means():
    seconds = {"ours": [1.0, 2.0], "floor": [0.5, 1.0], "trl": [4.0, 8.0]}
    cell = step.compared(seconds, {"ours": 1.0, "trl": 4.0})
    assert cell["over_floor"]["median"] == 2 and cell["trl_over"]["median"] == 4
    assert cell["memory_over_trl"] == 0.25
    other = step.compared({**seconds, "trl": [1.0, 2.0]}, {})
    assert "memory_over_trl" not in other
    assert step.means([cell, other]) == pytest.approx(
        {"over_floor": 2, "over_floor_worst": 2, "trl_over": 2, "trl_over_worst": 1}
    )


def test_flops_equal_torchs_count(tmp_path):
    given = race(tmp_path)
    lm = given.opened().requires_grad_(False)
    ids = torch.arange(12)[None]
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        lm(input_ids=ids, use_cache=False)
    # a response alone, every position scored; torch counts the whole square of attention
    mine = flops(given, [Pair((), tuple(range(12)), ())]) / 3
    square = 4 * 2 * 16 * (12 * 12 - 12 * 13 / 2)
    norms = 2 * 12 * 5 * 16  # weights that multiply no matrix: 2 per layer and the last
    assert mine + square - norms == pytest.approx(counter.get_total_flops(), rel=1e-3)
    # frozen weights have no gradient
    adapted = replace(given, cfg=race(tmp_path, *LORA).cfg)
    assert flops(adapted, given.pairs) == pytest.approx(2 / 3 * flops(given, given.pairs))


def test_the_picture_has_a_panel_per_shape(found, tmp_path):
    numbers, _ = found
    (cell,) = numbers["cells"]
    cells = [{**cell, "shape": shape, "vocabulary": v} for shape in "ab" for v in (8192, 500)]
    paths = step.picture({**numbers, "cells": cells}, tmp_path)
    drawing = paths[0].read_text()
    assert [path.name for path in paths] == ["step.svg", "step.png"]
    assert drawing.count("<!-- 8k -->") >= 1 and drawing.count("<!-- a -->") == 1


def test_every_question_composes():
    for what in ("step", "profile", "solvers", "growth", "jobs", "start"):
        assert bench_config(f"what={what}").what._target_ == f"spo_lightning.bench.{what}.measure"
