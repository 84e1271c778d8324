"""Rows whose numbers are known by hand, and their summary as the inspect command makes it."""

import sys

from hydra import compose, initialize_config_dir

from spo_lightning.cache import tokens
from spo_lightning.command import CONF
from spo_lightning.data import summary
from spo_lightning.data.rows import Task
from spo_lightning.models.policy import byte_tokenizer

LIMIT = 12


def row(prompt, chosen, rejected, **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}


def encoded(rows, tokenizer, limit):
    words = ["data=pairs", "data.path=rows", f"max_length={limit}"]
    with initialize_config_dir(CONF, version_base="1.3"):
        return tokens.encoded(compose("inspect", words), tokenizer, rows, "rows")


def summed(train, held, *, limit=LIMIT, **task):
    """As the inspect command does."""
    tokenizer = byte_tokenizer()
    sides = {"train": train, "held-out": held}
    return summary.summary(
        Task(train, held, **task),
        {name: encoded(rows, tokenizer, limit) for name, rows in sides.items()},
        tokenizer,
        name="rows",
        max_length=limit,
        uncut=lambda rows: encoded(rows, tokenizer, sys.maxsize),
    )


TRAIN = [
    row("ab:", "1", "22", subset="x", margin=2.0),  # tokens with the end: 3 + 2 and 3
    row("cd:", "333", "4", subset="y", margin=0.5),  # 3 + 4 and 2
    row("ef:", "5", "6"),  # as long
    row("gh:", "7" * 20, "8" * 3),  # 3 + 21 and 4: cut to 9 and 4, 12 tokens lost
    row("ab:", "1", "22"),  # the first again
    row("cd:", "4", "333"),  # the second, turned
    row("same", "9", "9"),
    row("", "1", "2"),
    row("p" * LIMIT, "1", "2"),
]
HELD = [row("AB :", "1", "2"), row(" ab: ", "1", "2", subset="x"), row("zz", "1", "22")]
