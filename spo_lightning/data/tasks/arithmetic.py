"""Sums like ``7+5-3+9=?`` and their worked chains; pairs are sampled from the policy and judged.

Two axes: capability is the right final number, preference is the count of ``,`` in the chain.
"""

import random
import re
from dataclasses import dataclass
from typing import NamedTuple

from spo_lightning.data.reading import read
from spo_lightning.data.rows import Row, Task, held_out, limit, split, without
from spo_lightning.errors import UserError

PROBLEM = re.compile(r"\d+([+-]\d+)+=\?")
FINAL = re.compile(r"(-?\d+)[;,]?\s*")


@dataclass(frozen=True)
class Problems:
    """Prompts, no two alike, from a file or drawn."""

    sft: list[str]
    train: list[str]
    held_out: list[str]
    counts: dict[str, int]


class Sizes(NamedTuple):
    """How many problems each part holds at most."""

    sft: int
    train: int
    held_out: int


def arithmetic(
    *,
    path: str | None,
    eval_path: str | None,
    eval_fraction: float,
    max_rows: int | None,
    seed: int,
    operations: int,
    digits: int,
    sft_rows: int,
    prompts: int,
    eval_prompts: int,
    samples: int,
    temperature: float,
) -> Task:
    """Prompts with answers; the SFT chains end each step in ``;`` or ``,`` at random."""
    if samples < 2 or temperature <= 0:
        raise UserError(
            f"data.samples={samples} data.temperature={temperature}: sample at least 2 answers "
            "per prompt, at a temperature above 0"
        )
    sizes = Sizes(sft_rows, prompts, eval_prompts)
    if path is None:
        found = drawn(sizes, operations, digits, eval_fraction, eval_path, seed)
    else:
        found = given(sizes, path, eval_path, eval_fraction, seed)
    ends = random.Random(f"ends/{seed}")
    return Task(
        train=limit([_row(prompt) for prompt in found.train], max_rows, seed),
        held_out=[_row(prompt) for prompt in found.held_out],
        sft=[{"prompt": p, "completion": chain(p, ends=ends)} for p in found.sft],
        answer_of=final_integer,
        judge=commas,
        samples=samples,
        temperature=temperature,
        counts=found.counts,
    )


def drawn(
    sizes: Sizes,
    operations: int,
    digits: int,
    eval_fraction: float,
    eval_path: str | None,
    seed: int,
) -> Problems:
    """Problems drawn until every part is full; the hash of a prompt decides its side."""
    if eval_path is not None:
        raise UserError("data.eval_path without data.path: the problems are drawn; set both")
    if operations < 1 or digits < 1 or min(sizes) < 0 or not 0 < eval_fraction < 1:
        raise UserError(
            f"data.operations={operations} data.digits={digits} data.eval_fraction={eval_fraction}"
            f" with {tuple(sizes)} rows: choose at least 1, 1, within 0 and 1, and no rows below 0"
        )
    random_, seen = random.Random(f"problems/{seed}"), set()
    sides: dict[bool, list[str]] = {False: [], True: []}
    wanted = {False: sizes.sft + sizes.train, True: sizes.held_out}
    # a side that thirty times its expected draws do not fill has too few problems
    expected = max(wanted[False] / (1 - eval_fraction), wanted[True] / eval_fraction)
    for _ in range(int(30 * expected) + 1):
        prompt = str(random_.randint(1, 10**digits - 1))
        for _ in range(operations):
            prompt += random_.choice("+-") + str(random_.randint(1, 10**digits - 1))
        prompt += "=?"
        side = held_out(prompt, eval_fraction)
        if prompt not in seen and len(sides[side]) < wanted[side]:
            seen.add(prompt)
            sides[side].append(prompt)
        if len(seen) == sum(wanted.values()):
            return _parts(sides[False], sides[True], sizes, {"drawn": len(seen)})
    raise UserError(
        f"only {len(seen)} of {sum(wanted.values())} problems exist with data.operations="
        f"{operations} data.digits={digits} data.eval_fraction={eval_fraction}: ask for fewer "
        "(data.sft_rows, data.prompts, data.eval_prompts) or raise one of them"
    )


def given(
    sizes: Sizes, path: str, eval_path: str | None, eval_fraction: float, seed: int
) -> Problems:
    """Problems of a file with a ``prompt`` per row, shared out in proportion to the sizes."""
    rows = _problems(path, "data.path")
    if eval_path is None:
        train, held = split(rows, eval_fraction)
    else:
        held = _problems(eval_path, "data.eval_path")
        train = without(rows, held)
    random.Random(f"order/{seed}").shuffle(train)
    unused = len(rows) - len(train) - (len(held) if eval_path is None else 0)
    room = sizes.sft + sizes.train
    counts = {"read": len(rows), "also in data.eval_path": unused}
    # a short file is shared out, a long one is cut
    share = min(sizes.sft, len(train) * sizes.sft // max(room, 1))
    shared = sizes._replace(sft=share)
    return _parts(
        [row["prompt"] for row in train], [row["prompt"] for row in held], shared, counts
    )


def _parts(train: list[str], held: list[str], sizes: Sizes, counts: dict[str, int]) -> Problems:
    rest = train[sizes.sft : sizes.sft + sizes.train]
    return Problems(train[: sizes.sft], rest, held[: sizes.held_out], counts)


def _problems(path: str, where: str) -> list[Row]:
    prompts = {}
    rows = read(path, split="train", where=where)
    for at, row in enumerate(rows):
        prompt = row.get("prompt")
        if not isinstance(prompt, str) or not PROBLEM.fullmatch(prompt):
            raise UserError(f"{rows.named(at)}: 'prompt' is not like 12+7-5+9=?: correct it")
        prompts[prompt] = {"prompt": prompt}
    return list(prompts.values())


def _row(prompt: str) -> Row:
    return {"prompt": prompt, "answer": str(worked(prompt)[-1][-1])}


def worked(prompt: str) -> list[tuple[int, str, int, int]]:
    """The steps of a problem: left, sign, right, result."""
    first, *rest = re.split(r"([+-])", prompt.removesuffix("=?"))
    value, steps = int(first), []
    for sign, right in zip(rest[::2], map(int, rest[1::2])):
        result = value + right if sign == "+" else value - right
        steps.append((value, sign, right, result))
        value = result
    return steps


def chain(prompt: str, *, ends: random.Random) -> str:
    """The worked chain ``7+5=12;12-3=9,``, each step ended by ``;`` or ``,`` at random."""
    return "".join(f"{a}{s}{b}={c}{ends.choice(';,')}" for a, s, b, c in worked(prompt))


def final_integer(completion: str) -> str | None:
    """The integer after the last ``=``, or none."""
    found = FINAL.fullmatch(completion.rpartition("=")[2])
    return found[1] if found and "=" in completion else None


def commas(completion: str) -> float:
    """The judge: how many ``,`` a chain has, whether or not it is right."""
    return float(completion.count(","))
