"""Pairs from a model's own answers: judges, strategies, the record, and the command."""

import json
import math
import random
import signal
import time
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, command, end, forked, start
from omegaconf import OmegaConf
from tiny import policy, slow_logps

from spo_lightning.data.batch import Pair
from spo_lightning.data.encode import prompt_ids
from spo_lightning.data.rows import Task
from spo_lightning.errors import UserError
from spo_lightning.judges import local as judges
from spo_lightning.models.device import precision_of
from spo_lightning.records.progress import silent
from spo_lightning.sampling import strategies
from spo_lightning.sampling.draw import as_asked, parts_of, prompts
from spo_lightning.sampling.record import Record

MODULE = ("-m", "spo_lightning.sample")
# the keys of the small run that this command has, too
FEW = [w for w in SMALL if not w.startswith(("batch_size", "micro_batch", "log."))]
WORDS = (*FEW, "judge=likelihood", "eval.batch_size=16", "samples=4")


def asked(**task) -> judges.Asked:
    made = SimpleNamespace(**{"judge": None, "answer_of": None, **task})
    cfg = SimpleNamespace(precision="64-true")
    precision = precision_of(cfg, torch.device("cpu"))  # type: ignore[arg-type]
    return judges.Asked(made, policy(), lambda _: policy(seed=1), precision, silent(), 2, 64)


def half(row, text):
    """A judge of a user's own."""
    return None if text == "?" else len(text) / 2


def wordy(row, text):
    return "good"


def nowhere(row, text):
    return float("nan")


ROWS = [{"prompt": "1+1=?", "answer": "2"}, {"prompt": "1+2=?", "answer": "3"}, {"prompt": "x"}]


def test_the_data_judges():
    judge = judges.task(asked(judge=lambda text: text.count(",")))
    assert judge is not None and judge(ROWS, ["a,b,", "", ","]) == [2.0, 0.0, 1.0]
    assert judge.compare(ROWS, ["a,b,", "", ","], ["a", ",", ","]).wins == [1.0, 0.0, 0.5]
    judge = judges.answer(asked(answer_of=lambda text: text.strip() or None))
    assert judge(ROWS, [" 2", "4", "1"]) == [1.0, 0.0, None]
    assert judges.task(asked()) is None
    with pytest.raises(UserError, match="has no answers"):
        judges.answer(asked())


def test_a_function_judges():
    here = f"{__name__}.half"
    assert judges.function(asked(), path=here)(ROWS, ["abcd", "?", ""]) == [2.0, None, 0.0]
    for path in ("nosuch.name", f"{__name__}.nosuch", "name"):
        with pytest.raises(UserError, match="name module.function"):
            judges.function(asked(), path=path)
    for name in ("wordy", "nowhere"):
        with pytest.raises(UserError, match="returned .*: a finite number"):
            judges.function(asked(), path=f"{__name__}.{name}")(ROWS, ["a"] * 3)


@pytest.mark.parametrize("model, seed", [(None, 0), ("another", 1)])
@pytest.mark.parametrize("per_token", [True, False])
def test_likelihood_is_that_of_the_whole_answer(model, seed, per_token):
    """With the end mark, and by the other model where one is named."""
    given = asked()
    judge = judges.likelihood(given, model=model, per_token=per_token)
    texts = ["12;", "a much longer answer", ""]
    made = policy(seed=seed)
    *found, empty = judge(ROWS, texts)
    assert empty is None
    for row, text, score in zip(ROWS, texts, found):
        ids = tuple(made.tokenizer(text)["input_ids"]) + (made.tokenizer.eos_token_id,)
        logps = slow_logps(made.lm, Pair(tuple(prompt_ids(row, made.tokenizer)), ids, ()))
        expected = logps.mean() if per_token else logps.sum()
        assert score == pytest.approx(expected.item(), rel=1e-6), text


TEXTS = ["a", "b", "a", "c", "d"]


def test_strategies_by_hand():
    chance = random.Random(0)
    scores = [1.0, 3.0, 9.0, None, 0.0]  # the second "a" is the first, "c" has no score
    assert strategies.best_worst(TEXTS, scores, chance) == [(1, 4)]
    assert strategies.best_worst(TEXTS, [2.0] * 5, chance) == []
    assert strategies.best_worst(TEXTS, [None] * 5, chance) == []
    drawn = {strategies.right_wrong(TEXTS, scores, random.Random(n))[0] for n in range(30)}
    assert drawn == {(0, 4), (1, 4)}
    assert strategies.right_wrong(TEXTS, [1.0] * 5, chance) == []
    every = strategies.all_pairs(TEXTS, scores, chance, most=9)
    assert sorted(every) == [(0, 4), (1, 0), (1, 4)]
    some = strategies.all_pairs(TEXTS, scores, chance, most=2)
    assert len(set(some)) == 2 and set(some) < set(every)


