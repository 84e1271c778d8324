"""The stages of a training run, top to bottom: each takes what the one before left and adds to it.

Every process takes every stage; the first writes. How a stage does it stands in the room that it
imports from once it begins, so that bad rows end a run before anything heavy is loaded.
"""

import logging
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from spo_lightning.config.build import built
from spo_lightning.config.knobs import warm_start_steps
from spo_lightning.errors import UserError
from spo_lightning.run import record as known
from spo_lightning.run.job import Job, loss_of
from spo_lightning.run.judging import against
from spo_lightning.run.record import grown

if TYPE_CHECKING:
    from spo_lightning.models.generate import Engine

log = logging.getLogger(__name__)


def data(at: known.Begun) -> known.Read:
    """Rows of text, checked and split."""
    from spo_lightning.capability import look
    from spo_lightning.data.layouts.known import folders, look_in
    from spo_lightning.data.load import load
    from spo_lightning.evaluation.groups import check

    look_in(at.world.once(folders))  # --config-dir stands on the first process's command line
    task = load(at.cfg.data)
    for note in task.notes:
        log.info("%s", note)
    check(task.held_out, at.cfg.eval.get("by"))
    look.check(at.cfg)
    return grown(known.Read, at, task=task)


def policy(at: known.Read) -> known.Opened:
    """The model as it is built or loaded, on this process's device."""
    from spo_lightning.capability import look
    from spo_lightning.models.device import precision_of
    from spo_lightning.models.policy import of_config

    precision = precision_of(at.cfg.hardware, at.world.device)
    # what answers or learns before it is spread, does so whole; dora's adapters measure weights
    whole = at.task.samples or warm_start_steps(at.cfg) or at.cfg.model.lora.dora
    spread = at.cfg.hardware.get("sharding") is not None
    opened = of_config(at.cfg, at.world.device, unread=spread and not whole)
    if opened.rewards and (at.task.samples or warm_start_steps(at.cfg)):
        raise UserError(
            f"{at.cfg.model.pretrained} is a reward model, which neither answers the prompts of "
            "this data nor has a warm start: name a causal language model, or data=pairs"
        )
    how = at.cfg.get("optimizer", {}).get("bf16", "stochastic")
    # only now is it known that the checkpoint has adapters
    if opened.adapted and not at.cfg.model.lora.fresh and how != "stochastic":
        told = "the checkpoint's adapters train, which are in float32"
        raise UserError(f"optimizer.bf16={how} has no effect: {told}; leave it out")
    look.check_policy(at.cfg, opened)
    return grown(known.Opened, at, policy=opened, precision=precision)


def warm_start(at: known.Opened) -> known.Opened:
    """A model that was built here learns the task's texts."""
    from spo_lightning.training.sft import begin

    begin(at.cfg, at.task, at.policy, at.stages)
    return at


def pairs(at: known.Opened) -> known.Paired:
    """Pairs as the data gives them, or made of the policy's own answers."""
    from spo_lightning.sampling.pairing import with_pairs

    task, places = with_pairs(at.cfg, at.task, at.policy, at.stages)
    return grown(known.Paired, at, task=task, places=places)


