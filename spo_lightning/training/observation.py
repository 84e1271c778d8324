"""What one outer step showed: numbers of its full passes, and how hard F and solver pull."""

import math

import torch
from torch import Tensor

from spo_lightning.evaluation.totals import Totals, pair_numbers
from spo_lightning.models.scorer import PairLogps


class Observation:
    """What one outer step showed: numbers of its full passes, and how hard F and solver pull."""

    def __init__(self, beta: float, full: bool, moments: bool):
        self.beta, self.full, self.moments = beta, full, moments
        self.totals = Totals()
        self.objective = torch.zeros(())  # sum of all that was minimised, to see a NaN
        self._last: tuple[PairLogps, PairLogps, Tensor] | None = None

    def look(
        self,
        policy: PairLogps,
        reference: PairLogps,
        start: PairLogps,
        apart: PairLogps,
        upper: Tensor,
        lower: Tensor,
        kl: Tensor | None,
    ) -> None:
        """One microbatch's pass over its responses; ``start``: the reference before it moved;
        ``apart``: the lower level's own texts, or ``policy``."""
        if self.moments:
            by_token, summed = policy.mean_gap - reference.mean_gap, policy.gap - reference.gap
            for name, margin in (("", by_token), ("summed_", summed)):
                seen = margin.detach().double()
                self.totals.add({f"{name}mean": seen, f"{name}square": seen.square()})
            ratios = (policy.sums - reference.sums).detach().double()
            self.totals.add({"ratio": (ratios, policy.counts > 0)})
        if not self.full:
            return
        self.totals.add(pair_numbers(policy, reference, start, beta=self.beta))
        self.totals.add({"loss/upper": upper})
        if not policy.rewards:
            self.totals.add({"loss/lower": lower})
        self.totals.add({} if kl is None else {"kl": kl})
        self._last = policy, apart, upper

    def close(self, objective: Tensor) -> None:
        """``objective``: the sum that the microbatch's backward will start from."""
        if self._last is None:
            return
        policy, apart, upper = self._last
        self._last = None
        self.totals.add({"loss": (objective, torch.tensor(upper.numel()))})

        def pull(value: Tensor, on: PairLogps) -> Tensor:
            """d value / d log pi(y_w), spread over the answer's tokens."""
            slope = torch.autograd.grad(value, on.logps, retain_graph=True, materialize_grads=True)
            return slope[0][~on.side]

        plain = pull(upper.sum(), policy)
        added = (pull(objective, policy) - plain).abs().sum()
        if apart is not policy:
            added = added + pull(objective, apart).abs().sum()
        self.totals.add({"solver/slope_ratio": (added, plain.abs().sum())})

    def margins(self, means: dict[str, float], count: int) -> dict[str, float]:
        """Mean and unbiased standard deviation of both margins, taken out of ``means``; nan for
        one pair."""
        found = {}
        for name in ("", "summed_"):
            mean = found[f"{name}mean"] = means.pop(f"{name}mean")
            variance = max(means.pop(f"{name}square") - mean**2, 0.0)
            spread = math.sqrt(variance * count / (count - 1)) if count > 1 else math.nan
            found[f"{name}spread"] = spread
        return found
