"""Mass outside the data: log-probability of answers that nobody gave, as training goes on."""

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from lightning import Callback, Trainer

from spo_lightning.data.batch import Pair
from spo_lightning.data.sets import Pairs
from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import pair_totals
from spo_lightning.training.callbacks.setting import Setting, due
from spo_lightning.training.module import Preference

KINDS = ("other", "corrupted", "shuffled")


class Probes(Callback):
    """``eval/probe/<kind>``: nats per token over a fixed set, and its ``_change`` since the start.

    The set is made once from ``rows`` held-out pairs with ``seed``, three answers to each prompt:

    - other: the chosen answer of another prompt;
    - corrupted: the chosen answer, ``share`` of its tokens (one at least) replaced by tokens drawn
      from all chosen answers;
    - shuffled: the tokens of the chosen answer in random order, the last one in its place.

    A rising number means that mass goes where no pair put it. On several processes each scores
    its share of the set.
    """

    def __init__(
        self, setting: Setting, *, every_n_steps: int, rows: int, share: float, seed: int
    ):
        good = [pair for pair in setting.held.pairs if pair.chosen]
        if not good:
            raise UserError("diagnostics.probes is on, and no pair is held out: turn it off")
        self.every, self.setting = every_n_steps, setting
        made = probe_set(good[:rows], share, seed)
        self.sets = {kind: Pairs(some, None, setting.held.pad_id) for kind, some in made.items()}
        changes = [f"eval/probe/{kind}_change" for kind in self.sets]
        self.names = [*(f"eval/probe/{kind}" for kind in self.sets), *changes]
        self.start: dict[str, float] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"start": self.start}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.start = state["start"]

    def on_train_start(self, trainer: Trainer, module: Preference) -> None:
        if module.outer_step == 0:
            self.start = self._scores(module)

    def on_train_batch_end(
        self, trainer: Trainer, module: Preference, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = module.outer_step
        if not due(step, self.every) and step != trainer.max_steps:
            return
        for kind, value in self._scores(module).items():
            module.numbers[f"eval/probe/{kind}"] = value
            module.numbers[f"eval/probe/{kind}_change"] = value - self.start[kind]

    @torch.no_grad()
    def _scores(self, module: Preference) -> dict[str, float]:
        found = {}
        for kind, pairs in self.sets.items():
            with self.setting.precision():
                totals = pair_totals(
                    module.scorer,
                    pairs,
                    batch_size=self.setting.batch_size,
                    loss=None,
                    moments=None,
                    beta=module.beta,
                    top=False,
                    world=self.setting.world,
                )
            found[kind] = -totals.numbers()["nll/chosen"]
        return found


def probe_set(held: Sequence[Pair], share: float, seed: int) -> dict[str, list[Pair]]:
    """Per kind one probe for each pair, where there is one that differs from the chosen answer."""
    chance = random.Random(seed)
    pool = [token for pair in held for token in pair.chosen]
    found: dict[str, list[Pair]] = {kind: [] for kind in KINDS}
    for pair in held:
        places = [place for run in pair.scored[0] for place in run]
        *body, last = words = tuple(pair.chosen[place] for place in places)
        shuffled = (*chance.sample(body, len(body)), last)
        made = {
            "other": chance.choice(held),
            "corrupted": with_words(pair, places, corrupted(words, pool, share, chance)),
            "shuffled": with_words(pair, places, shuffled),
        }
        for kind, answer in made.items():
            if answer.chosen != pair.chosen:
                context = answer.chosen_context
                found[kind].append(Pair(pair.prompt, answer.chosen, (), pair.row, context))
    return {kind: pairs for kind, pairs in found.items() if pairs}


def with_words(pair: Pair, places: Sequence[int], words: Sequence[int]) -> Pair:
    """The pair with other tokens in these places of its chosen answer."""
    there = dict(zip(places, words))
    return replace(pair, chosen=tuple(there.get(n, t) for n, t in enumerate(pair.chosen)))


def corrupted(
    answer: tuple[int, ...], pool: list[int], share: float, chance: random.Random
) -> tuple[int, ...]:
    """The answer with ``share`` of its tokens, one at least, drawn anew from the pool."""
    places = chance.sample(range(len(answer)), max(1, round(share * len(answer))))
    return tuple(chance.choice(pool) if n in places else t for n, t in enumerate(answer))