def tokens(at: known.Paired) -> known.Tokenised:
    """Token ids of both sides, adapters, and how batches of such rows are read."""
    from spo_lightning.cache.tokens import of_both_sides
    from spo_lightning.data.ranking import of_questions, to_letters
    from spo_lightning.data.sets import Pairs
    from spo_lightning.evaluation.groups import groups_of_pairs
    from spo_lightning.models.policy import adapt, to_rewards
    from spo_lightning.models.rewards import to_reward
    from spo_lightning.models.sentences import Sentences
    from spo_lightning.models.sharing import scorer_of_run

    template, task, places = at.cfg.loss.get("template"), at.task, at.places
    at.policy.is_asked(template)
    if template is not None:
        task = of_questions(task, template, at.policy.tokenizer)
    sides = of_both_sides(at.cfg, task, at.policy.tokenizer)
    rewards = at.cfg.loss.get("rewards", False)
    policy = to_rewards(at.policy, at.cfg.seed) if rewards else at.policy
    policy = adapt(policy, **at.cfg.model.lora, seed=at.cfg.seed)
    pad = policy.tokenizer.pad_token_id
    sets = {name: Pairs(side.pairs, None, pad) for name, side in sides.items()}
    if "similarity" in at.cfg.loss:
        split = Sentences.of(at.cfg.loss, at.world.device)
        sets = {name: split(some, policy.tokenizer) for name, some in sets.items()}
    if rewards:
        sets = {name: to_reward(pairs, policy.lm) for name, pairs in sets.items()}
    if template is not None:
        sets = {name: to_letters(pairs) for name, pairs in sets.items()}
    if rewards or template is not None:  # what ranks answers nothing
        places = replace(places, rows=[])
    rows = [pair for pairs in sets.values() for pair in pairs.pairs]
    decide = partial(scorer_of_run, cfg=at.cfg, pairs=rows, streamed=task.chunks is not None)
    if at.cfg.hardware.get("sharding") is None:
        scorer = decide(policy)
    else:
        how = {"trains": at.cfg.max_steps != 0, "unpaired": at.cfg.loss.get("unpaired", False)}
        policy, scorer = built(at.cfg.hardware.sharding)(policy, decide, at.world, **how)
    of = groups_of_pairs(sets["held-out"].pairs, task.held_out, at.cfg.eval.get("by"))
    sets["held-out"] = replace(sets["held-out"], groups=of)
    counts = sides["train"].counts
    more = {"policy": policy, "places": places, "scorer": scorer, "sets": sets, "task": task}
    return grown(known.Tokenised, at, **more, counts=counts)


def reference(at: known.Tokenised) -> known.Referenced:
    """Every pair under the policy's start, or ``model.reference``; a reward model has none."""
    from spo_lightning.cache.reference import Referee
    from spo_lightning.cache.tokens import lower_texts
    from spo_lightning.evaluation.ches import without_high_ches
    from spo_lightning.losses import asks
    from spo_lightning.training.feed import Mismatched, drawn, mismatches, streamed

    cfg, task, policy, scorer, sets = at.cfg, at.task, at.policy, at.scorer, dict(at.sets)
    if policy.rewards:
        scorer.compiled = cfg.hardware.compile
        found = {"train": sets["train"], "held": sets["held-out"], "lower": None, "feed": None}
        return grown(known.Referenced, at, **found, mismatched=Mismatched(None, None))
    sets["train"] = without_high_ches(cfg, policy, scorer, sets["train"], at.precision, at.stages)
    if task.lower:
        sets["lower level"] = lower_texts(cfg, task, policy.tokenizer)
    referee, feed = Referee(cfg, policy, scorer, at.precision, at.stages), None
    if asks(loss_of(cfg), "kl"):
        sets |= mismatches(cfg, sets, referee.block)
    orders, count = drawn(cfg, sets) if task.chunks is None else ({}, 0)
    sets = referee.over(sets, orders, count)
    if task.chunks is not None:
        stays = referee.stays()
        feed = streamed(cfg, task, policy.tokenizer, sets["train"], at.counts, stays, at.world)
    if asks(loss_of(cfg), "divergences"):
        scorer.beside = referee.beside()
    scorer.compiled = cfg.hardware.compile  # the probe and the reference have run without
    train, held, lower = sets["train"], sets["held-out"], sets.get("lower level")
    others = Mismatched(sets.get("mismatched"), sets.get("held-out, mismatched"))
    found = {"train": train, "held": held, "lower": lower, "feed": feed, "mismatched": others}
    return grown(known.Referenced, at, **found)


def init(job: Job, at: known.Referenced) -> known.Measured:
    """Held-out numbers before training, and the answers that later ones are held against."""
    from spo_lightning.cache.answers import StartAnswers
    from spo_lightning.cache.shards import cache_of
    from spo_lightning.capability.look import beyond, look

    if job.goes_on is not None:
        job.goes_on.refuse_another(at.scorer)
    home, engine = cache_of(at.cfg), None
    if home is not None and at.policy.spread is None:  # parts of weights have no name here
        engine = StartAnswers(at.policy, home)
    rivals = None
    if at.places.rows:
        rivals = against(at, at.cfg.model, at.policy, at.places.rows, engine)
    found = _held_out(at, rivals, engine)
    before = beyond(found, look(at.cfg, at.policy, at.stages, engine, start=True), at.cfg)
    job.begin(before, at.seconds)
    return grown(known.Measured, at, before=before, against=rivals)