def in_all_orders(rewards, keep, beta, left=None, found=()):
    """Every sequence of accepted places and its probability, by the sweeps written out."""
    left = range(len(rewards)) if left is None else left
    if len(found) == keep or not left:
        return {found: 1.0}
    top, told = max(rewards[n] for n in left), {}
    sweep = [((), (), 1.0)]  # accepted in it, left by it, how likely
    for place in left:
        share = math.exp((rewards[place] - top) / beta)
        grown = []
        for took, rest, p in sweep:
            if len(found) + len(took) == keep:
                grown.append((took, (*rest, place), p))
            else:
                grown += [
                    ((*took, place), rest, p * share),
                    (took, (*rest, place), p * (1 - share)),
                ]
        sweep = grown
    for took, rest, p in sweep:
        if p:
            for whole, q in in_all_orders(rewards, keep, beta, rest, (*found, *took)).items():
                told[whole] = told.get(whole, 0) + p * q
    return told


def test_rejection_sampling_against_its_exact_distribution():
    """1e5 draws of three of five candidates; chi-square over all ordered outcomes."""
    rewards, beta, chance, count = (0.5, 1.2, 1.0, 1.5, 0.2), 1.0, random.Random(0), 100_000
    exact = in_all_orders(rewards, 3, beta)
    assert sum(exact.values()) == pytest.approx(1)
    seen = Counter(tuple(strategies.accepted(rewards, chance, 3, beta)) for _ in range(count))
    assert seen.keys() <= exact.keys()
    likely = [one for one, p in exact.items() if p * count >= 5]
    assert len(likely) >= 8
    distance = sum((seen[o] - count * exact[o]) ** 2 / (count * exact[o]) for o in likely)
    half = torch.tensor([(len(likely) - 1) / 2, distance / 2], dtype=torch.float64)
    assert torch.special.gammaincc(*half) > 1e-3  # the chance of as large a distance


def test_rejection_sampling_at_its_ends():
    chance = random.Random(0)
    first = Counter(len(strategies.accepted((0.0, 1.0, 2.0), chance, 9, 0.5)) for _ in range(9))
    assert first == {3: 9}  # no more than there are
    assert strategies.accepted((1.0, 3.0, 2.0), chance, 2, 0) == [1, 2]
    assert strategies.accepted((1.0, 3.0, 2.0), chance, 2, 1e9) == [0, 1]  # any
    assert strategies.accepted((), chance, 2, 0.5) == []
    texts, scores = ["a", "a", "b", "c"], [1.0, 2.0, None, 3.0]  # alike, and without a score
    pairs = {
        p for _ in range(50) for p in strategies.rejection(texts, scores, chance, keep=4, beta=1)
    }
    assert pairs == {(3, 0), (3, 1)}


def test_the_record_goes_on_after_whole_parts(tmp_path):
    parts = [[0, 1], [2, 3], [4]]
    lines = [{"number": n, "row": {}, "samples": ["é"], "scores": [1.0]} for n in range(5)]
    path = tmp_path / "sub/r.jsonl"
    record = Record(path, {"seed": 0}, parts)
    assert record.begin() == 0
    record.append(lines[:2])
    record.append(lines[2:4])
    whole = path.read_bytes()
    for cut in range(1, len(whole) - len(record.head) + 1):  # a kill in any place
        path.write_bytes(whole[:-cut])
        record.file.close()
        done = record.begin()
        assert done == (1 if len(whole) - cut >= whole.index(b'{"number": 2') else 0)
        assert [one["number"] for one in record.read()] == [0, 1][: 2 * done]
    record.file.close()
    path.write_bytes(whole)
    assert record.begin() == 2
    record.append(lines[4:])
    record.file.close()
    assert record.begin() == 3 and list(record.read()) == lines
    with pytest.raises(UserError, match="another command draws into it"):
        Record(path, {"seed": 0}, parts).begin()
    record.file.close()
    with pytest.raises(UserError, match="seed is 0 there and 1 here"):
        Record(path, {"seed": 1}, parts).begin()
    assert Record(path, {"seed": 0.0}, parts).begin() == 3  # the same, written otherwise
    path.write_text("{}\n")
    with pytest.raises(UserError, match="not a record of samples"):
        Record(path, {"seed": 0}, parts).begin()


