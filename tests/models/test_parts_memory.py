"""What each of several processes holds of a model that is spread, at every stage of its life."""

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
from spo_lightning.models.generate import Decoding, answers
from spo_lightning.models.reading import Reading
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding, layers_of
from spo_lightning.models.sharing import scorer_of
from spo_lightning.records import parts
from spo_lightning.records.progress import Stages, Stop
from spo_lightning.run.processes import _group
from spo_lightning.world import World

# 28 million weights, of which embedding and head are few
SHAPE = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 12}
LARGE = 6144  # a vocabulary of which each of them is as large as a block
WEIGHT = 4  # bytes


def peak(work):
    """What the work gives, and how many bytes it held at most above what was held before."""
    gc.collect()
    assert measuring.forget_peak()
    before = measuring.highest_resident()
    found = work()
    return found, measuring.highest_resident() - before


def looked_at(made, scorer, batch, world):
    """Bytes at most, above what was there: the first forwards, answers, a forward and its
    backward."""

    def look():
        scorer.reads_as(lambda: scorer_of(made, 40, share=True, logits=2**20))

    def answer():
        rows = [{"prompt": "ab"}, {"prompt": "abc"}]
        stages = Stages(lambda *_: None, Stop(), "", world)
        return answers(made, rows, Decoding(3, 2, ()), stages, "answers")

    _, looked = peak(look)
    _, answered = peak(answer)
    loss, forward = peak(lambda: scorer(batch).logps.sum())
    _, backward = peak(loss.backward)
    return {"look": looked, "answers": answered, "forward": forward, "backward": backward}


def lived(where, world, to, unread=True):
    """A model begins in parts, is looked at, takes a step, and is saved: what it holds at most of
    each, above what the process held before all."""
    batch = collate(random_pairs(2), 0)

    def begin():
        made = opened(where, unread=unread, dtype="float32")

        def decide(it):
            return Scorer(it.lm, True, reading=Reading("model"))

        return Sharding(True, 1, False, False)(made, decide, world, trains=True, unpaired=False)

    (made, scorer), started = peak(begin)
    theta = list(scorer.spread.values())
    share = sum(p.to_local().numel() for p in theta) * WEIGHT
    walked = looked_at(made, scorer, batch, world)
    optimizer = torch.optim.AdamW(theta, lr=0.0)  # what is saved is what was read
    _, moved = peak(optimizer.step)
    tree = {"weights": dict(scorer.spread), "optimizer": optimizer.state_dict()}
    _, kept = peak(lambda: parts.write(tree, to.with_suffix(".ckpt"), first=world.first))
    _, saving = peak(lambda: made.save(to, merge=False, card="", world=world))
    # with gradients, and with two moments
    held = {name: share + bytes_ for name, bytes_ in walked.items()}
    held |= {"share": share, "start": started, "optimizer": 2 * share + moved}
    return held | {"checkpoint": 4 * share + kept, "saving": 4 * share + saving}


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
        found = {"unread": lived(large, world, told / "saved")}
        found["whole"] = lived(large, world, told / "again", unread=False)
        every = world.gather(found)
    if rank == 0:
        torch.save(every, told / "told.pt")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("size, vocabulary", [(2, None), (4, None), (4, LARGE)])
def test_no_process_holds_more_than_its_share_and_two_blocks(tmp_path, size, vocabulary):
    places = tmp_path / "tiny", tmp_path / "large"
    policy(dtype="float32").save(places[0], merge=False, card="")
    made = policy(dtype="float32", **SHAPE)
    if vocabulary is not None:
        made.lm.resize_token_embeddings(vocabulary, mean_resizing=False)
    made.save(places[1], merge=False, card="")
    layers = layers_of(made.lm)
    block = sum(p.numel() for p in layers[0].parameters()) * WEIGHT
    total = sum(p.numel() for p in made.lm.parameters()) * WEIGHT
    end = made.lm.get_input_embeddings().weight.numel() * WEIGHT
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (size, port, places, tmp_path), nprocs=size)
    print(f"\n{size} processes: {total / 2**20:.1f}, a block {block / 2**20:.1f}")
    for found in torch.load(tmp_path / "told.pt"):
        print({way: {k: round(v / 2**20, 1) for k, v in it.items()} for way, it in found.items()})
        mine, whole = found["unread"], found["whole"]
        share, two = mine["share"], 2 * max(block, end)
        assert abs(share - total / size) < block  # the last may have less of what does not divide
        assert mine["start"] <= share + two < total
        # a block as it is received and as it is read, activations of a few tokens
        for stage in ("look", "answers"):
            assert mine[stage] <= share + two + block / 2, stage
        for stage in ("optimizer", "checkpoint", "saving"):  # gradients and moments are there
            assert mine[stage] <= 4 * share + two, stage
        # a file that is mapped whole costs the pages of a process's part once more: this is seen
        assert whole["start"] > mine["start"] + share - block
    for name in ("model.safetensors", "config.json"):
        kept = [(place / name).read_bytes() for place in (tmp_path / "saved", places[1])]
        assert kept[0] == kept[1]