def training(job: Job, at: known.Measured) -> known.Trained:
    """Preference training under Lightning, from where the run goes on."""
    from spo_lightning.evaluation.held_out import judged
    from spo_lightning.losses import balanced
    from spo_lightning.models.generate import Decoding
    from spo_lightning.records.progress import Within
    from spo_lightning.training.fit import Material, fit
    from spo_lightning.training.reference import MovingReference

    def quality() -> dict[str, float]:
        unpaired = replace(at.held, pairs=[], references=None)
        alone = grown(known.Measured, at, held=unpaired, stages=Within(at.stages))
        return _held_out(alone, at.against).numbers

    def wins() -> dict[str, float]:
        rows = at.places.rows[: at.cfg.eval.judge.rows]
        how = Decoding.of(at.cfg, seed=at.cfg.seed)
        assert at.against is not None
        some = at.against._replace(texts=at.against.texts[: len(rows)])
        found = judged(at.policy, rows, at.task, how, some, Within(at.stages))
        return found.numbers(range(len(rows)))

    data = (at.train, at.held, at.lower, at.feed, at.mismatched)
    moving = MovingReference.of(at.cfg.model)
    given, loss = Material(at.scorer, *data, moving, at.precision, quality, wins), job.loss
    if at.cfg.loss.get("unpaired"):
        loss, told = balanced(loss, [bool(pair.chosen) for pair in at.train.pairs])
        log.info("%s", told)
    steps = job.steps(at.train)
    looks = at.cfg.eval.get("judge", {}).get("every_n_steps")
    if looks and at.against is not None:
        rows = min(at.cfg.eval.judge.rows, len(at.places.rows))
        log.info("In training: %s", at.against.told(rows, steps // looks))
    if steps:
        steps = fit(at.cfg, given, loss, job.solver, steps, job.goes_on, job.run, at.stages)
    return grown(known.Trained, at, steps=steps)


def final(at: known.Trained) -> known.Ended:
    """The held-out numbers of the same rows, after training."""
    from spo_lightning.capability.look import beyond, look

    found = _held_out(at, at.against)
    after = beyond(found, look(at.cfg, at.policy, at.stages), at.cfg)
    return grown(known.Ended, at, after=after)


def save(job: Job, at: known.Ended) -> known.Ended:
    """The policy as a Hugging Face directory."""
    from spo_lightning.records.disk import writing_folder
    from spo_lightning.records.summary import model_card

    card, merge = model_card(job.choices, at.cfg), at.cfg.model.lora.merge
    with writing_folder(job.run.model):
        how = {"merge": merge, "file_gb": at.cfg.model.get("file_gb")}  # no key in older runs
        at.policy.save(job.run.model, **how, card=card, world=at.world)
    return at


def report(job: Job, at: known.Ended) -> known.Ended:
    """What the run leaves to be read: numbers, answers before and after, a table."""
    from spo_lightning.capability.paired import changes
    from spo_lightning.evaluation.each_pair import each_pair
    from spo_lightning.evaluation.held_out import side_by_side

    job.numbers["paired"] = changes(at.before.items, at.after.items)
    rows, of = at.places.rows, at.places.of
    rows = side_by_side(at.task, rows, of, at.held, at.before, at.after) if rows else []
    how, pairs = at.cfg.eval.get("pairs", "texts"), []
    if how != "off":
        pairs = each_pair(at.task.held_out, of, at.held, at.after, how)
    job.end(at.after, at.steps, rows, pairs)
    return at


def _held_out(
    at: known.Referenced, rivals: "known.Against | None", engine: "Engine | None" = None
) -> "known.HeldOut":
    from spo_lightning.capability.look import refusals_of
    from spo_lightning.evaluation.held_out import held_out
    from spo_lightning.models.generate import Decoding

    drawn = replace(Decoding.of(at.cfg, seed=at.cfg.seed), engine=engine)
    how = {"how": drawn, "beta": at.cfg.loss.beta}
    how |= {"against": rivals, "precision": at.precision, "stages": at.stages}
    how |= {"by": at.cfg.eval.get("by"), "refusals": refusals_of(at.cfg)}
    return held_out(at.policy, at.scorer, at.task, at.places.rows, at.held, **how)
