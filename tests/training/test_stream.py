"""A file is trained on while it is read: same numbers, bounded memory, going on, late refusals."""

import csv
import gc
import json
import random
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import MODULE, SMALL, command
from hydra import compose, initialize_config_dir
from pairs import CONF
from tiny import policy

from spo_lightning.cache import reference
from spo_lightning.config import knobs
from spo_lightning.data.batch import Pair, draws
from spo_lightning.data.encode import encode_some
from spo_lightning.data.load import load
from spo_lightning.data.reading import Place, read
from spo_lightning.data.rows import Chunk, held_out
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.train import train
from spo_lightning.training import feed
from spo_lightning.training.feed import Feed, ahead

COUNT, SIZE = 50, 8


def rows(count, seed=0):
    """Pairs of a few letters; every prompt is another."""
    chance = random.Random(seed)

    def word():
        return "".join(chance.choices("abcdefgh", k=chance.randint(2, 8)))

    return [
        {"prompt": f"{n}:{word()} ", "chosen": word() + "y", "rejected": word() + "n"}
        for n in range(count)
    ]


def written(path: Path, found) -> Path:
    """The rows as the file or directory that the name says."""
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in found))
    elif path.suffix == ".csv":
        with path.open("w", newline="") as file:
            sheet = csv.DictWriter(file, found[0])
            sheet.writeheader()
            sheet.writerows(found)
    else:
        from datasets import Dataset

        data = Dataset.from_list(found)
        if path.suffix == ".parquet":
            data.to_parquet(path, batch_size=7)  # several row groups
        else:
            data.save_to_disk(path)
    return path


def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("train", [*words])


def task_of(path, *words):
    return load(composed("data=pairs", f"data.path={path}", *words).data)


def streamed(path, size=SIZE, *words):
    return task_of(path, "data.stream=true", f"data.chunk_rows={size}", *words)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "saved"])
def test_parts_are_the_file_wherever_they_begin(tmp_path, name):
    path = written(tmp_path / name, rows(COUNT))
    whole = read(str(path), split="train", where="data.path")
    assert len(whole) == COUNT
    for start in (0, 1, 3, 7):
        found = [*Place(str(path), "data.path").parts(SIZE, start)]
        assert [row for part in found for row in part] == whole[start * SIZE :]
        assert all(len(part) == SIZE for part in found[:-1])


