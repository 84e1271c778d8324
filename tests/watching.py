"""A diagnostic in, the rows that the Recorder would write out."""

import csv
from contextlib import nullcontext
from pathlib import Path

from fitting import PAD_ID, fitted, objective
from lightning import Callback
from tiny import random_pairs

from spo_lightning.data.sets import Pairs
from spo_lightning.training.callbacks.setting import Setting


def setting(directory=Path(), given=None):
    given = Pairs(random_pairs(12), None, PAD_ID) if given is None else given
    return Setting(directory, given, given, 5, nullcontext)


class Rows(Callback):
    """What the Recorder would write."""

    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, module, *_):
        self.rows.append(dict(module.numbers))


def watched(diagnostic, made, words=("loss=dpo", "solver=none"), **how):
    rows = Rows()
    fit = fitted(made, objective(*words), callbacks=[diagnostic, rows], **how)
    return fit, rows.rows


def table(path):
    with path.open(newline="") as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
