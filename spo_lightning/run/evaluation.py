"""The stages of an evaluation, top to bottom: a checkpoint's held-out numbers."""

import logging
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built
from spo_lightning.errors import UserError
from spo_lightning.records.progress import Stages, Stop, quiet
from spo_lightning.run.job import refuse_spreading
from spo_lightning.run.judging import (
    Unopened,
    against,
    check_judge,
    check_rival,
    chosen,
    engine_of,
)
from spo_lightning.run.record import Begun, Opened, Read, Stage, grown, walk
from spo_lightning.world import World

if TYPE_CHECKING:
    from spo_lightning.capability.look import Looked
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.held_out import HeldOut
    from spo_lightning.evaluation.wins import Against
    from spo_lightning.models.policy import Policy
    from spo_lightning.models.scorer import Scorer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Compared(Opened):
    """The model that it is compared with, the answers, and what it can do."""

    reference: "Policy | None"  # None: what needs one is left out
    against: "Against | None"  # None: nothing is judged
    theirs: "Looked | None"


@dataclass(frozen=True)
class Tokenised(Compared):
    """The held-out pairs, and how batches of them are read."""

    scorer: "Scorer"
    held: "Pairs"
    rows: list[dict]  # of text, that the pairs were made of
    of: list[int]  # for each of them the held-out row that it belongs to


@dataclass(frozen=True)
class Measured(Tokenised):
    """What eval.json holds, and what it was made of."""

    found: "HeldOut"
    numbers: dict[str, Any]


def evaluate(cfg: Any, world: World) -> dict[str, Any]:
    """The held-out numbers of ``checkpoint``, against ``reference`` where there is one."""
    from spo_lightning.models.sources import check

    for where in (cfg.checkpoint, cfg.reference, cfg.base):
        if where is not None:
            check(where)
    chosen(cfg)
    engine_of(cfg)
    if cfg.hardware.get("sharding") is not None:
        refuse_spreading(world)
    stages = Stages(lambda *_: None, Stop(), "Run the command again.", world)
    stages.stop.install()
    quiet()
    return walk(STAGES, Begun(cfg, world, stages, {})).numbers


def data(at: Begun) -> Read:
    """The held-out rows."""
    from spo_lightning.capability import look
    from spo_lightning.capability.prompted import prompted
    from spo_lightning.data.load import load_to_look
    from spo_lightning.evaluation.groups import check

    task = load_to_look(at.cfg.data)
    if task.unpaired and not at.cfg.data.unpaired:
        told = "rows have a label each, and pairs are made of them; data.unpaired=true measures"
        log.info("%s: %s every answer by itself, as loss=kto does", at.cfg.data.path, told)
    check(task.held_out, at.cfg.eval.by)
    look.check(at.cfg)
    task = replace(task, held_out=task.held_out[: at.cfg.eval.max_rows])
    if not task.held_out:
        raise UserError("no held-out rows: raise data.eval_fraction or set data.eval_path")
    judged = check_judge(at.cfg, task, Unopened())
    check_rival(at.cfg, task.held_out, judged, start=at.cfg.reference is not None)
    return grown(Read, at, task=replace(task, held_out=prompted(at.cfg, task.held_out)))


def policy(at: Read) -> Opened:
    """The checkpoint."""
    from spo_lightning.capability import look
    from spo_lightning.models.device import precision_of
    from spo_lightning.models.policy import opened

    precision = precision_of(at.cfg.hardware, at.world.device)
    spread = at.cfg.hardware.get("sharding") is not None
    found = opened(at.cfg.checkpoint, at.cfg, at.world.device, rewards=True, unread=spread)
    if found.rewards or found.template is not None:
        _refuse_likelihoods(at, "a reward model" if found.rewards else "a ranker")
    else:
        look.check_policy(at.cfg, found)
    if at.cfg.base is not None and at.cfg.reference is None and not found.adapted:
        raise UserError(f"base has no effect: {at.cfg.checkpoint} holds no adapters; leave it out")
    return grown(Opened, at, policy=found, precision=precision)


def _refuse_likelihoods(at: Read, kind: str) -> None:
    """What has none that compare with another's, and answers nothing."""
    from spo_lightning.capability.look import refuse_without_texts

    name = at.cfg.checkpoint
    refuse_without_texts(at.cfg, f"{name} is {kind}")
    if engine_of(at.cfg) is not None:
        raise UserError(f"engine has no effect: {name} is {kind}, which answers nothing")
    if at.cfg.reference is not None:
        raise UserError(f"reference has no effect: {name} is {kind}; leave it out")
    if at.task.samples:
        raise UserError(
            f"{name} is {kind}, and this data samples its pairs from a policy: name "
            "pairs, data=pairs data.path=FILE"
        )