def test_lines_end_at_line_feeds_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    told = json.dumps({"prompt": "a\u2028b", "chosen": "c", "rejected": "d"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + told.encode() + b"\r\n\n" + told.encode())
    (part,) = Place(str(path), "data.path").parts(4, 0)
    assert part == read(str(path), split="train", where="data.path") and len(part) == 2


@pytest.mark.parametrize(
    ("name", "late", "says"),
    [
        ("a.jsonl", "{not json", "a.jsonl:46: broken JSON"),
        ("a.jsonl", '{"prompt": "a", "chosen": "b"}', "a.jsonl, row 46"),
        ("a.jsonl", "[]", "a.jsonl:46: a list"),
        ("a.csv", "one,cell,more,than", "a.csv:47: not 3 cells"),
        ("a.csv", 'a,b,"never ended', "a.csv:47: broken csv"),
    ],
)
def test_a_bad_row_is_named_when_it_is_reached(tmp_path, name, late, says):
    path = written(tmp_path / name, rows(45))
    with path.open("a") as file:
        file.write(late + "\n")
    found = streamed(path).chunks(0)
    for _ in range(45 // SIZE):
        next(found)
    with pytest.raises(UserError, match=says):
        next(found)


def test_not_utf8_is_named_by_its_line(tmp_path):
    path = written(tmp_path / "a.jsonl", rows(20))
    with path.open("ab") as file:
        file.write(b'{"prompt": "\xff"}\n')
    with pytest.raises(UserError, match="a.jsonl:21: not utf-8"):
        list(streamed(path).chunks(1))


def test_no_chunk_has_a_held_out_prompt(tmp_path):
    path = written(tmp_path / "a.jsonl", rows(200))
    task = streamed(path, 50, "data.eval_fraction=0.3")
    found = [*task.chunks(0)]
    held = {row["prompt"] for row in task.held_out}
    prompts = [row["prompt"] for chunk in found for row in chunk.rows]
    assert held and held == {r["prompt"] for r in rows(200)[:50] if held_out(r["prompt"], 0.3)}
    assert not any(held_out(prompt, 0.3) for prompt in prompts)
    assert len(prompts) == sum(not held_out(r["prompt"], 0.3) for r in rows(200))
    places = [place for chunk in found for place in chunk.places]
    assert [rows(200)[place]["prompt"] for place in places] == prompts


def test_no_chunk_has_a_prompt_of_the_evaluation_file(tmp_path):
    path = written(tmp_path / "a.jsonl", rows(40))
    taken = [rows(40)[place] for place in (3, 30, 39)]
    other = written(tmp_path / "held.jsonl", taken)
    task = streamed(path, SIZE, f"data.eval_path={other}")
    prompts = [row["prompt"] for chunk in task.chunks(0) for row in chunk.rows]
    assert [row["prompt"] for row in task.held_out] == [row["prompt"] for row in taken]
    assert prompts == [row["prompt"] for row in rows(40) if row not in taken]


def test_one_chunk_is_the_file_as_it_is_read_whole(tmp_path):
    path = written(tmp_path / "a.jsonl", rows(COUNT))
    whole, task = task_of(path), streamed(path, 64)
    assert task.train == whole.train and task.held_out == whole.held_out
    (chunk,) = task.chunks(0)
    assert chunk.rows == whole.train and not [*task.chunks(1)]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["data.max_rows=5"], "data.max_rows=5 samples among all rows"),
        (["data.chunk_rows=0"], "data.chunk_rows=0"),
    ],
)
def test_what_a_stream_cannot_have(tmp_path, words, says):
    path = written(tmp_path / "a.jsonl", rows(10))
    with pytest.raises(UserError, match=says):
        task_of(path, "data.stream=true", *words)


def test_a_list_is_no_stream(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(rows(4)))
    with pytest.raises(UserError, match="as .jsonl"):
        streamed(path)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("max_steps=-1", "max_steps=-1 does not go with"),
        ("data.max_rows=5", "data.max_rows=5 does not go with"),
        ("data.drop_high_ches=0.1", "data.drop_high_ches=0.1 does not go with"),
        ("diagnostics.ches.every_n_steps=5", "diagnostics.ches.every_n_steps=5 does not go with"),
    ],
)
def test_knobs_refuse_it_before_anything_is_read(word, says):
    words = ["data=pairs", "data.path=a.jsonl", "loss=dpo", "data.stream=true", word]
    touched = [text.split("=")[0] for text in words[3:]]
    defaults = composed("data=pairs", "loss=dpo")
    with pytest.raises(UserError, match=says):
        knobs.check(composed(*words), knobs.Given(touched, {"data": "pairs"}, defaults))


def test_chunk_rows_without_a_stream_has_no_effect():
    words = ["data=pairs", "data.path=a.jsonl", "loss=dpo", "data.chunk_rows=5"]
    defaults = composed("data=pairs", "loss=dpo")
    with pytest.raises(UserError, match="data.stream is false"):
        knobs.check(
            composed(*words), knobs.Given(["data.chunk_rows"], {"data": "pairs"}, defaults)
        )


# --- the order of outer steps


def pair(place):
    return Pair((place,), (1,), (2,), row=place)


def fed(lengths, seed=0, read_from=None, **how):
    """A feed of chunks of so many pairs, whose reference is the pair's number."""
    starts = [sum(lengths[:n]) for n in range(len(lengths))]

    def made(number):
        return [pair(starts[number] + n) for n in range(lengths[number])]

    def chunks(start, every=1):
        for number in range(start, len(lengths), every):
            if read_from is not None:
                read_from.append(number)
            yield Chunk(number, [{"number": number}], [])

    def encode(chunk):
        own = made(chunk.rows[0]["number"])
        return feed.Encoded(own, {"kept": len(own), "dropped/empty": 1})

    def judge(bare):
        return replace(bare, references=[torch.tensor([float(p.row)]) for p in bare.pairs])

    first = judge(Pairs(made(0), None, 0))
    counts = {"kept": lengths[0], "dropped/empty": 1}
    return Feed(first, counts, chunks, encode, judge, seed=seed, **how)


