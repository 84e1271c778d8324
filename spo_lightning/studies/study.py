"""Policies and methods in, files of numbers in the run directory out: probability evolution.

``evolution.csv``: along the steps the mean pi(y_w), pi(y_l), pi(O) of all starts, of the third
where y_w is rarest and of the third where it is likeliest.
``starts.csv``: per start these probabilities before and after training.
``theory.csv``: some of the short steps, predicted and measured.
``condition.csv``: the first step where similarity varies. ``numbers.json``: what all come to.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spo_lightning.errors import Diverged
from spo_lightning.records.disk import write_csv, write_text
from spo_lightning.studies import theory
from spo_lightning.studies.descent import Method, apart, descend
from spo_lightning.studies.policies import LogLinear, Make, draw

PARTS = ("chosen", "rejected", "others")  # of the probability: y_w, y_l, O
CURVE = 100  # points of a curve in evolution.csv
SHOWN_STARTS, SHOWN_STEPS = 40, 5  # per policy and method in theory.csv
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Study:
    """Trains every policy by every method from the same starts, and measures where mass goes."""

    seed: int
    starts: int
    answers: int
    chosen: Sequence[float]
    steps: int
    methods: Mapping[str, Method]
    policies: Mapping[str, Make]
    sweep: Make
    theory_lr: float
    theory_steps: int
    report: Callable[[Path], Any]  # reads the files; called by the command after ``run``

    def __post_init__(self):
        for name in ("starts", "steps", "theory_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"study.{name} must be at least 1, not {getattr(self, name)}")
        if not self.theory_lr > 0:
            raise ValueError(f"study.theory_lr must be above 0, not {self.theory_lr}")
        policies, _ = self.made()  # what they refuse is refused here
        for title, method in self.methods.items():
            if not all(apart(policy, method) for policy in policies.values()):
                raise ValueError(
                    f"study.methods.{title}.solver judges all starts together: take one that "
                    "judges each pair by itself"
                )

    @property
    def total(self) -> int:
        """Steps of all policies and methods together."""
        return len(self.policies) * len(self.methods) * self.steps

    def made(self) -> tuple[dict[str, LogLinear], LogLinear]:
        """The policies and the one of varied similarity, all from the same probabilities."""
        seeded = torch.Generator().manual_seed(self.seed)
        initial = draw(self.starts, self.answers, self.chosen, seeded)
        policies = {name: make(initial, seeded) for name, make in self.policies.items()}
        return policies, self.sweep(initial, seeded)

    def run(self, directory: Path, advance: Callable[[], Any]) -> dict[str, Any]:
        """Write the files and return numbers.json; ``advance`` is called after every step."""
        policies, varied = self.made()
        tables: dict[str, Rows] = {"evolution": [], "starts": [], "theory": [], "condition": []}
        found: dict[str, Rows] = {"trained": [], "theory": [], "condition": []}
        for name, policy in policies.items():
            for title, method in self.methods.items():
                about = {"policy": name, "method": title}
                curve, own = self.train(policy, method, advance)
                if not bool((curve > 0).all()):  # nor is nan
                    raise Diverged(f"{name}, {title}: a probability vanished; lower lr or steps")
                tables["evolution"] += evolution(curve, about)
                tables["starts"] += ends(curve, about)
                found["trained"].append(about | summary(curve))
                seen = theory.compare(policy, method, lr=self.theory_lr, steps=self.theory_steps)
                found["theory"] += agreement(seen, {**about, "lr": self.theory_lr, "own": False})
                tables["theory"] += shown(seen, curve[0], about)
                found["theory"] += agreement(own, {**about, "lr": method.lr, "own": True})
        for title, method in self.methods.items():
            rows = condition(varied, replace(method, lr=self.theory_lr), {"method": title})
            tables["condition"] += rows
            found["condition"].append({"method": title} | judged(rows))
        for name, rows in tables.items():
            write_csv(directory / f"{name}.csv", rows)
        settings = {"seed": self.seed, "starts": self.starts, "steps": self.steps}
        settings |= {"theory_lr": self.theory_lr, "theory_steps": self.theory_steps}
        numbers = settings | found
        write_text(directory / "numbers.json", json.dumps(numbers, indent=1) + "\n")
        return numbers

    def train(
        self, policy: LogLinear, method: Method, advance: Callable[[], Any]
    ) -> tuple[Tensor, theory.Changes]:
        """[T + 1, N, 3] pi(y_w), pi(y_l), pi(O) before training and after every step; and what
        the theory says of the first steps."""
        curve = [theory.masses(policy.logps(policy.start))]
        own = []
        for move in descend(policy, method, self.steps):
            curve.append(theory.masses(policy.logps(move.after)))
            if len(own) < self.theory_steps:
                own.append(theory.changes(policy, method, move))
            advance()
        return torch.stack(curve), theory.stacked(own)


def groups(curve: Tensor) -> dict[str, Tensor]:
    """Which starts: all, the third with the lowest pi(y_w), the third with the highest."""
    order = curve[0, :, 0].argsort()
    third = max(1, len(order) // 3)
    return {"all": order, "rare": order[:third], "likely": order[-third:]}


def evolution(curve: Tensor, about: Mapping[str, str]) -> Rows:
    """Means over each group of starts, at ``CURVE`` steps and the last."""
    last = len(curve) - 1
    steps = sorted({*range(0, last + 1, max(1, last // CURVE)), last})
    return [
        {**about, "group": group, "step": step, **dict(zip(PARTS, means))}
        for group, which in groups(curve).items()
        for step, means in zip(steps, curve[steps][:, which].mean(1).tolist())
    ]


def ends(curve: Tensor, about: Mapping[str, str]) -> Rows:
    """Every start before and after; ``lowest``: the deepest fall of log pi(y_w) on the way."""
    lowest = (curve[:, :, 0] / curve[0, :, 0]).amin(0).log().tolist()
    rows = []
    for start, (before, after) in enumerate(zip(curve[0].tolist(), curve[-1].tolist())):
        row: dict[str, Any] = {**about, "start": start}
        row |= {f"{part}_before": value for part, value in zip(PARTS, before)}
        row |= {f"{part}_after": value for part, value in zip(PARTS, after)}
        rows.append(row | {"lowest": lowest[start]})
    return rows


def summary(curve: Tensor) -> dict[str, Any]:
    """Means over starts before and after, of y_w also over rare and likely starts alone."""
    before, after = curve[0], curve[-1]
    moved = (after / before).log()
    numbers = {}
    for when, masses in (("before", before), ("after", after)):
        numbers |= {f"{p}_{when}": v for p, v in zip(PARTS, masses.mean(0).tolist())}
        for group, which in groups(curve).items():
            if group != "all":
                numbers[f"{group}_{when}"] = masses[which, 0].mean().item()
    return numbers | {
        "fell": (moved[:, 0] < 0).double().mean().item(),  # share of starts, after training
        "lowest": (curve[:, :, 0] / curve[0, :, 0]).min().log().item(),  # nats, at any step
        "margin": (moved[:, 0] - moved[:, 1]).mean().item(),  # nats
    }


def agreement(seen: theory.Changes, about: Mapping[str, Any]) -> Rows:
    """Per quantity the correlation and slope of measured against predicted, over all steps."""
    rows = []
    for number, quantity in enumerate(theory.QUANTITIES):
        for form in ("along", "idealised"):
            predicted = getattr(seen, form)[..., number]
            correlation, slope = theory.agreement(predicted, seen.measured[..., number])
            row = {"quantity": quantity, "form": form, "correlation": correlation, "slope": slope}
            rows.append({**about, **row})
    return rows


def shown(seen: theory.Changes, before: Tensor, about: Mapping[str, str]) -> Rows:
    """Some steps of some starts, the first step among them."""
    steps, starts = seen.measured.shape[:2]
    rows = []
    for step in range(0, steps, -(-steps // SHOWN_STEPS)):
        for start in range(0, starts, -(-starts // SHOWN_STARTS)):
            for number, quantity in enumerate(theory.QUANTITIES):
                at = step, start, number
                row = {"step": step, "start": start, "quantity": quantity}
                row |= {name: getattr(seen, name)[at].item() for name in theory.Changes._fields}
                rows.append({**about, **row, "chosen_before": before[start, 0].item()})
    return rows


def condition(policy: LogLinear, method: Method, about: Mapping[str, str]) -> Rows:
    """The first step of every start beside <g_w, g_l> - |g_w|^2, which says whether y_w falls."""
    (move,) = descend(policy, method, 1)
    excess = theory.excess(policy.scores(policy.start)).tolist()
    change = theory.measured(policy, move)[:, 0].tolist()
    return [
        {**about, "start": start, "excess": over, "change": moved}
        for start, (over, moved) in enumerate(zip(excess, change))
    ]


def judged(rows: Rows) -> dict[str, float]:
    """Shares of starts: the condition holds; y_w fell; both say the same."""
    holds = [row["excess"] > 0 for row in rows]
    fell = [row["change"] < 0 for row in rows]
    alike = [one == other for one, other in zip(holds, fell)]
    shares = {"holds": holds, "fell": fell, "alike": alike}
    return {name: sum(told) / len(rows) for name, told in shares.items()}
