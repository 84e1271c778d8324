"""Held-out pairs and what each adds to the numbers in, a row per pair out: ``pairs.jsonl``."""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.evaluation.held_out import HeldOut, shown
from spo_lightning.evaluation.wins import Judged

if TYPE_CHECKING:
    from spo_lightning.data.batch import Pair
    from spo_lightning.data.sets import Pairs

log = logging.getLogger(__name__)

TEXTS = ("prompt", "chosen", "rejected")
NUMBERS = ("logps", "reference", "rewards")  # of the chosen and of the rejected answer


def each_pair(
    rows: Sequence[Mapping[str, Any]], of: Sequence[int], held: "Pairs", found: HeldOut, how: str
) -> list[dict[str, Any]]:
    """``rows``: what the pairs were made of, counted from 1. ``of``: for each of them the place of
    its prompt among those that were answered. ``how``: ``texts``, or ``ids`` for hashes of them.
    """
    if found.scores is None:
        return []
    references = held.references or [None] * len(held)
    told = []
    for pair, scored, added in zip(held.pairs, references, found.scores.parts):
        row = rows[pair.row]
        texts = {name: shown(row[name]) for name in TEXTS if name in row}
        numbers = {name: total for name, (total, count) in added.items() if count}
        numbers |= {} if scored is None or found.rewards else _sums(pair, scored)
        told.append(
            {
                # a ranker is asked about a row twice, once in each order
                "row": (pair.row // 2 if held.orders else pair.row) + 1,
                **(texts if how == "texts" else {name: hashed(t) for name, t in texts.items()}),
                **_lengths(pair, found.rewards),
                **{n: numbers.get(n) for name in NUMBERS for n in _sides(name)},
                "rewards/margins": numbers.get("rewards/margins"),
                **({} if found.judged is None else _verdict(found.judged, of[pair.row], how)),
            }
        )
    return told


def _verdict(judged: Judged, place: int, how: str) -> dict[str, Any]:
    """Of the answers to the pair's prompt: 1 where the policy's is better than its rival."""
    texts = {"answer": judged.answers[place], "rival": judged.rivals[place]}
    if how != "texts":
        texts = {name: hashed(text) for name, text in texts.items()}
    return {**texts, "verdict": judged.verdicts.wins[place]}


def _sides(name: str) -> tuple[str, str]:
    return f"{name}/chosen", f"{name}/rejected"


def _sums(pair: "Pair", scored: Any) -> dict[str, float]:
    """The reference's log-probabilities of the answers that the pair has."""
    good = sum(map(len, pair.scored[0]))
    sums = zip(_sides("reference"), (scored[:good], scored[good:]))
    return {name: some.double().sum().item() for name, some in sums if len(some)}


def _lengths(pair: "Pair", rewards: bool) -> dict[str, int]:
    """Tokens; a reward is read at one more, just past the answer's last."""
    answers = (len(ids) - bool(rewards and ids) for ids in (pair.chosen, pair.rejected))
    return {f"tokens/{name}": n for name, n in zip(TEXTS, (len(pair.prompt), *answers))}


def hashed(text: str) -> str:
    """What stands for a text that is not to be shown."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def lines(told: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    return (json.dumps(row, ensure_ascii=False) + "\n" for row in told)


def place_of(output: Path) -> Path:
    """``pairs.jsonl`` beside ``eval.json``; named after the output where that has another name, or
    where a file of the user's, or a run's, has this one."""
    place = output.with_name("pairs.jsonl")
    of_a_run = any(output.with_name(name).exists() for name in ("status.json", "metrics.json"))
    if output.name == "eval.json" and not of_a_run and free_for_pairs(place):
        return place
    return output.with_suffix(".pairs.jsonl")


def make_room(place: Path) -> bool:
    """An evaluation's rows give the name up and are kept beside it; False where the file is no
    evaluation's."""
    if not free_for_pairs(place):
        return False
    kept = place.rename(place.with_name("eval.pairs.jsonl"))
    log.info("%s held an evaluation's rows: they are in %s now", place, kept)
    return True


def free_for_pairs(place: Path) -> bool:
    """Whether there is nothing, or rows that this module wrote."""
    if not place.exists():
        return True
    try:
        with place.open(encoding="utf-8") as file:
            first = file.readline()
        return not first or {"row", "tokens/prompt"} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError):
        return False
