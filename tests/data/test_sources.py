"""Every source: what it draws or reads, its two sides, its refusals, and how yaml composes it."""

import json
import pickle
import random
import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from test_encode import message

from spo_lightning.data.load import load
from spo_lightning.data.rows import Task, held_out
from spo_lightning.data.tasks.arithmetic import commas, final_integer, worked
from spo_lightning.data.tasks.gsm8k import MODELS, final_number
from spo_lightning.data.tasks.slips import chain, slipped

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared/data"
GSM8K, STORIES = SHARED / "gsm8k", SHARED / "tinystories/tinystories_sample.txt"


@pytest.fixture(scope="module")
def compose_data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    search = f"hydra: {{searchpath: ['file://{ROOT / 'conf'}']}}"
    (folder / "run.yaml").write_text(f"defaults: [data: arithmetic, _self_]\n{search}\n")
    with initialize_config_dir(str(folder), version_base="1.3"):
        yield lambda *overrides: compose("run", list(overrides)).data


@pytest.fixture
def source(compose_data):
    return lambda *overrides: load(compose_data(*overrides))


def refusal(source, *overrides):
    return message(source, *overrides)


def prompts(rows):
    return {json.dumps(row["prompt"]) for row in rows}


def disjoint(task: Task):
    train, held, sft = prompts(task.train), prompts(task.held_out), prompts(task.sft)
    assert task.train and task.held_out and not held & train and not held & sft
    return True


def needs(path):
    return pytest.mark.skipif(not path.exists(), reason=f"needs {path.name}")


def small(name, *more):
    return (f"data={name}", "data.sft_rows=40", "data.prompts=30", "data.eval_prompts=20", *more)


def evaluated(prompt):
    assert re.fullmatch(r"[\d+-]+=\?", prompt)
    return eval(re.sub(r"\b0+(\d)", r"\1", prompt.removesuffix("=?")))


def test_arithmetic_problems_answers_and_chains(source):
    task = source("data=arithmetic")
    assert [len(task.train), len(task.held_out), len(task.sft)] == [2000, 500, 4000]
    assert disjoint(task) and not prompts(task.train) & prompts(task.sft)
    assert len(prompts(task.train)) == 2000 and len(prompts(task.sft)) == 4000
    assert (task.samples, task.temperature) == (4, 1.0)
    for row in task.train + task.held_out:
        assert row.keys() == {"prompt", "answer"}
        assert re.fullmatch(r"[1-9]([+-][1-9]){3}=\?", row["prompt"])
        assert int(row["answer"]) == evaluated(row["prompt"])
        assert held_out(row["prompt"], 0.1) == (row in task.held_out)
    ends = "".join(re.sub("[^;,]", "", row["completion"]) for row in task.sft)
    assert len(ends) == 12000 and ends.count(",") / 12000 == pytest.approx(0.5, abs=0.02)
    for row in task.sft[:200]:
        assert task.answer_of(row["completion"]) == str(evaluated(row["prompt"]))
        assert task.judge(row["completion"]) == row["completion"].count(",")


def test_a_chain_by_hand():
    assert worked("7+5-3+9=?") == [(7, "+", 5, 12), (12, "-", 3, 9), (9, "+", 9, 18)]
    assert chain("12+7-5+9=?") == "12+7=19;19-5=14;14+9=23;"
    assert chain("3-7-1=?") == "3-7=-4;-4-1=-5;"


@pytest.mark.parametrize(
    "text, answer",
    [
        ("7+5=12;12-3=9,9+9=18;", "18"),
        ("3-7=-4,", "-4"),
        ("3-7=-4", "-4"),
        ("3-7=-4; \n", "-4"),
        ("7+5=12;12-3=", None),
        ("7+5=12;12", None),
        ("12", None),
        ("", None),
        ("7+5=1 2", None),
    ],
)
def test_final_integer(text, answer):
    assert final_integer(text) == answer


def test_the_judge_counts_commas_whatever_is_right():
    assert commas("1=1,2=5,") == 2.0 and commas("1+1=2;") == 0.0


