"""A question of the bench in, at a tiny size; its numbers and files out, in this process."""

import signal
from contextlib import contextmanager

import hydra.utils
import pytest
from hydra import compose, initialize_config_dir
from pairs import CONF

from spo_lightning.config import knobs
from spo_lightning.errors import UserError

# two narrow layers, few words, short texts
TINY = (
    "model.config.hidden_size=16",
    "model.config.intermediate_size=24",
    "model.config.num_hidden_layers=2",
    "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=2",
    "hardware=cpu",
    "hardware.threads=1",
    "batch_size=2",
)
SHORT = ("prompt=[4,9]", "completion=[3,6]", "vocabulary=512")
STEP = (
    *TINY,
    "only=[chat]",
    "shapes.chat.prompt=[4,9]",
    "shapes.chat.completion=[3,6]",
    "vocabularies=[512]",
    "steps=1",
    "warmup=1",
    "repetitions=2",
    "memory=false",
    "lr=0.01",
)


def bench_config(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("bench", [*words])


@contextmanager
def signals_kept():
    """A bench takes signals over; tests want theirs back."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def measured(directory, *words):
    """What the command does after it has read its command line; returns bench.json."""
    with initialize_config_dir(str(CONF), version_base="1.3"), signals_kept():
        cfg = compose("bench", [*words])
        touched = [word.split("=")[0].lstrip("+~") for word in words]
        line = knobs.Given(touched, {"what": "any"}, compose("bench", words[:1]))
        directory.mkdir(exist_ok=True)
        return hydra.utils.get_method(cfg.what._target_)(cfg, directory, line)


def refused(directory, says, *words):
    """Whether the words end in one line that says this, and leave nothing."""
    with pytest.raises(UserError) as error:
        measured(directory, *words)
    assert says in str(error.value)
    assert not list(directory.iterdir())
