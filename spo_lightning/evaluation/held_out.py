"""A model and held-out rows in, numbers out: the same rows before and after training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from spo_lightning import losses
from spo_lightning.data.chat import shown
from spo_lightning.data.rows import prompt_key
from spo_lightning.data.sets import Pairs
from spo_lightning.evaluation import groups
from spo_lightning.evaluation.shares import Items, shares
from spo_lightning.evaluation.totals import Totals, pair_numbers, wilson
from spo_lightning.evaluation.wins import Against, Judged
from spo_lightning.models.generate import Answer, Decoding, answered, answers
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import Scorer, reference_logps
from spo_lightning.records.progress import Stages
from spo_lightning.world import Turn, World

log = logging.getLogger(__name__)

RIVALS, MINE = 1_000, 2_000  # added to the seed of the init's and of the policy's own samples
ACCURACY = "rewards/accuracies"
ORDERS = "preference/accuracy"
TOP = 10  # most probable next tokens whose entropy and mass are reported


class PairScores(NamedTuple):
    """Means over held-out pairs, and each pair's change against the reference in nats."""

    means: dict[str, float]
    by: groups.Numbers
    chosen_delta: list[float | None]  # [N]
    rejected_delta: list[float | None]
    parts: list[dict[str, groups.Part]]  # what each pair adds to every sum and count


@torch.no_grad()
def pair_totals(
    scorer: Scorer,
    pairs: Pairs,
    *,
    batch_size: int,
    loss: Callable[..., Tensor] | None,
    moments: losses.Moments | None,
    kl: Tensor | None = None,
    beta: float,
    top: bool,
    world: World,
    each: groups.PerPair | None = None,
    advance: Callable[[Turn], None] = lambda _: None,
) -> Totals:
    """Sums and counts of the held-out numbers, over all processes; ``each`` is given what the
    pairs of this one add to them."""
    totals = Totals()
    for turn in world.deal(pairs.batches(batch_size)):
        batch = pairs.batch(turn.item).to(scorer.device)
        policy = scorer(batch)
        reference = None if batch.reference is None else reference_logps(batch)
        numbers: dict[str, Any] = pair_numbers(policy, reference, beta=beta)
        if loss is not None:
            numbers["loss"] = losses.evaluate(loss, policy, reference, moments, kl=kl)
        # of labelled rows all may be bad ones: then none of their tokens is looked at
        none = batch.with_chosen is not None and not len(batch.with_chosen)
        none = none and scorer.spread is None  # what is spread is read by all processes together
        chosen, tops = batch.of(~batch.rejected) if none else batch.chosen_only, {}
        if top and scorer.predicts and not policy.rewards:
            looked = policy.logps.new_zeros(2, 0) if none else scorer.top(chosen, TOP)
            tops["entropy/top10"], tops["mass/top10"] = looked
        totals.add(numbers | tops, turn.mine)
        if each is not None:
            each.add(turn, numbers, tops, chosen.pair)
        advance(turn)
    return totals.over(world)