@pytest.mark.parametrize("name", ["arithmetic", "slips"])
def test_the_same_seed_gives_the_same_rows(source, name):
    one, same, other = (source(*small(name, f"data.seed={seed}")) for seed in (0, 0, 1))
    assert (one.train, one.held_out, one.sft) == (same.train, same.held_out, same.sft)
    assert one.train != other.train and one.sft != other.sft and one.held_out != other.held_out
    few = source(*small(name, "data.max_rows=7"))
    assert len(few.train) == 7 and few.held_out == one.held_out
    assert all(row in one.train for row in few.train)
    for function in (one.answer_of, one.judge):
        assert pickle.loads(pickle.dumps(function)) is function


def test_slips_differ_from_one_step_on(source):
    task = source("data=slips")
    assert [len(task.train), len(task.held_out), len(task.sft)] == [2000, 500, 1000]
    assert disjoint(task) and task.judge is None and task.samples == 0
    for row in task.train + task.held_out:
        assert row["chosen"] == chain(row["prompt"])
        assert task.answer_of(row["chosen"]) == row["answer"] == str(evaluated(row["prompt"]))
        assert task.answer_of(row["rejected"]) != row["answer"]
        wrong = [s for s in row["rejected"].split(";")[:-1] if evaluated_step(s) is False]
        assert len(wrong) == 1, row


def evaluated_step(step):
    left, right = step.rsplit("=", 1)
    return eval(left) == int(right)


def test_slips_reach_every_step():
    slips = [slipped("12+7-5+9=?", random.Random(seed)) for seed in range(60)]
    places = [
        [evaluated_step(step) for step in text.split(";")[:-1]].index(False) for text in slips
    ]
    assert {places.count(n) > 5 for n in range(3)} == {True}


def test_problems_of_a_file(source, tmp_path):
    path, other = tmp_path / "p.jsonl", tmp_path / "q.jsonl"
    texts = [f"{n}+7-5=?" for n in range(50)]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in texts + texts[:3]))
    other.write_text("\n".join(json.dumps({"prompt": text}) for text in texts[:5] + ["1+1=?"]))
    task = source(*small("slips", f"data.path={path}", "data.eval_fraction=0.3"))
    found = prompts(task.train) | prompts(task.held_out) | prompts(task.sft)
    assert found == {json.dumps(text) for text in texts} and disjoint(task)
    assert not prompts(task.sft) & prompts(task.train) and task.sft
    task = source(*small("arithmetic", f"data.path={path}", f"data.eval_path={other}"))
    assert [row["prompt"] for row in task.held_out] == texts[:5] + ["1+1=?"] and disjoint(task)
    path.write_text('{"prompt": "1+1=?"}\n{"prompt": "1*1=?"}')
    assert f"{path}, row 2: 'prompt' is not like" in refusal(
        source, "data=slips", f"data.path={path}"
    )


@needs(GSM8K)
@pytest.mark.parametrize("truth, count", [(False, 2426), (True, 3274)])
def test_gsm8k_counts(source, truth, count):
    task = source("data=gsm8k", f"data.path={GSM8K}", f"data.ground_truth={truth}")
    pairs = task.train + task.held_out
    assert len(pairs) == count and disjoint(task)
    assert len({(row["prompt"], row["chosen"], row["rejected"]) for row in pairs}) == count
    for row in pairs:
        assert task.answer_of(row["chosen"]) == row["answer"] != task.answer_of(row["rejected"])
    assert len(task.sft) == 7473
    assert all("A: " in row["completion"] and "####" not in row["completion"] for row in task.sft)
    assert task.sft[0]["completion"].endswith(
        "<<48+24=72>>72 clips altogether in April and May.\nA: 72"
    )
    assert all(task.answer_of(row["completion"]) is not None for row in task.sft)


