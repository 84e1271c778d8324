"""Says when the chosen answers lose probability while the reward margin looks ever better."""

import logging
from typing import Any

from lightning import Callback, Trainer

from spo_lightning.training.callbacks.setting import Setting
from spo_lightning.training.module import Preference

log = logging.getLogger(__name__)

NAME = "train/displacement/alarm"
READ = {"train/rewards/margins", "train/displacement/rate"}


class DisplacementAlarm(Callback):
    """Reads the logged numbers of a step; costs nothing.

    On means over the last ``window`` logged rows, the alarm is 1 where all three hold:

    - more than ``share`` of the pairs have log pi(y_w) below the reference's;
    - log pi(y_w) is below the reference's by more than ``tolerance`` nats per token on average,
      because a share alone counts falls that are too small to matter;
    - the reward margin is above that of the ``window`` rows before (0 before the first). Rows of
      one answer have no margin, a reward model no log-probability, and neither has an alarm.

    The first time it says so, and with ``stop`` it ends the training after that step.
    """

    def __init__(
        self,
        setting: Setting,
        *,
        every_n_steps: int,
        share: float,
        tolerance: float,
        window: int,
        stop: bool,
    ):
        self.every, self.share, self.tolerance = every_n_steps, share, tolerance
        self.window, self.stop = window, stop
        self.names = [NAME]
        self.rows: list[list[float]] = []  # rate, fall, margin of the last 2 * window rows
        self.warned = self.stopped = False

    def state_dict(self) -> dict[str, Any]:
        return {"rows": self.rows, "warned": self.warned, "stopped": self.stopped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rows, self.warned = state["rows"], state["warned"]
        self.stopped = state["stopped"]

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if self.stopped:  # a resumed run stays stopped
            trainer.should_stop = True

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        numbers = module.numbers
        if not numbers.keys() >= READ or module.outer_step % self.every:
            return
        sounds = self.sounds(
            numbers["train/displacement/rate"],
            # nll is nats per token of the same answers: together they give the tokens
            -numbers["train/displacement/chosen"] / _tokens(numbers),
            numbers["train/rewards/margins"],
        )
        numbers[NAME] = float(sounds)
        if sounds and not self.warned:
            self.warned = True
            if trainer.is_global_zero:
                log.warning("%s", self._said(module.outer_step))
        if sounds and self.stop:
            trainer.should_stop = self.stopped = True

    def sounds(self, rate: float, fall: float, margin: float) -> bool:
        """Whether the three conditions hold with this row; ``fall`` in nats per token."""
        self.rows = [*self.rows, [rate, fall, margin]][-2 * self.window :]
        now, before = self.rows[-self.window :], self.rows[: -self.window]
        if len(now) < self.window:
            return False
        rates, falls, margins = (sum(column) / len(now) for column in zip(*now))
        earlier = sum(row[2] for row in before) / max(1, len(before))
        return rates > self.share and falls > self.tolerance and margins > earlier

    def _said(self, step: int) -> str:
        rates, falls, margins = (sum(c) / self.window for c in zip(*self.rows[-self.window :]))
        end = "Training stops here" if self.stop else "This is said once"
        return (
            f"Step {step}: chosen answers lose probability while the reward margin rises to "
            f"{margins:.2f}: {rates:.0%} of pairs are below the reference, the mean by "
            f"{falls:.2f} nats per token. Remedies: loss=spo or solver=penalty, a higher "
            f"solver.weight, a lower optimizer.lr. {end}"
        )


def _tokens(numbers: dict[str, float]) -> float:
    """Tokens per chosen answer, from log-probabilities per answer and per token."""
    per_token = numbers["train/nll/chosen"]
    return max(1.0, -numbers["train/logps/chosen"] / per_token) if per_token else 1.0