def taken(given, size, steps, start=0):
    found = given.steps(size, start, start + steps)
    return [[p.row for p in next(found).pairs] for _ in range(steps)]


def test_one_chunk_has_the_order_of_pairs_in_memory():
    orders = draws(11, 4, 3, 0)
    assert taken(fed([11], seed=3), 4, 9) == [next(orders) for _ in range(9)]


def test_every_epoch_has_every_pair_once_chunk_by_chunk():
    lengths = [7, 0, 5, 6]
    found = taken(fed(lengths), 6, 9)  # three epochs of 18 pairs, three steps each
    flat = [row for step in found for row in step]
    epochs = [flat[n : n + 18] for n in (0, 18, 36)]
    for epoch in epochs:
        assert sorted(epoch[:7]) == [*range(7)]
        assert sorted(epoch[7:12]) == [*range(7, 12)] and sorted(epoch[12:]) == [*range(12, 18)]
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert taken(fed(lengths), 6, 9) == found != taken(fed(lengths, seed=1), 6, 9)


def test_chunks_of_one_size_have_different_orders():
    flat = [row for step in taken(fed([9, 9]), 3, 6) for row in step]
    assert [row - 9 for row in flat[9:]] != flat[:9]


def test_references_stay_with_their_pairs():
    for step, _ in zip(fed([5, 4]).steps(3, 0, 9), range(9)):
        assert [r.item() for r in step.references] == [p.row for p in step.pairs]


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 8, 11])
def test_going_on_from_a_checkpoint_at_any_step(at):
    whole = taken(fed([5, 4, 6]), 4, 14)
    first, read_from = fed([5, 4, 6]), []
    asked = first.steps(4, 0, 14)
    for _ in range(at + 2):  # Lightning asks ahead
        next(asked)
    state = json.loads(json.dumps(first.state(at)))
    second = fed([5, 4, 6], read_from=read_from)
    second.load(state)
    assert taken(second, 4, 14 - at, start=at) == whole[at:]
    assert read_from[0] == max(state["chunk"], 1)  # not from the beginning


def test_counts_are_those_of_the_first_epoch_also_after_going_on():
    whole = fed([5, 4, 6])
    taken(whole, 5, 7)
    assert whole.counts == {"kept": 15, "dropped/empty": 3}
    first, second = fed([5, 4, 6]), fed([5, 4, 6])
    taken(first, 5, 2)
    second.load(first.state(1))
    taken(second, 5, 6, start=1)
    assert second.counts == whole.counts


def test_what_is_asked_for_beyond_the_end_reads_nothing():
    read_from = []
    found = fed([4, 4, 4, 4], read_from=read_from).steps(4, 0, 1)
    one = next(found)
    assert next(found) is one and next(found) is one
    assert set(read_from) <= {1}  # the one that is read ahead


def test_epochs_are_whole_passes():
    given = fed([4, 4])
    found = given.steps(2, 0, 9)
    next(found)
    assert given.epoch(1) == 0
    for _ in range(5):
        next(found)
    assert given.epoch(6) == 1


# --- reading ahead


def test_ahead_makes_one_item_while_the_last_is_used():
    made, second = [], threading.Event()

    def items():
        for n in range(5):
            made.append(n)
            if n == 1:
                second.set()
            yield n

    found = ahead(items())
    assert next(found) == 0 and second.wait(10)
    assert made == [0, 1]  # no more than one
    assert [*found] == [1, 2, 3, 4]


def test_ahead_raises_where_the_item_would_have_come():
    def items():
        yield 1
        yield 2
        raise UserError("row 3")

    found = ahead(items())
    assert next(found) == 1 and next(found) == 2
    with pytest.raises(UserError, match="row 3"):
        next(found)