def test_a_record_goes_on_at_another_pace_and_over_one_that_holds_nothing(tmp_path):
    def record(**judge):
        return Record(tmp_path / "r.jsonl", {"judge": judge}, [[0]])

    first = record(model="m", timeout=60.0, retries=5)
    assert first.begin() == 0
    first.file.close()
    other = record(model="n", timeout=60.0, retries=5)
    assert other.begin() == 0
    other.append([{"number": 0, "row": {}, "samples": ["a"], "scores": [1.0]}])
    other.file.close()
    again = record(model="n", timeout=9.0)
    assert again.begin() == 1
    again.file.close()
    with pytest.raises(UserError, match="judge is"):
        record(model="m", timeout=60.0).begin()


def test_parts_and_turns():
    rows = [{"prompt": "x" * n} for n in (3, 1, 2, 1)]
    assert parts_of(rows, 3) == [[1, 3, 2], [0]]
    assert as_asked("text", "a") == "a"
    assert as_asked([{"role": "user", "content": "q"}], "a") == [
        {"role": "assistant", "content": "a"}
    ]


@pytest.mark.slow
def test_killed_and_gone_on_with(tmp_path, cache):
    """The same pairs as without a kill, none twice; they train through data=pairs."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    whole.mkdir(), cut.mkdir()
    done = command(whole, *WORDS, cache, module=MODULE)
    assert done.code == 0, done.err
    assert "samples/s" in done.out
    process = start(cut, *WORDS, cache, module=MODULE)
    record = cut / "pairs.samples.jsonl"
    while process.poll() is None:
        if record.exists() and record.read_bytes().count(b"\n") > 8:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    end(process)
    assert not (cut / "pairs.jsonl").exists()
    with record.open("ab") as file:
        file.write(b'{"number": 3, "row"')  # what a kill in mid-write leaves
    done = command(cut, *WORDS, cache, module=MODULE)
    assert done.code == 0 and "prompts were drawn before" in done.out
    for name in ("pairs.jsonl", "pairs.samples.jsonl"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()
    pairs = [json.loads(line) for line in (cut / "pairs.jsonl").read_text().splitlines()]
    assert [row["prompt_number"] for row in pairs] == list(range(40))
    assert all(row["chosen_score"] > row["rejected_score"] for row in pairs)
    assert pairs[0]["sampling"]["samples"] == 4 and pairs[0]["model"].endswith("llama")
    words = ("data=pairs", "data.path=pairs.jsonl", "loss=dpo", "max_steps=1", "hydra.run.dir=run")
    small = [w for w in SMALL if not w.startswith(("data", "sft"))]
    trained = command(cut, *small, cache, *words)
    assert trained.code == 0, trained.err
    done = command(cut, *WORDS, cache, "temperature=0.5", module=MODULE)
    assert done.code == 2 and "other settings (sampling is" in done.err


@pytest.mark.parametrize(
    "words, says",
    [
        (("samples=1",), "samples=1: it must be at least 2"),
        (("top_p=0",), "top_p=0: it must be above 0"),
        (("judge=function",), "judge.path has no default"),
        (("prompts.path=absent.jsonl",), "absent.jsonl: no such file"),
        (("+strategy.foo=1",), "strategy: "),
        (("strategy=all_pairs", "strategy.most=0"), "strategy.most=0: it must be at least 1"),
        (("output=",), "name a file, as in output=pairs.jsonl"),
    ],
)
def test_refused_in_one_line(tmp_path, words, says):
    done = forked(tmp_path, *words, module=MODULE)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_of_yours_is_not_written_over(tmp_path):
    row = '{"prompt": "a", "chosen": "b", "rejected": "c"}\n'
    (tmp_path / "pairs.jsonl").write_text(row)
    done = forked(tmp_path, "data=pairs", "data.path=pairs.jsonl", module=MODULE)
    assert done.code == 2 and "there is a file, and not of this command" in done.err
    assert (tmp_path / "pairs.jsonl").read_text() == row


def test_a_prompt_of_many_rows_is_answered_once():
    cfg = OmegaConf.create({"prompts": {"path": None, "max_rows": 2}})
    rows = [{"prompt": p, "chosen": "x", "answer": "1"} for p in "abac"]
    assert prompts(cfg, Task(train=rows, held_out=[])) == [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": "1"},
    ]
    with pytest.raises(UserError, match="data.stream=true"):
        prompts(cfg, Task(train=rows, held_out=[], chunks=lambda start: iter(())))


def test_prompts_of_a_file_become_turns_too(tmp_path):
    where = tmp_path / "prompts.jsonl"
    where.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    of = {"path": str(where), "split": "train", "max_rows": 1}
    cfg = OmegaConf.create({"prompts": of, "data": {"chat": True, "system": "Be brief."}})
    system = {"role": "system", "content": "Be brief."}
    found = prompts(cfg, Task(train=[], held_out=[]))
    assert found == [{"prompt": [system, {"role": "user", "content": "a"}]}]
