"""PairBatch in, PairLogps out: the only code that touches logits.

The prompt of a pair is encoded once. With the package's own attention (``attention.py``) a batch
is one row without padding, see ``data/packing.py``. With transformers' sdpa or eager it is a row
per pair, ``[prompt | chosen | rejected]``, under a 4-D mask that keeps the responses apart. A
model that cannot share a prompt runs its responses apart instead (``Scorer.shared``), and says so.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from spo_lightning.data.batch import CHOSEN, PAD, REJECTED, Pair, PairBatch, collate
from spo_lightning.data.sets import Pairs
from spo_lightning.models import attention
from spo_lightning.models.head import is_plain, plain_logps, read_logps
from spo_lightning.models.logps import PairLogps
from spo_lightning.models.reading import Reading, reading_of, text_config, vocabulary_of
from spo_lightning.records.progress import Stages

FLOATS = 2**18  # in a MiB
# what a loss hears of the rows, as the batch has it
GIVEN = ("margins", "reference_sides", "rows", "sentences", "similarities")
LOGITS = 2**28  # logits that are alive at once; where there are more, they are computed again
ROOM = 1.8  # what a graph that can be differentiated twice may take, in plain forwards


def reference_logps(batch: PairBatch, *, now: bool = False) -> PairLogps:
    """The reference's PairLogps that travel with the batch; ``now``: where it has moved to."""
    if batch.reference is None:
        raise ValueError("the batch carries no reference log-probabilities")
    found = batch.moved if now and batch.moved is not None else batch.reference
    return PairLogps(found, batch.pair, batch.rejected, len(batch))


def tree_mask(segment: Tensor) -> Tensor:
    """[B, 1, T, T] True where a column may be attended: causal, and never across the responses.

    A padding row attends to itself, so that no row of the softmax is empty.
    """
    width = segment.shape[1]
    ones = torch.ones(width, width, dtype=torch.bool, device=segment.device)
    asks, gives = segment[:, :, None], segment[:, None, :]
    apart = (asks == REJECTED) & (gives == CHOSEN)
    seen = ones.tril() & ~apart & (gives != PAD)
    return (seen | torch.eye(width, dtype=torch.bool, device=segment.device))[:, None]


def sides(batch: PairBatch) -> tuple[PairBatch, PairBatch]:
    """The batch as ``[prompt | chosen]`` rows and as ``[prompt | rejected]`` rows."""
    home, flipped = batch.to("cpu"), []
    for ids, (p, c, r) in zip(home.input_ids.tolist(), home.lengths.tolist()):
        flipped.append(Pair(tuple(ids[:p]), tuple(ids[p + c : p + c + r]), ()))
    rejected = collate(flipped, 0)
    scored = torch.zeros_like(home.segment, dtype=torch.bool)
    scored[home.pair, home.column] = True
    rejected = rejected.of(scored[home.segment == REJECTED])
    return batch.chosen_only, rejected.to(batch.input_ids.device)