@pytest.mark.slow
def test_live_pairs_do_not_grow_with_the_file():
    """At most four chunks: the first, the one in use, the last, the one read ahead."""
    tokenizer, lengths, most = policy().tokenizer, {}, {}
    gc.collect()
    before = sum(isinstance(thing, Pair) for thing in gc.get_objects())
    for count in (200, 800):
        found = rows(count)

        def chunks(start, every, found=found, count=count):
            assert every == 1
            for number in range(start, count // 20):
                part = found[number * 20 : number * 20 + 20]
                yield Chunk(number, part, [*range(number * 20, number * 20 + 20)])

        def encode(chunk):
            how = {
                "max_length": 64,
                "on_mismatch": "split",
                "strict": True,
                "scored": "assistant",
                "where": "a",
            }
            return encode_some(chunk.rows, tokenizer, chunk.places, **how)

        first = encode(next(chunks(0, 1)))
        given = Feed(
            Pairs(first.pairs, None, 0), first.counts, chunks, encode, lambda p: p, seed=0
        )
        alive = []
        for step, _ in zip(given.steps(10, 0, 10**9), range(count // 10)):
            assert len(step.pairs) == 10
            alive.append(sum(isinstance(thing, Pair) for thing in gc.get_objects()))
        lengths[count], most[count] = len(alive), max(alive) - before
    assert lengths == {200: 20, 800: 80}
    assert most[800] <= 4 * 20 + 10 and most[200] <= 4 * 20 + 10


# --- whole runs

RUN = (
    *(word for word in SMALL if not word.startswith(("data", "sft"))),
    "data=pairs",
    "loss=dpo",
    "model=llama",
    "eval.every_n_steps=2",
    "eval.max_rows=8",
    "checkpoint.every_n_steps=1",
    "log.every_n_steps=1",
    "max_length=64",
    "optimizer.schedule=constant",
    "optimizer.warmup=0",
)


def ran(path, directory, cache, *words):
    cfg = composed(*RUN, f"data.path={path}", cache, *words)
    train(cfg, directory)
    last = torch.load(directory / "checkpoints" / "last.ckpt", weights_only=True)
    with (directory / "metrics.csv").open(newline="") as file:
        aside = ("/time/", "train/epoch")
        logged = [
            {k: v for k, v in row.items() if not any(a in k for a in aside)}
            for row in csv.DictReader(file)
        ]
    return last, logged


def same_weights(one, other):
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name


def test_one_chunk_trains_as_the_file_in_memory(tmp_path, cache):
    path = written(tmp_path / "a.jsonl", rows(30))
    whole, numbers = ran(path, tmp_path / "whole", cache, "max_steps=9")
    last, streamed_numbers = ran(
        path, tmp_path / "stream", cache, "max_steps=9", "data.stream=true", "data.chunk_rows=64"
    )
    same_weights(whole, last)
    assert streamed_numbers == numbers


@pytest.mark.parametrize(
    "word", ["model.lora.rank=0", pytest.param("model.lora.rank=2", marks=pytest.mark.slow)]
)
def test_later_chunks_are_scored_under_the_start(tmp_path, cache, word, monkeypatch):
    """With a rate that moves the policy far, as if all had been scored before."""
    path = written(tmp_path / "a.jsonl", rows(40))
    seen: dict[int, torch.Tensor] = {}
    plain = Pairs.batch

    def watched(self, indices):
        if self.references is not None:
            seen.update({self.pairs[i].row: self.references[i] for i in indices})
        return plain(self, indices)

    words = (
        word,
        "data.eval_fraction=0",
        "data.stream=true",
        "data.chunk_rows=10",
        "optimizer.lr=0.02",
        "max_steps=10",
    )
    monkeypatch.setattr(Pairs, "batch", watched)
    ran(path, tmp_path / "late", cache, *words, "cache.enabled=false")
    late = dict(seen)
    seen.clear()
    ran(
        path,
        tmp_path / "all",
        cache,
        *(w for w in words if "chunk" not in w),
        "data.chunk_rows=64",
    )
    assert late.keys() == seen.keys() and len(late) > 20
    for row, value in late.items():
        torch.testing.assert_close(value, seen[row], rtol=0, atol=1e-5)


def test_the_next_epoch_and_the_next_run_find_every_row(tmp_path, cache, monkeypatch, caplog):
    path = written(tmp_path / "a.jsonl", rows(24))
    words = ("data.stream=true", "data.chunk_rows=8", "max_steps=12")
    caplog.set_level("INFO")
    ran(path, tmp_path / "one", cache, *words)
    caplog.clear()
    monkeypatch.setattr(
        reference, "score", lambda *_, **__: pytest.fail("scored what is in the cache")
    )
    ran(path, tmp_path / "two", cache, *words, "loss.beta=0.2", "batch_size=6")


def test_two_parts_equal_one_whole(tmp_path, cache):
    path = written(tmp_path / "a.jsonl", rows(40))
    words = ("data.stream=true", "data.chunk_rows=10")
    whole, numbers = ran(path, tmp_path / "whole", cache, *words, "max_steps=13")
    ran(path, tmp_path / "parts", cache, *words, "max_steps=4")
    parts, logged = ran(path, tmp_path / "parts", cache, *words, "max_steps=13", "ckpt_path=last")
    same_weights(whole, parts)
    assert logged == numbers
    assert whole["spo_lightning/stream"] == parts["spo_lightning/stream"]


@pytest.mark.slow
def test_a_bad_row_in_a_late_chunk_ends_the_run_and_keeps_the_checkpoint(tmp_path, cache):
    path = written(tmp_path / "a.jsonl", rows(30))
    with path.open("a") as file:
        file.write("{broken\n")
    words = (f"data.path={path}", "data.stream=true", "data.chunk_rows=10", "hydra.run.dir=run")
    ended = command(tmp_path, *RUN, *words, cache, "max_steps=40", module=MODULE)
    assert ended.code == 2 and "a.jsonl:31: broken JSON" in ended.err, ended.err
    assert "Traceback" not in ended.err and len(ended.err.strip().splitlines()) == 1
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    # the chunk is asked for one step before its first pair is trained on
    assert last["spo_lightning"]["outer_step"] >= 4
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    whole = path.read_text().replace("{broken\n", "")
    path.write_text(whole)
    again = command(tmp_path, *RUN, *words, cache, "max_steps=40", "ckpt_path=last", module=MODULE)
    assert again.code == 0, again.err


def test_a_bad_row_that_is_never_reached_ends_nothing(tmp_path, cache):
    path = written(tmp_path / "a.jsonl", rows(30))
    with path.open("a") as file:
        file.write("{broken\n")
    last, _ = ran(path, tmp_path / "run", cache, "data.stream=true", "data.chunk_rows=10",
                  "max_steps=2")  # fmt: skip
    assert last["spo_lightning"]["outer_step"] == 2


def test_dropped_rows_are_counted_at_the_end(tmp_path, cache, caplog):
    found = rows(24)
    found[20] |= {"rejected": found[20]["chosen"]}
    path = written(tmp_path / "a.jsonl", found)
    caplog.set_level("INFO")
    ran(path, tmp_path / "run", cache, "data.stream=true", "data.chunk_rows=8", "max_steps=7",
        "data.eval_fraction=0")  # fmt: skip
    (told,) = [text for text in caplog.messages if "all rows reached" in text]
    assert told == "Pairs (train, all rows reached): kept 23, dropped/identical 1"


def test_strict_names_the_row_of_the_file(tmp_path, cache):
    found = rows(24)
    found[20] |= {"rejected": found[20]["chosen"]}
    path = written(tmp_path / "a.jsonl", found)
    words = ("data.stream=true", "data.chunk_rows=8", "data.strict=true", "data.eval_fraction=0")
    with pytest.raises(UserError, match="a.jsonl, row 21: chosen and rejected are the same"):
        ran(path, tmp_path / "run", cache, *words, "max_steps=7")
