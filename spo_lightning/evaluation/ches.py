"""Pairs and a policy in, how alike the hidden states of their two answers are out: CHES scores."""

import logging
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from omegaconf import DictConfig
from torch import Tensor

from spo_lightning.data.sets import Pairs
from spo_lightning.models.policy import Policy
from spo_lightning.models.scorer import Scorer
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)


def ches(sums: Tensor, lengths: Tensor) -> Tensor:
    """[B, 2] CHES and its length-normalised form. Razin et al. 2410.08847, definition 2.

    ``sums`` [B, 2, width]: E+ and E-, the last hidden states that predict the tokens of the
    chosen and of the rejected answer, summed; ``lengths`` [B, 2]: those tokens.

    CHES = <E+, E-> - |E+|^2; normalised <E+, E-> / (n_w n_l) - |E+|^2 / n_w^2. The higher, the
    more the chosen answer is expected to be displaced.
    """
    means = sums / lengths[:, :, None]
    return torch.stack([_score(sums), _score(means)], dim=1)


def _score(states: Tensor) -> Tensor:
    chosen, rejected = states.unbind(1)
    return (chosen * rejected).sum(-1) - chosen.square().sum(-1)


@torch.no_grad()
def scores(
    scorer: Scorer,
    pairs: Pairs,
    *,
    batch_size: int,
    precision: Callable[[], AbstractContextManager],
    advance: Callable[[int], None] = lambda count: None,
) -> Tensor:
    """[N, 2] in float64, in the order of the pairs; ``advance`` hears how many are done."""
    bare = replace(pairs, references=None)
    found = torch.empty(len(pairs), 2, dtype=torch.float64)
    for indices in bare.batches(batch_size):
        batch = bare.batch(indices).to(scorer.device)
        with precision():
            sums = scorer.hidden_sums(batch)
        found[indices] = ches(sums, batch.scored).cpu()
        advance(len(indices))
    return found


def without_high_ches(
    cfg: DictConfig,
    policy: Policy,
    scorer: Scorer,
    pairs: Pairs,
    precision: Callable[[], AbstractContextManager],
    stages: Stages,
) -> Pairs:
    """The pairs less ``data.drop_high_ches`` of them, of highest normalised CHES at the start.

    Razin et al. 2410.08847 keep only the lowest 5%; here the highest share goes, and the rest
    stays.
    """
    share = cfg.data.drop_high_ches
    if not share:
        return pairs
    size = cfg.eval.batch_size
    with policy.start(), stages.stage("CHES", len(pairs)) as advance:
        found = scores(scorer, pairs, batch_size=size, precision=precision, advance=advance)
    # every process keeps the same pairs, however it rounds
    kept = stages.world.once(lambda: without_highest(pairs, found[:, 1], share))
    log.info(
        "Pairs (train): %d of %d dropped, those of highest normalised CHES (the paper's filter "
        "keeps the lowest 5%%)",
        len(pairs) - len(kept),
        len(pairs),
    )
    return kept


def without_highest(pairs: Pairs, normalised: Tensor, share: float) -> Pairs:
    """The pairs less the ``share`` of them, rounded down, with the highest scores [N]."""
    count = int(share * len(pairs))
    # stable: of equal scores the later pair goes first
    worst = set(normalised.argsort(stable=True)[len(pairs) - count :].tolist())
    kept = [index for index in range(len(pairs)) if index not in worst]
    scored = pairs.references
    return replace(
        pairs,
        pairs=[pairs.pairs[index] for index in kept],
        references=None if scored is None else [scored[index] for index in kept],
    )
