"""What each of several processes holds at most of a model that is spread, at every stage."""

import contextlib
import ctypes
import gc
import os
import socket

import pytest
import torch
from test_parts import opened
from tiny import policy, random_pairs

from spo_lightning.bench import measuring
from spo_lightning.data.batch import collate
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding, layers_of
from spo_lightning.models.sharing import scorer_of
from spo_lightning.records import parts
from spo_lightning.run.processes import _group
from spo_lightning.world import World

# millions of weights; the embedding and the head of the bytes beside the blocks are small
SHAPES = {
    "28M": {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12},
    "59M": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14},
}
WEIGHT = 4  # bytes


class Held:
    """Bytes of this process at most, above what it holds when this is made."""

    def __init__(self):
        gc.collect()
        assert measuring.forget_peak()
        self.before = measuring.highest_resident()

    def of(self, work):
        """What the work gives, and the most that is held while it goes on."""
        gc.collect()
        assert measuring.forget_peak()
        found = work()
        return found, measuring.highest_resident() - self.before


def begun(where, world, unread):
    made = opened(where, unread=unread, dtype="float32")

    def decide(it):
        return Scorer(it.lm, True, reading=Reading("model"))

    return Sharding(True, 1, False)(made, decide, world, trains=True, unpaired=False)


def looked_at(held, made, scorer):
    """The first forwards; a forward and its backward."""
    batch = collate(random_pairs(2), 0)

    def look():
        scorer.reads_as(lambda: scorer_of(made, 40, share=True, logits=2**20))

    _, looked = held.of(look)
    loss, forward = held.of(lambda: scorer(batch).logps.sum())
    _, backward = held.of(loss.backward)
    return {"look": looked, "forward": forward, "backward": backward}


def alone(where):
    """The same of a process that has all weights, above those."""
    made = opened(where, unread=False, dtype="float32")
    for p in made.lm.parameters():
        p.data = p.data.clone()  # pages of a file come and go
    return looked_at(Held(), made, Scorer(made.lm, True, reading=Reading("model")))


def lived(where, world, to):
    """A model begins in parts, is looked at, takes a step and is saved."""
    held = Held()
    (made, scorer), started = held.of(lambda: begun(where, world, True))
    theta = list(scorer.spread.values())
    share = sum(p.to_local().numel() for p in theta) * WEIGHT
    found = {"share": share, "start": started, **looked_at(held, made, scorer)}
    optimizer = torch.optim.AdamW(theta, lr=0.0)  # what is saved is what was read
    _, found["optimizer"] = held.of(optimizer.step)
    tree = {"weights": dict(scorer.spread), "optimizer": optimizer.state_dict()}
    file = to.with_suffix(".ckpt")
    _, found["checkpoint"] = held.of(lambda: parts.write(tree, file, first=world.first))
    _, found["saving"] = held.of(lambda: made.save(to, merge=False, card="", world=world))
    return found


def process(rank, size, port, places, told):
    torch.set_num_threads(1)
    # glibc keeps freed memory unless it is told not to
    ctypes.CDLL(None).mallopt(measuring.M_MMAP_THRESHOLD, measuring.SMALL)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    place |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    with _group(os.environ) as group:
        world = World(rank, size, lambda: torch.device("cpu"), group)
        tiny, large = places
        lived(tiny, world, told / "nothing")  # loads the code
        found = {"parts": lived(large, world, told / "saved"), "alone": alone(large)}
        found["whole"] = {"start": Held().of(lambda: begun(large, world, False))[1]}
        every = world.gather(found)
    if rank == 0:
        torch.save(every, told / "told.pt")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size, shape", [(2, "28M"), (4, "28M"), (4, "59M")])
def test_no_process_holds_more_than_its_share_and_two_blocks(tmp_path, size, shape):
    places = tmp_path / "tiny", tmp_path / "large"
    policy(dtype="float32").save(places[0], merge=False, card="")
    made = policy(dtype="float32", **SHAPES[shape])
    made.save(places[1], merge=False, card="")
    layers = layers_of(made.lm)
    block = sum(p.numel() for p in layers[0].parameters()) * WEIGHT
    total = sum(p.numel() for p in made.lm.parameters()) * WEIGHT
    ends = total - len(layers) * block  # embedding and head, and a norm
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (size, port, places, tmp_path), nprocs=size)
    print(f"\n{size} processes of {shape}: {total / 2**20:.1f}, a block {block / 2**20:.1f}")
    for found in torch.load(tmp_path / "told.pt"):
        print({way: {k: round(v / 2**20, 1) for k, v in it.items()} for way, it in found.items()})
        mine, beside = found["parts"], found["alone"]
        share, two = mine["share"], 2 * block
        assert total / size <= share < total / size + block
        assert mine["start"] <= share + two < total < found["whole"]["start"]
        # two blocks, the ends, and activations, of which one process has as many
        for stage in ("look", "forward"):
            assert mine[stage] <= share + two + ends + beside[stage], stage
        # gradients too: a share of all, and those of the ends until backward is over
        assert mine["backward"] <= 2 * share + two + 2 * ends + beside["forward"]
        for stage in ("optimizer", "checkpoint", "saving"):  # and two moments
            assert mine[stage] <= 4 * share + two, stage
    for name in ("model.safetensors", "config.json"):
        kept = [(place / name).read_bytes() for place in (tmp_path / "saved", places[1])]
        assert kept[0] == kept[1]
