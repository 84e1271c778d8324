"""Says where the outputs' top-k entropy and mass say that preference training went too far."""

import logging
from typing import Any

from lightning import Callback, Trainer

from spo_lightning.errors import UserError
from spo_lightning.training.callbacks.setting import Setting
from spo_lightning.training.module import Preference

log = logging.getLogger(__name__)

ENTROPY, MASS = "eval/entropy/top10", "eval/mass/top10"
NAME = "eval/overoptimisation/alarm"


class OverOptimisation(Callback):
    """Early stop on the two indicators of Shi et al. 2410.11677, section 5, at k = 10.

    Looks at every ``every_n_steps``-th outer step that was evaluated. H is the top-k entropy
    (bits), M the top-k mass of the held-out chosen answers. The alarm is 1 from the outer step on
    at which

    - H, having risen by more than ``entropy_tolerance`` above its first value, has stood by more
      than that below its peak at ``patience`` looks in a row (their sign for DPO and IPO); or
    - M has fallen and H has risen at each of the last ``patience`` looks, M by more than
      ``mass_tolerance`` in all (their sign for hinge losses).

    With ``stop`` that step is the last.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        every_n_steps: int,
        entropy_tolerance: float,
        mass_tolerance: float,
        patience: int,
        stop: bool,
    ):
        if not len(setting.held):
            raise UserError("diagnostics.overoptimisation is on, and no pair is held out")
        self.every, self.patience, self.stop = every_n_steps, patience, stop
        self.entropy_tolerance, self.mass_tolerance = entropy_tolerance, mass_tolerance
        self.names = [NAME]
        self.looks: list[list[float]] = []  # entropy, mass
        self.reason: str | None = None

    def state_dict(self) -> dict[str, Any]:
        return {"looks": self.looks, "reason": self.reason}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.looks, self.reason = state["looks"], state["reason"]

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if self.stop and self.reason is not None:  # a resumed run stays stopped
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if ENTROPY not in module.numbers or module.outer_step % self.every:
            return
        if self.reason is None:
            self.reason = self.turned(module.numbers[ENTROPY], module.numbers[MASS])
            if self.reason is not None and trainer.is_global_zero:
                said = "Stopped after" if self.stop else "Over-optimised since"
                log.info("%s outer step %d: %s", said, module.outer_step, self.reason)
        module.numbers[NAME] = float(self.reason is not None)
        trainer.should_stop |= self.stop and self.reason is not None

    def turned(self, entropy: float, mass: float) -> str | None:
        """Why this look is one too many, or None."""
        self.looks = [*self.looks, [entropy, mass]]
        first, peak = self.looks[0][0], max(look[0] for look in self.looks)
        recent = self.looks[-self.patience :]
        rose = peak > first + self.entropy_tolerance
        below = all(look[0] < peak - self.entropy_tolerance for look in recent)
        if rose and below and len(recent) == self.patience:
            return f"top-10 entropy turned down from {peak:.4f} to {entropy:.4f} bits"
        steps = self.looks[-self.patience - 1 :]
        pairs = list(zip(steps, steps[1:]))
        drifts = all(one[0] < two[0] and one[1] > two[1] for one, two in pairs)
        fell = steps[0][1] - mass
        if drifts and len(pairs) == self.patience and fell > self.mass_tolerance:
            return f"top-10 mass fell by {fell:.4f} to {mass:.4f} while the entropy kept rising"
        return None