def pair_scores(
    scorer: Scorer,
    pairs: Pairs,
    *,
    beta: float,
    batch_size: int,
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> PairScores:
    """Held-out pairs under the model as it is now."""
    each = groups.PerPair()
    with stages.stage("held-out pairs", len(pairs)) as advance, precision():
        totals = pair_totals(
            scorer,
            pairs,
            batch_size=batch_size,
            loss=None,
            moments=None,
            beta=beta,
            top=True,
            world=stages.world,
            each=each,
            advance=lambda turn: advance(sum(map(len, turn.together))),
        )
    parts = each.gathered(stages.world)
    means, by = totals.numbers(), groups.means_by(parts, pairs.groups)
    of = groups.places_by(pairs.groups)
    if scorer.reading.reward:
        means = _with_interval(means, ACCURACY, len(pairs))
        by = {group: _with_interval(some, ACCURACY, len(of[group])) for group, some in by.items()}
    if pairs.orders:
        means |= _of_orders(pairs, parts, [*parts])
        by = {group: some | _of_orders(pairs, parts, of[group]) for group, some in by.items()}
    chosen, rejected = (
        [it[name][0] / beta if it.get(name, (0, 0))[1] else None for it in parts.values()]
        for name in ("rewards/chosen", "rewards/rejected")
    )
    return PairScores(means, by, chosen, rejected, [*parts.values()])


def _with_interval(numbers: dict[str, float], name: str, count: int) -> dict[str, float]:
    low, high = wilson(numbers[name], count)
    return {**numbers, f"{name}_low": low, f"{name}_high": high}


def _of_orders(
    pairs: Pairs, parts: Mapping[int, dict[str, groups.Part]], places: Sequence[int]
) -> dict[str, float]:
    """How often a ranker names the better answer, a pair's share being that of its two orders (a
    tie is half), and how often the orders name different answers."""
    odds: dict[int, list[float]] = {}
    for place in places:
        chosen, rejected = (parts[place][f"logps/{side}"][0] for side in ("chosen", "rejected"))
        odds.setdefault(pairs.pairs[place].row // 2, []).append(chosen - rejected)
    right = sum(sum((z > 0) + (z == 0) / 2 for z in some) / len(some) for some in odds.values())
    numbers = _with_interval({ORDERS: right / len(odds)}, ORDERS, len(odds))
    both = [some for some in odds.values() if len(some) == 2]
    against = {"orders/contradict": sum(a * b < 0 for a, b in both) / len(both)} if both else {}
    return numbers | against


class Answers(NamedTuple):
    """Greedy answers to held-out prompts, whether each is right, and what they come to."""

    texts: list[str]
    right: list[bool | None]
    numbers: dict[str, float]
    given: list[Answer]


def greedy_answers(
    policy: Policy, rows: Sequence[dict], task: Any, how: Decoding, stages: Stages
) -> Answers:
    """Exact match where the data has an answer, ROUGE where it is a summarization task."""
    given = answered(policy, rows, how, stages, "held-out answers")
    texts = [answer.text for answer in given]
    right = [correct(task, row, text) for row, text in zip(rows, texts)]
    return Answers(texts, right, text_numbers(task, rows, texts), given)


class HeldOut(NamedTuple):
    """What one look at the held-out rows gave."""

    numbers: dict[str, float]
    by: groups.Numbers  # the same of each group of rows, where there are any
    answers: Answers
    scores: PairScores | None
    rewards: bool  # of a reward model
    judged: Judged | None  # sampled answers against their rivals
    items: Items = {}  # what each prompt adds to a number, where it was kept

    @property
    def told(self) -> dict[str, Any]:
        """As metrics.json and eval.json have it."""
        return {**self.numbers, "by": self.by} if self.by else self.numbers


def held_out(
    policy: Policy,
    scorer: Scorer,
    task: Any,
    rows: Sequence[dict],
    pairs: Pairs,
    *,
    beta: float,
    by: str | None,
    how: Decoding,
    against: Against | None,
    refusals: Sequence[str],
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> HeldOut:
    """All held-out numbers of a policy, over all rows and in the groups that they and the column
    ``by`` make; without rows, of what ranks and answers nothing, those of pairs alone.
    ``against``: what a win is counted against. ``refusals``: how an answer that refuses begins.
    """
    scores = None
    if len(pairs):
        scores = pair_scores(
            scorer,
            pairs,
            beta=beta,
            batch_size=how.batch_size,
            precision=precision,
            stages=stages,
        )
    if not rows:
        found = (scores.means, scores.by) if scores else ({}, {})
        return HeldOut(*found, Answers([], [], {}, []), scores, policy.rewards, None)
    greedy = greedy_answers(policy, rows, task, how, stages)
    won = None if against is None else judged(policy, rows, task, how, against, stages)

    def numbers(places: Sequence[int], texts: dict[str, float], pairs: dict) -> dict[str, float]:
        mine = shares([greedy.given[place] for place in places], refusals)
        return {**texts, **mine, **pairs, **(won.numbers(places) if won else {})}

    told = {}
    for group, places in groups.places_by(groups.groups_of(rows, by)).items():
        some = [rows[place] for place in places], [greedy.texts[place] for place in places]
        pairs_of = scores.by.get(group, {}) if scores else {}
        told[group] = numbers(places, text_numbers(task, *some), pairs_of)
    whole = numbers(range(len(rows)), greedy.numbers, scores.means if scores else {})
    return HeldOut(whole, told, greedy, scores, False, won)


def judged(
    policy: Policy,
    rows: Sequence[dict],
    task: Any,
    how: Decoding,
    against: Against,
    stages: Stages,
) -> Judged:
    """The policy's samples against the rivals' answers; the first process asks the judge."""
    mine = samples(policy, rows, task, how, MINE, stages)
    return compared(policy, rows, mine, against, stages.world)


def compared(
    policy: Policy, rows: Sequence[dict], mine: Sequence[str], against: Against, world: World
) -> Judged:
    """Any answers against the rivals'; lengths are in the policy's tokens."""
    theirs, judge = against.texts, against.judge
    verdicts = world.once(lambda: judge.compare(rows, mine, theirs))
    if all(win is None for win in verdicts.wins):
        log.warning("judge: no verdict on any of %d prompts", len(rows))
    alone: dict[str, Any] = {"add_special_tokens": False, "verbose": False}
    both = (policy.tokenizer([*texts], **alone)["input_ids"] for texts in (mine, theirs))
    lengths = [(len(a), len(b)) for a, b in zip(*both)]
    return Judged(mine, theirs, verdicts, lengths, [prompt_key(row["prompt"]) for row in rows])


def samples(
    policy: Policy, rows: Sequence[dict], task: Any, how: Decoding, extra: int, stages: Stages
) -> list[str]:
    """One sampled answer per held-out prompt; ``extra`` keeps the two sides' draws apart."""
    drawn = replace(how, temperature=task.temperature, seed=how.seed + extra)
    return answers(policy, rows, drawn, stages, "held-out samples")


def correct(task: Any, row: dict, text: str) -> bool | None:
    """Whether the text's final answer is the row's; None where the row has none."""
    if task.answer_of is None or row.get("answer") is None:
        return None
    return task.answer_of(text) == str(row["answer"])


def text_numbers(task: Any, rows: Sequence[dict], texts: Sequence[str]) -> dict[str, float]:
    """exact_match and rouge1, rouge2, rougeL of the answers, as far as the data allows."""
    numbers: dict[str, float] = {}
    known = [(r, t) for r, t in zip(rows, texts) if r.get("answer") is not None]
    if task.answer_of is not None and known:
        from spo_lightning.evaluation.text_metrics import ExactMatch

        numbers |= ExactMatch(keep_in_memory=True).compute(  # type: ignore[operator]
            predictions=[task.answer_of(text) or "" for _, text in known],
            references=[str(row["answer"]) for row, _ in known],
        )
    if task.summary and rows:
        from spo_lightning.evaluation.text_metrics import Rouge

        numbers |= Rouge(keep_in_memory=True).compute(  # type: ignore[operator]
            predictions=[text for text, row in zip(texts, rows) if "chosen" in row],
            references=[said(row["chosen"]) for row in rows if "chosen" in row],
        )
    return {name: float(value) for name, value in numbers.items()}


def side_by_side(
    task: Any,
    rows: Sequence[dict],
    of: Sequence[int],
    held: Pairs,
    before: HeldOut,
    after: HeldOut,
) -> list[dict[str, Any]]:
    """Rows of samples.jsonl. ``of``: for each held-out row of pairs its place in ``rows``."""
    pair_of = {of[pair.row]: index for index, pair in enumerate(held.pairs)}
    found = []
    for place, row in enumerate(rows):
        pair = pair_of.get(place)
        moved = (None, None)  # no pair of this row was scored
        if pair is not None and after.scores is not None:
            moved = after.scores.chosen_delta[pair], after.scores.rejected_delta[pair]
        # a sampled pair has its answers in a row of its own
        whole = row if pair is None else task.held_out[held.pairs[pair].row]
        texts = {name: whole.get(name) for name in ("chosen", "rejected")}
        texts["reference"] = row.get("answer", row.get("chosen"))
        texts = {name: text and shown(text) for name, text in texts.items()}
        found.append(
            {
                "prompt": shown(row["prompt"]),
                "reference": texts["reference"],
                "before": before.answers.texts[place],
                "after": after.answers.texts[place],
                "before_ok": before.answers.right[place],
                "after_ok": after.answers.right[place],
                "chosen_delta": moved[0],
                "rejected_delta": moved[1],
                "chosen": texts["chosen"],
                "rejected": texts["rejected"],
            }
        )
    return found


def said(answer: Any) -> str:
    """What the assistant says in an answer, as one text."""
    if isinstance(answer, str):
        return answer
    turns = [turn for turn in answer if turn["role"] == "assistant"]
    return "\n".join(turn.get("content") or "" for turn in turns)