def test_gsm8k_sft_never_holds_a_held_out_question(source, tmp_path):
    right, wrong = ({"solution": f"A: {n}", "is_correct": n == 1} for n in (1, 2))
    solved = dict(zip(MODELS, (right, wrong, wrong, wrong))) | {"ground_truth": "A: 1"}
    rows = [{"question": f"q{n}", "answer": "#### 1", **solved} for n in range(40)]
    write(tmp_path / "example_model_solutions.jsonl", rows)
    write(tmp_path / "train.jsonl", rows)
    task = source("data=gsm8k", f"data.path={tmp_path}")
    assert disjoint(task) and len(task.sft) == len(task.train) == 40 - len(task.held_out)


@needs(GSM8K)
def test_answers_agree_with_the_flags_of_the_data():
    with open(GSM8K / "example_model_solutions.jsonl") as file:
        rows = [json.loads(line) for line in file]
    flags = [
        (final_number(row["ground_truth"]) == final_number(row[model]["solution"]))
        == row[model]["is_correct"]
        for row in rows
        for model in MODELS
    ]
    assert len(flags) == 5276 and all(flags)


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 3.\nA: 18", "18"),
        ("#### $1,080.00", "1080"),
        ("A: 1\nA: -2.50.", "-2.5"),
        ("A: .5", ".5"),
        ("A: ten", None),
        ("18", None),
    ],
)
def test_final_number(text, answer):
    assert final_number(text) == answer


@needs(STORIES)
def test_stories_are_whole_and_meet_others(source):
    task = source("data=stories", f"data.path={STORIES}", "data.continuation_words=null")
    assert len(task.train) + len(task.held_out) == 2316 and disjoint(task)
    whole = [piece.strip() for piece in STORIES.read_text().split("<|endoftext|>")[:-1]]
    for row in task.train + task.held_out:
        assert len(row["prompt"].split()) == 32
    joined = [row["prompt"] + row["chosen"] for row in task.train + task.held_out]
    assert sorted(joined) == sorted(whole)
    assert [row["prompt"] + row["completion"] for row in task.sft] == joined[: len(task.train)]
    for side in (task.train, task.held_out):
        chosen = [row["chosen"] for row in side]
        assert sorted(chosen) == sorted(row["rejected"] for row in side)
        assert all(row["chosen"] != row["rejected"] for row in side)
    capped = source("data=stories", f"data.path={STORIES}")
    assert max(len(row["chosen"].split()) for row in capped.train) == 96
    assert capped.sft == task.sft
    assert all(row["prompt"] + row["chosen"] in joined[n] for n, row in enumerate(capped.train))


