"""What each of two processes holds of a model that is spread, as it begins and as it is saved."""

import contextlib
import ctypes
import gc
import os
import socket

import pytest
import torch
from test_parts import opened
from tiny import policy

from spo_lightning.bench import measuring
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding, layers_of
from spo_lightning.models.sharing import scorer_of
from spo_lightning.run.processes import _group
from spo_lightning.world import World

# 28 million weights in 12 blocks, the embedding and the head of the bytes beside them are small
SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
WEIGHT = 4  # bytes


def peak(work):
    """What the work gives, and how many bytes it held at most above what was held before."""
    gc.collect()
    assert measuring.forget_peak()
    before = measuring.highest_resident()
    found = work()
    return found, measuring.highest_resident() - before


def lived(where, world, to, unread=True):
    """A model begins in parts, is looked at and is saved: what it holds at most of each, and at
    the end, above what the process held before."""

    def begin():
        made = opened(where, unread=unread, dtype="float32")

        def decide(it):
            return Scorer(it.lm, True, reading=Reading("model"))

        return Sharding(True, 1, False)(made, decide, world, trains=True, unpaired=False)

    def look():
        scorer.reads_as(lambda: scorer_of(made, 40, share=True, logits=2**20))

    (made, scorer), started = peak(begin)
    held = sum(p.to_local().numel() for p in scorer.spread.values()) * WEIGHT
    _, looked = peak(look)
    _, saving = peak(lambda: made.save(to, merge=False, card="", world=world))
    return {"share": held, "start": started, "look": held + looked, "saving": held + saving}


def process(rank, port, places, told):
    torch.set_num_threads(1)
    # glibc keeps freed memory unless it is told not to
    ctypes.CDLL(None).mallopt(measuring.M_MMAP_THRESHOLD, measuring.SMALL)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    place |= {"WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    with _group(os.environ) as group:
        world = World(rank, 2, lambda: torch.device("cpu"), group)
        tiny, large = places
        lived(tiny, world, told / "nothing")  # loads the code
        found = {"unread": lived(large, world, told / "saved")}
        found["whole"] = lived(large, world, told / "again", unread=False)
        every = world.gather(found)
    if rank == 0:
        torch.save(every, told / "told.pt")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_no_process_holds_more_than_its_share_and_two_blocks(tmp_path):
    places = tmp_path / "tiny", tmp_path / "large"
    policy(dtype="float32").save(places[0], merge=False, card="")
    made = policy(dtype="float32", **SHAPE)
    made.save(places[1], merge=False, card="")
    block = sum(p.numel() for p in layers_of(made.lm)[0].parameters()) * WEIGHT
    total = sum(p.numel() for p in made.lm.parameters()) * WEIGHT
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, places, tmp_path), nprocs=2)
    for found in torch.load(tmp_path / "told.pt"):
        print({way: {k: round(v / 2**20, 1) for k, v in it.items()} for way, it in found.items()})
        mine, whole = found["unread"], found["whole"]
        assert total / 2 <= mine["share"] < total / 2 + block
        assert mine["start"] <= mine["share"] + 2 * block < total
        assert mine["saving"] <= mine["share"] + 2 * block
        # a forward as torch's gloo gathers: as it is sent, as it is received, as it is read
        assert mine["look"] <= mine["share"] + 4 * block
        assert whole["start"] > total  # this measures what it is to measure
    for name in ("model.safetensors", "config.json"):
        kept = [(place / name).read_bytes() for place in (tmp_path / "saved", places[1])]
        assert kept[0] == kept[1]