class Scorer(nn.Module):
    """Scores pairs with a causal language model.

    ``model`` is a transformers causal LM (adapters, if any, injected in place). ``shared`` says
    whether its architecture takes a prompt once for several responses, see ``sharing.py``.
    ``logits``: how many are alive at once. ``reading``: how they follow from a forward; found
    where it is not given. ``compiled``: whether torch compiles the forwards.
    """

    predicts = True  # tokens, whose distribution one may look at

    def __init__(
        self, model: Any, shared: bool, logits: int = LOGITS, reading: Reading | None = None
    ):
        super().__init__()
        self.model, self.shared, self.logits, self.compiled = model, shared, logits, False
        self.squares = False  # whether PairLogps comes with them
        self.beside: Beside | None = None  # the reference, where PairLogps comes with divergences
        # its parameters by name, where processes have parts of them; whether layers keep what they
        # have gathered until backward; where it computes, if not where its parts are (sharded.py)
        self.spread: dict[str, nn.Parameter] | None = None
        self.stays, self.place = False, None
        self.reading = reading or reading_of(model)

    @property
    def device(self) -> Any:
        """Where it computes."""
        return self.place or self.model.device

    def reads_as(self, decide: Callable[[], "Scorer"]) -> None:
        """From now on it reads as the scorer of the same model does that is given; what looks at
        the model for that, looks inside, where spread parameters are gathered as in a forward."""
        found = decide()
        self.shared, self.logits, self.reading = found.shared, found.logits, found.reading

    @property
    def packs(self) -> bool:
        """Whether a batch is one row without padding."""
        return self._attention in attention.PACKED

    def forward(self, batch: PairBatch) -> PairLogps:
        """Log-probabilities of every scored token. Differentiable."""
        if self.packs or self.shared or not bool(batch.rejected.any()):
            return self._read(batch, [batch], Scorer._predictors)
        return self.apart(batch)

    def apart(self, batch: PairBatch) -> PairLogps:
        """The same from two forwards as transformers has them, nothing shared, nothing packed."""
        return self._read(batch, sides(batch), Scorer._in_rows)

    def _read(
        self,
        batch: PairBatch,
        parts: Sequence[PairBatch],
        states: Callable[["Scorer", PairBatch], Tensor],
    ) -> PairLogps:
        beside = self.beside if batch.compared else None
        # first: adapters that hold other values meanwhile would break a graph that is there
        theirs = [beside.states(states, part) for part in parts] if beside else []
        hidden = [states(self, part) for part in parts]

        def whole(read: Callable[..., Tensor], *columns: Sequence[Any]) -> Tensor:
            found = [read(*column) for column in zip(*columns)]
            if len(found) == 1:
                return found[0]
            chosen = found[0].new_zeros(batch.pair.shape).masked_scatter(~batch.rejected, found[0])
            return chosen.masked_scatter(batch.rejected, found[1])

        return PairLogps(
            whole(self._score, parts, hidden),
            *(batch.pair, batch.rejected, len(batch)),
            squares=whole(self._squares, hidden) if self.squares else None,
            divergences=whole(self._divergences, hidden, theirs) if theirs else None,
            **{name: getattr(batch, name) for name in GIVEN},
            rewards=self.reading.reward,
        )

    def twice(self) -> Callable[[], AbstractContextManager] | None:
        """A context whose forwards can be differentiated twice, None where there is none."""
        known = ("eager", "sdpa", attention.IMPLEMENTATION)
        # what torch compiles has a first derivative only, and so has what is spread
        known = () if self.compiled or self.spread is not None else known
        return attention.MathKernel if self._attention in known else None

    def smaller(self, batch: PairBatch) -> list[PairBatch]:
        """The batch in parts of which a forward inside ``twice`` fits where the whole one did."""
        return batch.split(self._fitting(batch))

    def keeps(self, batch: PairBatch) -> bool:
        """Whether a forward inside ``twice`` takes the whole batch, and recomputes nothing."""
        layers = self.model.modules()
        recomputed = any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
        recomputed = recomputed or len(batch.targets) > self._rows()
        return not recomputed and self._fitting(batch) >= len(batch)

    def _fitting(self, batch: PairBatch) -> int:
        """How many rows inside ``twice`` take less than twice what the whole batch takes outside.

        Measured: a token of a graph that can be differentiated twice takes 2.8 times the memory of
        one in a plain forward, and its attention matrices a tenth per key and head dimension.
        """
        config = text_config(self.model)
        heads = getattr(config, "num_attention_heads", 0)
        lengths = (batch if batch.lower is None else batch.lower).lengths[:, :2].sum(1)
        longest = int(lengths.max())
        keys = longest if longest <= attention.PART else (longest + attention.PART) / 2
        each = 2.8 + 0.1 * keys * heads / config.hidden_size
        return max(1, int(len(batch) * ROOM * batch.tokens / (each * int(lengths.sum()))))

    def _score(self, batch: PairBatch, hidden: Tensor) -> Tensor:
        head, targets, by = self.reading.head(self.model), batch.targets, self.reading
        if by.reward:
            return by.read(self.model, hidden)[:, 0]
        if attention.fused() and is_plain(head):
            return read_logps(head, hidden, targets, by.cap, self.logits, by.scale)

        def score(hidden: Tensor, targets: Tensor) -> Tensor:
            return plain_logps(self._logits(hidden), targets)

        return _in_parts(score, self._rows(), hidden, targets)

    def _divergences(self, hidden: Tensor, theirs: Tensor) -> Tensor:
        """[S] KL(reference || policy) of the next token over the whole vocabulary."""
        assert self.beside is not None
        judge = self.beside.scorer

        def diverged(hidden: Tensor, theirs: Tensor) -> Tensor:
            with torch.no_grad():
                given = judge._logits(theirs).log_softmax(-1)
            return (given.exp() * (given - self._logits(hidden).log_softmax(-1))).sum(-1)

        # four numbers of a logit's size are there at once
        return _in_parts(diverged, max(1, self._rows() // 4), hidden, theirs)

    def _logits(self, hidden: Tensor) -> Tensor:
        return self.reading.read(self.model, hidden)

    def _rows(self) -> int:
        """Scored tokens whose logits are alive at once."""
        return max(1, self.logits // vocabulary_of(self.model))

    @torch.no_grad()
    def _squares(self, hidden: Tensor) -> Tensor:
        """[S] log of the sum of the squared probabilities of the next token."""
        chunks = map(self._logits, hidden.split(self._rows()))
        return torch.cat([(2 * it).logsumexp(-1) - 2 * it.logsumexp(-1) for it in chunks])

    @torch.no_grad()
    def top(self, batch: PairBatch, k: int) -> tuple[Tensor, Tensor]:
        """[S] entropy (bits) and mass of the k likeliest next tokens, not renormalised.

        H_k = -sum p log2 p and M_k = sum p over the k largest p. Shi et al. 2410.11677, section 5.
        """
        parts = []
        for chunk in self._predictors(batch).split(self._rows()):
            p = self._logits(chunk).softmax(-1)
            p = p.topk(min(k, p.shape[-1]), dim=-1).values
            parts.append(torch.stack([-torch.xlogy(p, p).sum(-1) / math.log(2), p.sum(-1)]))
        entropy, mass = torch.cat(parts, dim=1)
        return entropy, mass

    @torch.no_grad()
    def greedy(self, batch: PairBatch) -> tuple[Tensor, Tensor]:
        """[S] log-probability of every scored token, and whether it is the likeliest there is."""
        parts = []
        columns = (self._predictors(batch), batch.targets)
        for states, targets in zip(*(column.split(self._rows()) for column in columns)):
            logits = self._logits(states)
            parts.append((plain_logps(logits, targets), logits.argmax(-1) == targets))
        logps, best = map(torch.cat, zip(*parts))
        return logps, best

    @torch.no_grad()
    def hidden_sums(self, batch: PairBatch) -> Tensor:
        """[B, 2, width] in float64: per side, the last hidden states that predict its tokens."""
        if self.packs or self.shared or not bool(batch.rejected.any()):
            parts = [(batch, 2 * batch.pair + batch.rejected.long())]
        else:
            parts = [(part, 2 * part.pair + side) for side, part in enumerate(sides(batch))]
        states = torch.cat([self._predictors(part, hidden=True) for part, _ in parts]).double()
        sums = states.new_zeros(2 * len(batch), states.shape[1])
        slots = torch.cat([slot for _, slot in parts])
        return sums.index_add(0, slots, states).view(len(batch), 2, -1)

    @property
    def _attention(self) -> str:
        return text_config(self.model)._attn_implementation

    def _run(self, hidden: bool, **words: Any) -> Tensor:
        """[B, T, width] hidden states; logits where they come whole, unless ``hidden`` asks."""
        body = self.reading.module(self.model)
        run = self._compiled if self.compiled else body
        words = self.reading.given(body, words | {"use_cache": False})
        if hidden and self.reading.logits:
            return run(**words, output_hidden_states=True).hidden_states[-1]
        return self.reading.taken(run(**words))

    @cached_property
    def _compiled(self) -> Callable[..., Any]:
        return torch.compile(self.reading.module(self.model).forward, dynamic=True)

    def __getstate__(self) -> dict[str, Any]:
        """A copy, in this process or another, compiles its own."""
        return {name: value for name, value in self.__dict__.items() if name != "_compiled"}

    def _predictors(self, batch: PairBatch, hidden: bool = False) -> Tensor:
        """[S, width] last hidden states, or logits, that predict the scored tokens."""
        if not self.packs:
            return self._in_rows(batch, hidden)
        packed = batch.packed if self.shared else batch.packed_apart
        states = self._run(
            hidden,
            input_ids=packed.input_ids,
            attention_mask=attention.NO_MASK.to(packed.input_ids.device),
            position_ids=packed.position_ids,
            tree=packed.tree,
        )
        return states[0].index_select(0, packed.predictor)

    def _in_rows(self, batch: PairBatch, hidden: bool = False) -> Tensor:
        """The same, from one padded row per pair."""
        # padding comes last, so nobody sees it; named, a window may leave it no keys, and nan
        mask = torch.ones_like(batch.segment)
        if self.shared and bool(batch.rejected.any()):
            mask = tree_mask(batch.segment)
            if self._attention != "sdpa":
                # eager adds the mask to the scores; a boolean one would be silently wrong there
                dtype = self.model.dtype
                blocked = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
                mask = blocked.masked_fill(~mask, torch.finfo(dtype).min)
        rows = {"input_ids": batch.input_ids, "position_ids": batch.position_ids}
        states = self._run(hidden, attention_mask=mask, **rows)
        return states[batch.pair, batch.predictor]


class Beside(NamedTuple):
    """A scorer that is the reference in a context, and is read while the policy trains."""

    scorer: Scorer
    start: Callable[[], AbstractContextManager]

    @torch.no_grad()
    def states(self, read: Callable[[Scorer, PairBatch], Tensor], batch: PairBatch) -> Tensor:
        with self.start():
            return read(self.scorer, batch)


def _in_parts(read: Callable[..., Tensor], rows: int, *columns: Tensor) -> Tensor:
    """What ``read`` makes of the columns, of so many rows at once; the rest is computed again."""
    if len(columns[0]) <= rows:
        return read(*columns)
    parts = zip(*(column.split(rows) for column in columns))
    return torch.cat([checkpoint(read, *part, use_reentrant=False) for part in parts])


@torch.no_grad()
def score(
    scorer: Scorer,
    pairs: Pairs,
    *,
    batches: Sequence[list[int]],
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
    title: str,
) -> Pairs:
    """The pairs with ``scorer``'s log-probabilities as their reference, whoever scored them.

    ``batches``: places of rows that are read together; every pair stands in one.
    """
    scored: dict[int, Tensor] = {}
    bare = replace(pairs, references=None)
    with stages.stage(title, len(pairs)) as advance:
        for indices, mine, together in stages.world.deal(batches):
            batch = bare.batch(indices)
            with precision():
                logps = scorer(batch.to(scorer.device)).logps.cpu()
            sizes = batch.scored.sum(1).tolist()
            for index, row in zip(indices, logps.split(sizes)) if mine else ():
                scored[index] = row.clone()
            advance(sum(map(len, together)))
    whole = {index: row for some in stages.world.gather(scored) for index, row in some.items()}
    return replace(pairs, references=[whole[index] for index in range(len(pairs))])