def write(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def asked(count, **extra):
    return [{"prompt": f"q{n}", "chosen": "a", "rejected": "b", **extra} for n in range(count)]


def test_pairs_of_a_file(source, tmp_path):
    path = write(tmp_path / "a.jsonl", asked(60) + asked(60))
    task = source("data=pairs", f"data.path={path}")
    assert len(task.train) + len(task.held_out) == 120 and disjoint(task)
    assert task.answer_of is None and task.sft == [] and not task.summary
    other = write(tmp_path / "b.jsonl", asked(3, answer=7))
    sft = write(tmp_path / "s.jsonl", [{"prompt": f"q{n}", "completion": "c"} for n in (1, 50)])
    both = (f"data.path={path}", f"data.eval_path={other}", f"data.sft={sft}", "data.summary=true")
    task = source("data=pairs", *both)
    assert len(task.held_out) == 3 and len(task.train) == 114 and disjoint(task) and task.summary
    assert [row["prompt"] for row in task.sft] == ["q50"]
    answered = source("data=pairs", f"data.path={other}")
    assert answered.answer_of(" 7\n") == "7" == answered.train[0]["answer"]


def test_a_mixture_keeps_its_proportions_and_sides(source):
    task = source("data=mixture")
    names = [row["source"] for row in task.train]
    assert (names.count("short"), names.count("long")) == (666, 2000)
    assert disjoint(task) and len(task.held_out) == 1000 and task.answer_of is final_integer
    assert all(
        row["prompt"].count("+") + row["prompt"].count("-") == 3
        for row in task.train
        if row["source"] == "short"
    )
    again = source("data=mixture", "data.max_rows=100", "data.weights={short: 3, long: 1}")
    assert [row["source"] for row in again.train].count("short") == 75 and len(again.train) == 100
    # one prompt, train side of the one and held-out side of the other
    uneven = source(
        "data=mixture",
        "data.sources.long.operations=3",
        "data.sources.long.eval_fraction=0.5",
        "data.sources.long.seed=3",
    )
    assert disjoint(uneven)


def rows_of(count, **extra):
    return [{"prompt": f"q{n}", "completion": f"c{n}", **extra} for n in range(count)]


@pytest.mark.parametrize("name", ["arithmetic", "slips"])
def test_the_lower_level_has_the_chosen_its_own_rows_or_a_file(source, tmp_path, name):
    task = source(*small(name))
    assert task.lower == []
    own = source(*small(name, "data.sft=own"))
    assert own.lower == own.sft == task.sft != [] and own.train == task.train
    held = [{"prompt": row["prompt"], "completion": "c"} for row in task.held_out[:3]]
    path = write(tmp_path / "s.jsonl", rows_of(2) + held + rows_of(2))
    read = source(*small(name, f"data.sft={path}"))
    assert read.lower == rows_of(2) + rows_of(2)
    assert (read.train, read.held_out, read.sft) == (task.train, task.held_out, task.sft)
    write(path, held)
    told = refusal(source, *small(name, f"data.sft={path}"))
    assert told.startswith(f"data.sft={path}: no SFT row is left")


def test_the_lower_level_of_pairs_is_their_sft_file(source, tmp_path):
    path = write(tmp_path / "a.jsonl", asked(40))
    assert source("data=pairs", f"data.path={path}").lower == []
    sft = write(tmp_path / "s.jsonl", rows_of(60))
    task = source("data=pairs", f"data.path={path}", f"data.sft={sft}")
    assert task.lower == task.sft and disjoint(task)
    assert len(task.lower) == 60 - len(task.held_out)
    write(sft, rows_of(2) + [{"prompt": "q", "completion": 3}])
    told = refusal(source, "data=pairs", f"data.path={path}", f"data.sft={sft}")
    assert f"{sft}, row 3: 'completion' is a number" in told


def test_the_lower_level_of_a_mixture(source, tmp_path):
    task = source("data=mixture")
    assert task.lower == []
    own = source("data=mixture", "data.sft=own")
    assert own.lower == own.sft == task.sft
    assert {row["source"] for row in own.lower} == {"short", "long"}
    held = [{"prompt": task.held_out[-1]["prompt"], "completion": "c"}]
    path = write(tmp_path / "s.jsonl", rows_of(4) + held)
    assert source("data=mixture", f"data.sft={path}").lower == rows_of(4)
    pairs = write(tmp_path / "a.jsonl", asked(60))
    mine = (
        "data=mixture", "+data@data.sources.mine=pairs", f"data.sources.mine.path={pairs}",
        "+data.weights.mine=1", "data.sft=own",
    )  # fmt: skip
    assert source(*mine).lower == task.sft
    both = source(*mine, f"data.sources.mine.sft={path}").lower
    assert [row for row in both if row["source"] == "mine"] == [
        {**row, "source": "mine"} for row in rows_of(4) if not held_out(row["prompt"], 0.1)
    ]


def test_a_mixture_of_different_answers_has_no_answer(source, tmp_path):
    path = write(tmp_path / "a.jsonl", asked(60, answer="x"))
    task = source(
        "data=mixture",
        "+data@data.sources.mine=pairs",
        f"data.sources.mine.path={path}",
        "+data.weights.mine=1",
    )
    assert task.answer_of is None
    assert {row["source"] for row in task.train} == {"short", "long", "mine"}


@pytest.mark.parametrize(
    "overrides, fragment",
    [
        (["data=gsm8k"], "data.path is not set"),
        (["data=stories"], "data.path is not set"),
        (["data=pairs"], "data.path is not set"),
        (["data=gsm8k", "data.path=no/such/place"], "example_model_solutions.jsonl: no such file"),
        (["data=stories", "data.path=none.txt"], "none.txt: no such file"),
        (["data.eval_path=a.jsonl"], "data.eval_path without data.path"),
        (["data.eval_path={a: b}"], "data.eval_path={'a': 'b'}: give str or null"),
        (["data=stories", "data.path=[a, b]"], "data.path=['a', 'b']: give str or null"),
        (["data=slips", "data.eval_path=a.jsonl"], "data.eval_path without data.path"),
        (["data.eval_fraction=1.5"], "data.eval_fraction=1.5"),
        (["data.eval_fraction=0"], "data.eval_fraction=0 with (4000, 2000, 500)"),
        (["data.operations=1"], "problems exist with data.operations=1"),
        (["data.samples=1"], "data.samples=1"),
        (["data.temperature=0"], "data.temperature=0"),
        (["data.max_rows=0"], "data.max_rows=0"),
        (["data.max_rows=ten"], "data.max_rows=ten: give int or null"),
        (["data.seed=true"], "data.seed=True: give int"),
        (["+data.samplse=3"], "data.samplse: arithmetic has no such key"),
        (["~data.samples"], "data.samples is missing"),
        (["data.sft=5"], "data.sft=5: give str or list or null"),
        (["data=slips", "data.sft=true"], "data.sft=True: give str or list or null"),
        (["data=mixture", "data.sft={a: b}"], "data.sft={'a': 'b'}: give str or list or null"),
        (["data=slips", "data.sft=none.jsonl"], "none.jsonl: no such file"),
        (["data=slips", "data.sft=own", "data.sft_rows=0"], "data.sft=own: no SFT row is left"),
        (["data=pairs", "data.path=x.jsonl", "data.sft=own"], "pairs has no SFT rows of its own"),
        (
            ["data=mixture", "+data@data.sources.mine=pairs", "data.sources.mine.sft=own"],
            "data.sources.mine.sft=own: pairs has no SFT rows",
        ),
        (["data=mixture", "~data.weights.long"], "name the same"),
        (["data=mixture", "data.weights.long=0"], "data.weights.long=0"),
        (["data=mixture", "data.max_rows=1"], "data.sources.short gives no rows"),
        (["data=mixture", "data.sources.long.operations=x"], "data.sources.long.operations=x"),
        (
            [
                "data=mixture",
                "+data@data.sources.more=arithmetic",
                "+data.weights.more=1",
            ],
            "data.sources.more samples its pairs",
        ),
    ],
)
def test_refusals(source, overrides, fragment):
    assert fragment in refusal(source, *overrides)


def test_refusals_that_need_a_file(source, tmp_path):
    path = write(tmp_path / "a.jsonl", asked(5))
    told = refusal(source, "data=pairs", f"data.path={path}", "data.separator='Q:'")
    assert f"{path}: data.separator='Q:', but the layout trl has prompts of its own" in told
    told = refusal(source, "data=pairs", f"data.path={path}", f"data.eval_path={path}")
    assert f"{path}: no row is left to train on" in told
    story = tmp_path / "s.txt"
    story.write_text("one story without an end")
    assert "no <|endoftext|>" in refusal(source, "data=stories", f"data.path={story}")
    story.write_text("one story<|endoftext|>cut")
    assert "no story is longer" in refusal(source, "data=stories", f"data.path={story}")


def test_a_node_may_point_outside_and_keep_its_nested_nodes_composed(compose_data):
    whole = OmegaConf.create({"seed": 5, "data": compose_data(*small("slips"))})
    whole.data.seed = "${seed}"
    assert load(whole.data).train == load({**compose_data(*small("slips")), "seed": 5}).train
    mixed = compose_data("data=mixture", "data.max_rows=8")
    assert load(dict(mixed.items())).train == load(mixed).train


def test_hydra_refuses_a_typo(compose_data):
    with pytest.raises(ConfigCompositionException):
        compose_data("data.sede=1")


@pytest.mark.parametrize("path", sorted((ROOT / "conf/data").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_key_says_its_meaning(path):
    lines = path.read_text().splitlines()
    for number, line in enumerate(lines):
        if re.match(r"\s*\w+: \S", line) and not line.startswith(("defaults", "_target_")):
            assert "#" in line or lines[number - 1].startswith("#"), line


@pytest.mark.parametrize("name", ["slips", "mixture"])
def test_pairs_of_a_file_train_in_place_of_the_sources_own(source, tmp_path, name):
    task = source(f"data={name}")
    pair = {"chosen": "1", "rejected": "2"}
    held = {"prompt": task.held_out[0]["prompt"], **pair}
    given = [{"prompt": f"q{n}", **pair} for n in range(5)]
    path = write(tmp_path / "p.jsonl", [*given, held])
    found = source(f"data={name}", f"data.pairs={path}")
    assert found.train == given and found.answer_of is task.answer_of
    assert (found.held_out, found.sft) == (task.held_out, task.sft)
    few = source(f"data={name}", f"data.pairs={path}", "data.max_rows=4").train
    assert len(few) == 4 and all(row in given for row in few)
    write(path, [held])
    assert "every prompt is held out" in refusal(source, f"data={name}", f"data.pairs={path}")
    write(path, [{"prompt": "q", "chosen": "1"}])
    told = refusal(source, f"data={name}", f"data.pairs={path}")
    assert told.startswith(f"{path}: no layout fits its columns prompt (q), chosen (1)")
    assert told.endswith("lacks rejected; rename them")


def test_pairs_where_the_data_samples_its_own(source, tmp_path):
    """Training pairs are given; held-out ones are sampled as before."""
    given = [{"prompt": f"q{n}", "chosen": "1", "rejected": "2"} for n in range(5)]
    path = write(tmp_path / "p.jsonl", given)
    own, found = (source("data=arithmetic", *more) for more in ((), (f"data.pairs={path}",)))
    assert found.given and found.train == given and not own.given
    assert (found.held_out, found.samples) == (own.held_out, own.samples)


TALK = "\n\nHuman: q{n}\n\nAssistant:"


def hh_rows(count):
    """Transcripts, as HH-RLHF has them."""
    return [
        {"chosen": TALK.format(n=n) + " a", "rejected": TALK.format(n=n) + " b"}
        for n in range(count)
    ]


def test_pairs_of_a_published_layout(source, tmp_path):
    path = write(tmp_path / "a.jsonl", hh_rows(20))
    task = source("data=pairs", f"data.path={path}")
    assert task.layout == "hh" and disjoint(task)
    assert task.notes == ("Layout: hh (chosen, rejected as messages): 20 rows",)
    assert task.train[0]["chosen"] == [{"role": "assistant", "content": "a"}]
    same = source("data=pairs", f"data.path={path}", "data.layout=hh")
    assert (same.train, same.held_out) == (task.train, task.held_out)


@pytest.mark.parametrize("separator", ["'\\n\\nAssistant:'", "'\n\nAssistant:'"])
def test_a_separator_is_what_the_shell_passes_or_a_line_break(source, tmp_path, separator):
    path = write(tmp_path / "a.jsonl", hh_rows(20))
    task = source("data=pairs", f"data.path={path}", f"data.separator={separator}")
    assert task.layout == "implicit"
    for row in task.train:
        assert row["prompt"].endswith("\n\nAssistant:") and row["chosen"] == " a"


def test_held_out_rows_are_read_by_the_layout_of_the_others_or_by_their_own(source, tmp_path):
    path, other = write(tmp_path / "a.jsonl", hh_rows(20)), tmp_path / "b.jsonl"
    write(other, hh_rows(3))
    both = ("data=pairs", f"data.path={path}", f"data.eval_path={other}")
    forced = source(*both, "data.layout=implicit")
    assert forced.held_out[0]["chosen"] == " a" == forced.train[0]["chosen"]
    write(other, asked(3))
    assert source(*both).held_out == asked(3)
    write(other, [{"prompt": "p", "response_0": "a", "response_1": "b", "winner": "tie"}] * 2
          + [{"prompt": "p", "response_0": "a", "response_1": "b", "winner": 1}])  # fmt: skip
    task = source(*both)
    assert [row["chosen"] for row in task.held_out] == ["b"]
    assert task.dropped["data.eval_path: tie"].count == 2
    assert task.notes[1].startswith("data.eval_path: Layout: verdict (prompt, response_0")


def test_labelled_rows_are_paired_and_all_are_left_for_who_needs_them(source, tmp_path):
    rows = [
        {"prompt": f"q{n}", "completion": side, "label": side == "a"}
        for n in range(20)
        for side in "ab"
    ]
    path = write(tmp_path / "a.jsonl", [*rows, {"prompt": "q", "completion": "a", "label": True}])
    task = source("data=pairs", f"data.path={path}")
    assert len(task.train) + len(task.held_out) == 20 and disjoint(task)
    assert {(row["chosen"], row["rejected"]) for row in task.train} == {("a", "b")}
    held = prompts(task.held_out)
    assert task.unpaired[-1] == {"prompt": "q", "completion": "a", "label": True}
    assert task.unpaired[:-1] == [row for row in rows if json.dumps(row["prompt"]) not in held]
    told = refusal(source, "data=pairs", f"data.path={path}", "data.stream=true")
    assert "the layout kto has one answer a row, whose pairs are made of all rows" in told
    write(path, rows[::2])
    told = refusal(source, "data=pairs", f"data.path={path}")
    assert "no row becomes a pair; Rows that become no pair: no answer with the other" in told


def test_texts_of_other_layouts(source, tmp_path):
    path, sft = write(tmp_path / "a.jsonl", asked(20)), tmp_path / "s.jsonl"
    user, said = {"role": "user", "content": "p"}, {"role": "assistant", "content": "c"}
    write(sft, [{"messages": [user, said]}])
    task = source("data=pairs", f"data.path={path}", f"data.sft={sft}")
    assert task.lower == [{"prompt": [user], "completion": [said]}]
    assert task.notes[1] == "data.sft: Layout: sft_conversation (messages as messages): 1 rows"
    assert source("data=slips", f"data.sft={sft}").notes == task.notes[1:]
    told = refusal(source, "data=pairs", f"data.path={path}", f"data.sft={path}")
    assert told.startswith(f"{path}: no layout fits its columns") and told.endswith("rename them")


def test_keys_that_a_layout_does_not_read(source, tmp_path):
    path = write(tmp_path / "a.jsonl", asked(20))
    told = refusal(source, "data=pairs", f"data.path={path}", "data.pairing=all")
    assert told.startswith("data.pairing=all has no effect: the layout trl has no list of answers")
    ranked = [{"prompt": "p", "answers": ["a", "b"], "ranks": [1, 2]}] * 3
    write(path, ranked)
    told = refusal(source, "data=pairs", f"data.path={path}", "data.pairing=most")
    assert "row 1: data.pairing=most: choose best_worst, best_random, adjacent, all" in told


def test_later_chunks_are_held_to_the_layout_of_the_first(source, tmp_path):
    ranked = [
        {"prompt": f"p{n}", "answers": ["a", "b", "c"], "ranks": [1, 2, 3]} for n in range(30)
    ]
    path = write(tmp_path / "a.jsonl", [*ranked, {"prompt": "p", "chosen": "a", "rejected": "b"}])
    stream = ("data.stream=true", "data.chunk_rows=10", "data.pairing=adjacent")
    task = source("data=pairs", f"data.path={path}", *stream)
    chunks = task.chunks(1)
    chunk = next(chunks)
    assert set(chunk.places) <= set(range(10, 20)) and len(chunk.rows) == len(chunk.places)
    assert all(chunk.places.count(place) == 2 for place in chunk.places)
    next(chunks)
    told = message(next, chunks)
    assert "row 31: no field 'answers' (found prompt, chosen, rejected), which the lay" in told


def test_a_mixture_says_how_each_of_its_files_is_read(source, tmp_path):
    path = write(tmp_path / "a.jsonl", hh_rows(60))
    task = source(
        "data=mixture",
        "+data@data.sources.mine=pairs",
        f"data.sources.mine.path={path}",
        "+data.weights.mine=1",
    )
    assert task.notes == ("mine: Layout: hh (chosen, rejected as messages): 60 rows",)
