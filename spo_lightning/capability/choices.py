"""The harness's requests in, log-probabilities of their continuations out: those of one question,
which share its text, are read together in a row that holds it once.

The harness's own model reads every choice with the question anew, and logits at every token.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from spo_lightning.data.batch import Pair, collate
from spo_lightning.models.reading import precise, reading_of
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharing import refused

Request = tuple[Any, list[int], list[int]]  # its texts; ids of the question, of a choice
Score = tuple[float, bool]  # log-probability; whether every token was the likeliest
LOGITS = 2**22  # alive at once: few, so that they are read where they were made


class Choices:
    """What the harness's ``model``, an ``HFLM``, is asked for in tokens.

    It answers itself what has no other choice, what must be cut to fit, whole texts, and all where
    rows cannot be shared: without the package's attention, or in half precision, where sharing
    moves a token by up to 0.1 nats.
    """

    def __init__(self, model: Any):
        self.own: Callable[..., list[Score]] = model._loglikelihood_tokens
        self.lm, self.longest, self.size = model.model, model.max_length, model.batch_size

    def __call__(self, requests: Sequence[Request], **how: Any) -> list[Score]:
        pairs = [Pair((*question,), (*choice,), ()) for _, question, choice in requests]
        # a text that is asked for whole, for its perplexity, comes without its words
        fit = [
            place
            for place, (pair, (texts, *_)) in enumerate(zip(pairs, requests))
            if texts is not None and pair.chosen and len(pair) <= self.longest
        ]
        first: dict[Pair, int] = {}  # a choice that stands twice is read once, and so stays a tie
        questions: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place in fit:
            if first.setdefault(pairs[place], place) == place:
                questions[pairs[place].prompt].append(place)
        shared = [places for places in questions.values() if len(places) > 1]
        found: dict[int, Score] = {}
        if scorer := self._scorer([pairs[place] for places in shared for place in places]):
            for places in self._batches(shared, pairs):
                batch = collate([pairs[place] for place in places], 0).to(self.lm.device)
                logps, best = scorer.greedy(batch)
                sums = logps.new_zeros(len(batch)).index_add(0, batch.pair, logps)
                missed = batch.pair[~best].bincount(minlength=len(batch))
                found |= zip(places, zip(sums.tolist(), (missed == 0).tolist()))
            alike = {place: first[pairs[place]] for place in fit}
            found |= {place: found[one] for place, one in alike.items() if one in found}
        left = [place for place in range(len(requests)) if place not in found]
        if left:
            found |= zip(left, self.own([requests[place] for place in left], **how))
        return [found[place] for place in range(len(requests))]

    def _scorer(self, pairs: Sequence[Pair]) -> Scorer | None:
        """What reads them, None where nothing does or there are none."""
        if not pairs or not precise(self.lm):
            return None
        reading = reading_of(self.lm)
        scorer = Scorer(self.lm, shared=True, logits=LOGITS, reading=reading)
        if not scorer.packs or refused(self.lm, max(map(len, pairs)), reading) is not None:
            return None
        return scorer

    def _batches(
        self, questions: Sequence[list[int]], pairs: Sequence[Pair]
    ) -> Iterator[list[int]]:
        """Places of whole questions, likes with likes in length, of ``size`` choices at least."""
        batch: list[int] = []
        for places in sorted(questions, key=lambda some: -len(pairs[some[0]].prompt)):
            batch += places
            if len(batch) >= self.size:
                yield batch
                batch = []
        if batch:
            yield batch
