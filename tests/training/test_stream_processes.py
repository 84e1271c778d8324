"""A stream is read by several processes: every chunk by one of them, in the order of one alone."""

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import MODULE, command
from test_stream import RUN, composed, fed, rows, taken

from spo_lightning.data.encode import Encoded
from spo_lightning.data.load import load
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.records import checkpoints
from spo_lightning.training.feed import Feed
from spo_lightning.world import World

SHARDS, EACH, SIZE = 20, 6, 4  # files, rows of each, rows of a chunk: chunks begin inside of files
TWO = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")


class Thread(World):
    """A process that is a thread of this one."""

    def once(self, work, by=0):
        told, barrier = self.group
        if self.rank == by:
            try:
                told[0] = work(), None
            except UserError as error:
                told[0] = None, error
        barrier.wait(20)
        value, error = told[0]
        barrier.wait(20)
        if error is not None:
            raise error
        return value


def together(size, work):
    """What so many processes' ``work`` of their world gives."""
    group = [None], threading.Barrier(size)
    worlds = [Thread(rank, size, group=group) for rank in range(size)]
    with ThreadPoolExecutor(size) as pool:
        return [one.result() for one in [pool.submit(work, world) for world in worlds]]


def shards(folder, found=None):
    """The rows in twenty files, as a directory of a file system."""
    import fsspec

    system, inside = fsspec.core.url_to_fs(folder)
    system.makedirs(inside, exist_ok=True)
    found = found or rows(SHARDS * EACH)
    for number in range(SHARDS):
        part = found[number * EACH : (number + 1) * EACH]
        with system.open(f"{inside}/{number:02}.jsonl", "w") as file:
            file.write("".join(json.dumps(row) + "\n" for row in part))
    return folder


def folder(kind, tmp_path):
    return f"memory://{tmp_path.name}" if kind == "memory" else f"file://{tmp_path}/shards"


def task_of(place):
    words = ("data.stream=true", f"data.chunk_rows={SIZE}", "data.eval_fraction=0.1")
    return load(composed("data=pairs", f"data.path={place}", *words).data)


def feed_of(task, world, read):
    """A feed of the task's prompts, which keeps the numbers of the chunks that it parses."""

    def encode(chunk):
        read.append(chunk.number)
        return Encoded([row["prompt"] for row in chunk.rows], {"kept": len(chunk.rows)})

    first = encode(next(task.chunks(0)))
    read.clear()
    chunks = Pairs(first.pairs, None, 0)
    return Feed(chunks, first.counts, task.chunks, encode, lambda it: it, seed=0, world=world)


@pytest.mark.parametrize("kind", ["memory", "file"])
def test_twenty_shards_are_dealt_without_overlap(tmp_path, kind):
    task = task_of(shards(folder(kind, tmp_path)))
    whole = [*task.chunks(0)]
    assert len(whole) == SHARDS * EACH // SIZE
    for size in (2, 3, 7):
        dealt = [[*task.chunks(rank, size)] for rank in range(size)]
        for rank, found in enumerate(dealt):
            assert found == whole[rank::size]