def reference(at: Opened) -> Compared:
    """The reference, if one is named, what it can do, and the answers that wins are against."""
    from spo_lightning.capability.look import look
    from spo_lightning.models.policy import check_same_tokens, opened
    from spo_lightning.models.quantized import bits_of

    theirs = looked = None
    if at.cfg.reference is not None:
        # adapters on a quantised base are compared with a model in as many bits, as in their run
        bits = bits_of(at.policy.lm)
        theirs = opened(at.cfg.reference, at.cfg, at.world.device, bits=bits)
        check_same_tokens(at.policy.tokenizer, theirs.tokenizer, at.cfg.reference)
        looked = look(at.cfg, theirs, at.stages, start=True)
    rivals = None
    if not (at.policy.rewards or at.policy.template is not None):
        rivals = against(at, at.cfg, theirs, at.task.held_out)
    return grown(Compared, at, reference=theirs, against=rivals, theirs=looked)


def pairs(at: Compared) -> Tokenised:
    """The held-out pairs; where the data samples them, from the reference, or none without one."""
    from spo_lightning.cache.tokens import encoded
    from spo_lightning.data.ranking import questions, to_letters
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.groups import groups_of_pairs
    from spo_lightning.models.rewards import to_reward
    from spo_lightning.models.scorer import FLOATS
    from spo_lightning.models.sharing import longest_of, scorer_of
    from spo_lightning.sampling.pairing import sampled

    cfg, rows, tokenizer = at.cfg, at.task.held_out, at.policy.tokenizer
    of = list(range(len(rows)))
    if at.task.samples:
        theirs = at.reference
        none = [], [], 0
        rows, of, _ = none if theirs is None else sampled(cfg, at.task, rows, theirs, at.stages)
    template = at.policy.template
    if template is not None:
        rows = questions(rows, template, tokenizer)
    found = encoded(cfg, tokenizer, rows, "held-out").pairs if rows else []
    logits = cfg.hardware.logits_mib * FLOATS
    held = Pairs(found, None, tokenizer.pad_token_id, groups_of_pairs(found, rows, cfg.eval.by))
    if at.policy.rewards:
        held = to_reward(held, at.policy.lm)
    if template is not None:
        held = to_letters(held)
    policy = at.policy
    decide = partial(scorer_of, longest=longest_of(held.pairs), share=True, logits=logits)
    if cfg.hardware.get("sharding") is None:
        scorer = decide(policy)
    else:
        how = {"trains": False, "unpaired": bool(at.task.unpaired)}
        policy, scorer = built(cfg.hardware.sharding)(policy, decide, at.world, **how)
    return grown(Tokenised, at, policy=policy, scorer=scorer, held=held, rows=rows, of=of)


def scored(at: Tokenised) -> Tokenised:
    """The pairs under the reference."""
    from spo_lightning.models.scorer import score
    from spo_lightning.models.sharing import as_read_by

    if at.reference is None:
        return at
    theirs = as_read_by(at.scorer, at.reference.lm)
    batches = at.held.batches(at.cfg.eval.batch_size)
    how = {"precision": at.precision, "stages": at.stages, "title": "reference"}
    return grown(Tokenised, at, held=score(theirs, at.held, batches=batches, **how))


def measured(at: Tokenised) -> Measured:
    """All held-out numbers, what it can do, and how far that is from the reference."""
    from spo_lightning.capability.look import beyond, look, refusals_of
    from spo_lightning.capability.paired import changes
    from spo_lightning.evaluation.held_out import held_out
    from spo_lightning.models.generate import Decoding

    ranks = at.policy.rewards or at.policy.template is not None
    rows = [] if ranks else at.task.held_out
    beta: Any = 1.0 if at.policy.rewards else at.cfg.loss.beta  # rewards as the head gives them
    engine = engine_of(at.cfg)
    how = {"how": replace(Decoding.of(at.cfg, seed=at.cfg.seed), engine=engine), "beta": beta}
    how |= {
        "by": at.cfg.eval.by,
        "against": at.against,
        "refusals": refusals_of(at.cfg),
        "precision": at.precision,
        "stages": at.stages,
    }
    found = held_out(at.policy, at.scorer, at.task, rows, at.held, **how)
    found = beyond(found, look(at.cfg, at.policy, at.stages, engine), at.cfg)
    numbers: dict[str, Any] = {**found.told}
    if at.theirs is not None and at.theirs.numbers:
        paired = changes(at.theirs.items, found.items)
        numbers |= {"reference": at.theirs.numbers, "paired": paired}
    return grown(Measured, at, found=found, numbers=numbers)


def told(at: Measured) -> Measured:
    """Every pair's numbers, beside the output."""
    from spo_lightning.evaluation.each_pair import each_pair, lines, place_of
    from spo_lightning.records.directory import write_text

    cfg = at.cfg
    rows = each_pair(at.rows, at.of, at.held, at.found, cfg.eval.pairs)
    if rows and cfg.eval.pairs != "off" and at.world.first:
        place = place_of(Path(cfg.output))
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, "".join(lines(rows)))
        log.info("Every pair's numbers: %s", place)
    return at


STAGES = [
    Stage("data", data, "a pass over the rows", "begins again"),
    Stage("policy", policy, "a model's load", "begins again"),
    Stage("reference: samples", reference, "loads and answers of models", "begins again"),
    Stage("pairs", pairs, "a pass over the rows", "begins again"),
    Stage("reference", scored, "a forward of every pair", "begins again"),
    Stage("held-out", measured, "forwards and answers", "begins again"),
    Stage("each pair", told, "nothing", "begins again"),
]
