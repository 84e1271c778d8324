"""The problems of ``arithmetic``; a right chain against the same chain with one slip carried on.

What is rejected is wrong by construction, so continued SFT on the chosen chains is the ceiling.
"""

import random

from spo_lightning.data.rows import Row, Task, limit
from spo_lightning.data.tasks.arithmetic import Sizes, drawn, final_integer, given, worked


def slips(
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
) -> Task:
    """Pairs of chains that differ from one step on."""
    sizes = Sizes(sft_rows, prompts, eval_prompts)
    if path is None:
        found = drawn(sizes, operations, digits, eval_fraction, eval_path, seed)
    else:
        found = given(sizes, path, eval_path, eval_fraction, seed)
    train = [_row(prompt, seed) for prompt in found.train]
    return Task(
        train=limit(train, max_rows, seed),
        held_out=[_row(prompt, seed) for prompt in found.held_out],
        sft=[{"prompt": prompt, "completion": chain(prompt)} for prompt in found.sft],
        answer_of=final_integer,
        counts=found.counts,
    )


def _row(prompt: str, seed: int) -> Row:
    # seeded by the prompt: the pair of a prompt does not depend on what else is drawn
    return {
        "prompt": prompt,
        "chosen": chain(prompt),
        "rejected": slipped(prompt, random.Random(f"{seed}/{prompt}")),
        "answer": str(worked(prompt)[-1][-1]),
    }


def chain(prompt: str) -> str:
    """The right chain, ``12+7=19;19-5=14;``."""
    return "".join(f"{a}{sign}{b}={c};" for a, sign, b, c in worked(prompt))


def slipped(prompt: str, chance: random.Random) -> str:
    """The chain with a wrong result at a random step, by which all later results are off."""
    steps = worked(prompt)
    place = chance.randrange(len(steps))
    result = steps[place][-1]
    wrong = chance.choice([_off(result, chance), _wrong_digit(result, chance)])
    shifted = [
        (a + (wrong - result) * (n > place), sign, b, c + (wrong - result) * (n >= place))
        for n, (a, sign, b, c) in enumerate(steps)
    ]
    return "".join(f"{a}{sign}{b}={c};" for a, sign, b, c in shifted)


def _off(result: int, chance: random.Random) -> int:
    return result + chance.choice([-1, 1]) * chance.randint(1, 9)


def _wrong_digit(result: int, chance: random.Random) -> int:
    digits = list(str(abs(result)))
    place = chance.randrange(len(digits))
    digits[place] = chance.choice([d for d in "0123456789" if d != digits[place]])
    return int("".join(digits)) * (-1 if result < 0 else 1)
