"""A loss and all that there is in, what its signature asks for handed to it; [B] out."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from spo_lightning.losses.adaptive import Moments
from spo_lightning.models.scorer import PairLogps

Loss = Callable[..., Tensor]


@dataclass(frozen=True)
class Beside:
    """All that a loss can be given besides the policy."""

    reference: PairLogps | None
    moments: Moments | None
    step: int = 0  # outer steps before this one; 0 for held-out pairs
    kl: Tensor | None = None  # mean log-ratio of the outer step's prompts with others' answers

    def of(self, loss: Loss, policy: PairLogps) -> Tensor:
        """[B] the loss, given only what its signature asks for."""
        offered = {"reference": self.reference, "moments": self.moments, "beside": self}
        offered |= {"margins": policy.margins, "squares": policy.squares, "step": self.step}
        offered |= {"reference_sides": policy.reference_sides}
        offered |= {"divergences": policy.diverged, "sentences": policy.sentences, "kl": self.kl}
        asked = inspect.signature(loss).parameters
        return partial(loss, **{name: it for name, it in offered.items() if name in asked})(policy)


def evaluate(
    loss: Loss,
    policy: PairLogps,
    reference: PairLogps | None,
    moments: Moments | None,
    step: int = 0,
    kl: Tensor | None = None,
) -> Tensor:
    """[B] the loss, given only what its signature asks for."""
    return Beside(reference, moments, step, kl).of(loss, policy)


def asks(loss: Loss, name: str) -> bool:
    """Whether the loss, or one that it is made of, takes an argument of this name."""
    inner = loss.keywords.get("losses", ()) if isinstance(loss, partial) else ()
    return name in inspect.signature(loss).parameters or any(asks(one, name) for one in inner)