def test_every_process_has_the_order_of_one_and_reads_its_own(tmp_path):
    task = task_of(shards(folder("file", tmp_path)))

    def passed(world):
        read, found = [], []
        for _, part, _ in feed_of(task, world, read)._pass(0):
            found += part.pairs
        return read, found

    ((_, alone),) = together(1, passed)
    assert len(alone) == len({*alone}) > SHARDS
    for size in (2, 3, 4):
        results = together(size, passed)
        assert all(found == alone for _, found in results)
        for rank, (read, _) in enumerate(results):  # all have read chunk 0, for its layout
            assert read == [*range(rank or size, SHARDS * EACH // SIZE, size)]


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("then", [1, 2, 4])
def test_it_goes_on_in_the_middle_of_a_chunk_with_other_numbers(size, then):
    lengths, at = [7, 0, 5, 6, 9], 5
    whole = taken(fed(lengths), 4, 16)

    def begun(world):
        given = fed(lengths, world=world)
        found = given.steps(4, 0, 16)
        for _ in range(at + 2):  # Lightning asks ahead
            next(found)
        return json.loads(json.dumps(given.state(at)))

    states = together(size, begun)
    assert all(state == states[0] for state in states) and states[0]["offset"] > 0

    def gone_on(world):
        given = fed(lengths, world=world)
        given.load(states[0])
        return taken(given, 4, 16 - at, start=at), given.counts

    alone = fed(lengths)
    taken(alone, 4, 16)
    for found, counts in together(then, gone_on):
        assert found == whole[at:] and counts == alone.counts


def test_rows_of_others_are_not_parsed(tmp_path):
    """A broken one is told of by who has it, where it is reached, and to all."""
    place = shards(f"file://{tmp_path}/shards")
    broken = tmp_path / "shards/10.jsonl"
    lines = broken.read_text().splitlines()
    broken.write_text("\n".join(["{broken", *lines[1:]]) + "\n")
    task, number = task_of(place), 10 * EACH // SIZE
    odd = [chunk.number for chunk in task.chunks(number % 2 + 1, 2)]
    assert odd == [*range(number % 2 + 1, SHARDS * EACH // SIZE, 2)]

    def passed(world):
        reached = []
        with pytest.raises(UserError, match="10.jsonl:1: broken JSON"):
            for found, _, _ in feed_of(task, world, [])._pass(0):
                reached.append(found)
        return reached

    assert together(2, passed) == [[*range(number)]] * 2


@pytest.mark.parametrize("name", ["a.parquet", "a.csv"])
def test_parts_of_a_file_are_every_so_many(tmp_path, name):
    from test_stream import written

    from spo_lightning.data.reading import Place, read

    path = written(tmp_path / name, rows(50))
    whole = read(str(path), split="train", where="data.path")
    for start, every in ((0, 2), (1, 2), (2, 3), (1, 7), (6, 1)):
        found = [*Place(str(path), "data.path").parts(8, start, every)]
        assert found == [whole[n * 8 : n * 8 + 8] for n in range(start, 7, every)]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "words", [TWO, (*TWO[1:], "hardware=fsdp"), (*TWO[1:], "hardware=fsdp", "model.lora.rank=2")],
    ids=["ddp", "fsdp", "fsdp, adapters"],
)  # fmt: skip
def test_whole_runs_end_as_one_process_does(tmp_path, words):
    """Also stopped in the middle of a chunk, and gone on with on another number of processes."""
    more = tuple(word for word in words if word.startswith("model"))
    hardware = tuple(word for word in words if not word.startswith("model"))
    place = shards(f"file://{tmp_path}/shards")
    stream = ("data.stream=true", "data.chunk_rows=10", f"data.path={place}", "batch_size=4")
    exact = ("model.dtype=float64", "hardware.precision=64-true", "cache.enabled=false")
    base = (*(w for w in RUN if not w.startswith("hardware")), *stream, *exact, *more)
    base = (*base, "hardware.threads=1", "sft.max_steps=0", "checkpoint.every_n_steps=0")
    one, half = ("hardware=cpu",), "max_steps=5"

    def run(name, *own, fresh=True):
        line = (*(base if fresh else ()), *own, f"hydra.run.dir={name}")
        done = command(tmp_path, *line, module=MODULE, timeout=300)
        assert done.code == 0, done.err
        return done

    run("one", *one, "max_steps=12")
    told = run("two", *hardware, "max_steps=12")
    assert "all rows reached): kept" in told.out
    for name, first, then in (("two-one", hardware, one), ("one-two", one, hardware)):
        run(name, *first, half)
        run(name, *then, "max_steps=12", "ckpt_path=last", fresh=False)
    states = {
        name: checkpoints.read(tmp_path / name / "checkpoints/last.ckpt")
        for name in ("one", "two", "two-one", "one-two")
    }
    wanted = states.pop("one")
    for name, found in states.items():
        assert found["spo_lightning/stream"] == wanted["spo_lightning/stream"], name
        for key, value in wanted["state_dict"].items():
            off = (found["state_dict"][key] - value).abs().max()
            assert off <= 1e-12, (name, key, off)
