"""TRL, the peer whose trainers ours are run beside: the version that the tests know, or a skip."""

import pytest

VERSION = "1.16.0"


def trl():
    found = pytest.importorskip("trl")
    if found.__version__ != VERSION:
        pytest.skip(f"the peer is TRL {VERSION}, not {found.__version__}")
    return found


def in_order(trainer):
    """The trainer's class, which draws its rows in the order they stand in."""
    from torch.utils.data import SequentialSampler

    class InOrder(trainer):
        def _get_train_sampler(self, dataset=None):
            return SequentialSampler(dataset or self.train_dataset)

    return InOrder
