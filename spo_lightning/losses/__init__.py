"""Log-probabilities of pairs in, one loss per pair [B] out.

Add one: a function in the file of its family, and its yaml. It is found here by its name,
whichever file it stands in. Pure functions; means over pairs are taken elsewhere, and no loss
knows a model or a config. Lengths are scored tokens. A loss that needs no reference does not
take one; one that follows earlier batches takes ``moments``. Every loss calls its strength
``beta``; ``beta`` times the policy's change against the reference is the reward that runs report.
"""

import inspect
from collections.abc import Callable
from functools import partial

from torch import Tensor

from spo_lightning.losses.adaptive import *  # noqa: F403
from spo_lightning.losses.adaptive import Moments
from spo_lightning.losses.reference_free import *  # noqa: F403
from spo_lightning.losses.with_reference import *  # noqa: F403
from spo_lightning.models.scorer import PairLogps

Loss = Callable[..., Tensor]


def evaluate(
    loss: Loss, policy: PairLogps, reference: PairLogps | None, moments: Moments | None
) -> Tensor:
    """[B] the loss, given only what its signature asks for."""
    offered = {"reference": reference, "moments": moments}
    asked = inspect.signature(loss).parameters
    return partial(loss, **{name: it for name, it in offered.items() if name in asked})(policy)


def needs_moments(loss: Loss) -> bool:
    """Whether somebody has to keep the moments of earlier batches for this loss."""
    return "moments" in inspect.signature(loss).parameters
