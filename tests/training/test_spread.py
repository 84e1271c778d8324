"""Parameters spread over processes: every solver takes the steps that one process takes."""

import contextlib
import os
import socket
from dataclasses import dataclass

import pytest
import torch
from fitting import SGD, SOLVERS, fitted, objective, scored
from tiny import lora, policy, random_pairs

from spo_lightning.evaluation.held_out import pair_totals
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding
from spo_lightning.run.processes import _group
from spo_lightning.training.reference import MovingReference
from spo_lightning.world import ALONE, World, whole

STEPS = 10
SHARES = ("train/rewards/accuracies", "train/displacement/rate")
FINITE = "solver/hvp=finite_difference"  # what is spread is differentiated once


@dataclass(frozen=True)
class Case:
    """A fit, and how its parameters are spread."""

    name: str
    words: tuple[str, ...]
    family: str = "llama"
    adapters: bool = False
    tied: bool = False
    reshard: bool = True
    copies: int = 1  # groups of processes with all parts each, where there are four processes
    lower: bool = False  # texts of its own for the lower level
    moving: bool = False
    attention: str = "auto"
    recomputed: bool = False


CASES = [
    *(Case(name, (*words, FINITE) if name in ("second", "implicit") else tuple(words))
      for name, words in SOLVERS.items()),
    Case("none, adapters", ("solver=none",), adapters=True),
    Case("penalty, adapters", ("solver=penalty",), adapters=True),
    Case("unrolled, adapters", tuple(SOLVERS["unrolled"]), adapters=True),
    Case("penalty, tied", ("solver=penalty",), tied=True),
    Case("penalty, gpt2", ("solver=penalty",), family="gpt2", tied=True),
    Case("penalty, gathered once", ("solver=penalty",), reshard=False),
    Case("inner, gathered once", tuple(SOLVERS["inner"]), reshard=False),
    Case("penalty, two groups", ("solver=penalty",), copies=2),
    Case("penalty, texts", ("solver=penalty",), lower=True),
    Case("penalty, texts, gathered once", ("solver=penalty",), lower=True, reshard=False),
    Case("penalty, sdpa", ("solver=penalty",), attention="sdpa"),
    Case("penalty, recomputed", ("solver=penalty",), recomputed=True),
    Case("moving reference", ("solver=none",), moving=True),
    Case("ipo", ("loss=ipo", "solver=none")),
]  # fmt: skip


def found(case, world):
    """Numbers of every step, parameters, held-out numbers: of a fit in so many processes."""
    made = policy(case.family, attention=case.attention, tie_word_embeddings=case.tied)
    made = lora(made) if case.adapters else made
    given, texts = scored(made.lm), scored(made.lm, random_pairs(9, seed=3))
    if case.recomputed:
        made.lm.gradient_checkpointing_enable({"use_reentrant": False})
        made.lm.train()
    scorer = Scorer(made.lm, True)
    if world.size > 1:
        copies = case.copies if world.size > 2 else 1
        spreading, how = Sharding(case.reshard, copies, False), {"trains": True, "unpaired": False}
        made, scorer = spreading(made, lambda found: Scorer(found.lm, True), world, **how)
    moving = MovingReference(0.5, 2, True) if case.moving else None
    objectives = ("loss=dpo", *case.words)
    how = {"steps": STEPS, "micro": 2, "scorer": scorer, "clip_norm": 1.0, "world": world}
    how |= {"lower": texts if case.lower else None, "moving": moving, "optimizer": SGD}
    fit = fitted(made, objective(*objectives), given, **how)
    looked = pair_totals(
        scorer, given, batch_size=3, loss=None, moments=None, beta=0.1, top=True, world=world
    )
    parameters = {n: whole(p.detach()).clone() for n, p in fit.module.trainable().items()}
    return {"numbers": fit.numbers, "held-out": looked.numbers(), "parameters": parameters}


def process(rank, size, port, cases, told):
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_PORT": port}
    place |= {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in place.items()})
    with _group(os.environ) as group:
        world = World(rank, size, lambda: torch.device("cpu"), group)
        results = {case.name: found(case, world) for case in cases}
    if rank == 0:
        torch.save(results, told)


def together(size, cases, told):
    """What the first of so many processes found."""
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (size, port, cases, told), nprocs=size)
    return torch.load(told, weights_only=False)


def apart(mine, theirs):
    """How far two sets of results are apart: in numbers, held-out numbers and parameters.

    Shares of pairs are left out of the first step: there the policy is the reference, and whether
    a difference of nothing is above 0 is rounding.
    """
    numbers = [
        abs(ours[name] - value) / max(1.0, abs(value))
        for number, (ours, step) in enumerate(zip(mine["numbers"], theirs["numbers"], strict=True))
        for name, value in step.items()
        if number or name not in SHARES
    ]
    assert [set(step) for step in mine["numbers"]] == [set(step) for step in theirs["numbers"]]
    held = [abs(mine["held-out"][n] - value) for n, value in theirs["held-out"].items()]
    weights = [
        float((mine["parameters"][name] - value).abs().max())
        for name, value in theirs["parameters"].items()
    ]
    return max(numbers), max(held), max(weights)


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(
    "size", [pytest.param(2, marks=pytest.mark.slow), pytest.param(4, marks=pytest.mark.page)]
)
def test_parts_end_where_the_whole_ends(tmp_path, size):
    spread = together(size, CASES, tmp_path / "told.pt")
    for case in CASES:
        one = found(case, ALONE)
        assert len(one["numbers"]) == STEPS
        assert max(apart(spread[case.name], one)) < 1e-9, case.name
