"""The stages of a run whose policy draws images, top to bottom: what ``stages.py`` is of texts.

The training itself, the files of a run and how it goes on after a kill are the same code.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from spo_lightning.config.build import built
from spo_lightning.errors import UserError
from spo_lightning.run.job import Job, loss_of
from spo_lightning.run.record import Begun, Stage, grown

if TYPE_CHECKING:
    from spo_lightning.data.pictures import PictureRow, Pictures
    from spo_lightning.diffusion.batch import ImagePairs
    from spo_lightning.diffusion.frechet import Distance
    from spo_lightning.diffusion.looks import Drawn, Judge
    from spo_lightning.diffusion.pipeline import Pipeline
    from spo_lightning.diffusion.reference import Beside
    from spo_lightning.evaluation.held_out import PairScores

log = logging.getLogger(__name__)

GRID = 16  # prompts that are drawn for the eye alone, where nothing judges them
PAIRS, HELD, LOOK = 1, 2, 3  # what keeps the seeds of three drawings apart
# what a loss may ask for, and why an image has none
LACKING = {
    "squares": "the probabilities of other tokens",
    "divergences": "a distribution over tokens",
    "sentences": "sentences",
    "margins": "score differences",
    "reference_sides": "answers of a reference",
}


@dataclass(frozen=True)
class Read(Begun):
    """Rows of images or of prompts, and how an image is judged."""

    task: "Pictures"


@dataclass(frozen=True)
class Opened(Read):
    """A pipeline on this process's device."""

    pipeline: "Pipeline"
    judge: "Judge | None"
    distance: "Distance | None"  # of drawn images from the task's pictures
    precision: Any


@dataclass(frozen=True)
class Compared(Opened):
    """Pairs as latents, a scorer, and a reference that is read beside the policy."""

    train: Any  # ImagePairs, and below an ImageScorer: rooms that know texts take them as theirs
    held: Any
    mismatched: Any
    scorer: Any
    beside: "Beside"


@dataclass(frozen=True)
class Look:
    """The held-out numbers at one time; metrics.json has what is ``told``."""

    told: dict[str, float]
    drawn: "Drawn"
    scores: "PairScores"


@dataclass(frozen=True)
class Measured(Compared):
    before: Look


@dataclass(frozen=True)
class Trained(Measured):
    steps: int


@dataclass(frozen=True)
class Ended(Trained):
    after: Look


def data(at: Begun) -> Read:
    """Rows, checked and split; of a loss that takes single answers, one image each."""
    from spo_lightning.data.pictures import load

    task = load(at.cfg.data)
    for note in task.notes:
        log.info("%s", note)
    return grown(Read, at, task=task)


DATA = Stage("data", data, "a pass over the rows", "reads again")


def refuse(loss: Any) -> None:
    """A loss that reads what an image has not."""
    from spo_lightning.losses import asks

    for name, what in LACKING.items():
        if asks(loss, name):
            raise UserError(f"this loss reads {what}, which pairs of images lack: take another")


def policy(at: Read) -> Opened:
    """The pipeline, built or loaded; one that is built learns the task's pictures."""
    from spo_lightning.diffusion.frechet import distance_of
    from spo_lightning.diffusion.opening import opened
    from spo_lightning.judges.images import judge_of
    from spo_lightning.models.device import precision_of
    from spo_lightning.training.denoising import begin

    cfg = at.cfg
    judge = judge_of(cfg.judge, at.task, at.world.device, cfg.eval.batch_size)
    pipeline = opened(cfg.model, at.task.words, cfg.seed, at.world.device)
    begin(cfg, at.task, pipeline, at.stages)
    precision = precision_of(cfg.hardware, at.world.device)
    told = {"judge": judge, "distance": distance_of(at.task), "precision": precision}
    return grown(Opened, at, pipeline=pipeline, **told)


def pairs(at: Opened) -> Opened:
    """As the data gives them, or made of the policy's own images."""
    from spo_lightning.data.pictures import apart
    from spo_lightning.diffusion.looks import picked
    from spo_lightning.diffusion.store import images_kept, key_of, weights_of

    task, found = at.task, {"train": at.task.train, "held_out": at.task.held_out}
    if task.samples:
        assert at.judge is not None  # such data has one
        weights = weights_of(at.pipeline.denoiser)
        for kind, (side, rows) in zip((PAIRS, HELD), found.items()):
            prompts = [row.prompt for row in rows for _ in range(task.samples)]
            key = key_of(weights, prompts, dict(at.cfg.model.sampling), at.cfg.seed, kind)
            draw = partial(_drawn, at, prompts, kind, f"{side.replace('_', '-')} images")
            found[side] = picked(rows, at.judge, images_kept(at.cfg, key, draw), task.samples)
            log.info("Pairs (%s): %d of %d prompts", side, len(found[side]), len(rows))
            if not found[side]:
                raise UserError(
                    f"the judge likes all images of every {side} prompt alike: raise data.samples "
                    "or data.prompts, or pretrain longer (sft.max_steps)"
                )
    if at.cfg.data.unpaired:
        found["train"] = apart(found["train"])
    kept = replace(task, train=found["train"], held_out=found["held_out"])
    return replace(at, task=replace(kept, texts=()))


def latents(at: Opened) -> Compared:
    """Latents of all images, adapters, and what the reference says of the held-out pairs."""
    from spo_lightning.diffusion.batch import Draws, mismatched
    from spo_lightning.diffusion.objective import Schedule
    from spo_lightning.diffusion.opening import adapted
    from spo_lightning.diffusion.reference import Beside
    from spo_lightning.diffusion.scorer import ImageScorer, reference_of
    from spo_lightning.diffusion.store import latents_of
    from spo_lightning.losses import asks
    from spo_lightning.training.feed import Mismatched

    cfg, task, pipeline = at.cfg, at.task, at.pipeline
    rows = [*task.train, *task.held_out]
    images = [it for row in rows for it in (row.chosen, row.rejected) if it is not None]
    stored = latents_of(pipeline, images, cfg)
    told = {prompt: pipeline.told(prompt) for prompt in {row.prompt for row in rows}}
    adapted(pipeline, cfg.model.lora, cfg.seed)
    schedule, how = Schedule.of(pipeline.scheduler), cfg.model.surrogate
    weights = built(cfg.model.weighting)(schedule)
    scorer = ImageScorer(pipeline.denoiser, schedule, scale=how.scale, weights=weights)
    scorer.to(at.world.device)
    reference = reference_of(scorer)
    look, learn = (Draws(how.seed, n, len(schedule)) for n in (how.eval_draws, how.draws))
    train = _as_pairs(task.train, stored, told)
    held = replace(_as_pairs(task.held_out, stored, told), draws=look)
    others = Mismatched(None, None)
    if asks(loss_of(cfg), "kl"):
        shifted = mismatched(_in_order(cfg, train), len(train))
        of_held = mismatched(held.pairs, len(held))
        apart = replace(held, pairs=of_held)
        scored = _scored(apart, reference, scorer, at)
        sides: Any = (replace(train, pairs=shifted), replace(apart, references=scored))
        others = Mismatched(*sides)
    held = replace(held, references=_scored(held, reference, scorer, at))
    found: Any = {"train": train, "held": held, "mismatched": others, "scorer": scorer}
    return grown(Compared, at, **found, beside=Beside(learn, reference))


def _as_pairs(rows: "Sequence[PictureRow]", stored: Any, told: Any) -> "ImagePairs":
    from spo_lightning.diffusion.batch import ImagePair, ImagePairs
    from spo_lightning.diffusion.store import name_of

    def named(image: Any) -> str:
        return "" if image is None else name_of(image)

    pairs = [
        ImagePair(row.prompt, named(row.chosen), named(row.rejected), at)
        for at, row in enumerate(rows)
    ]
    return ImagePairs(pairs, stored, told)


def _in_order(cfg: Any, train: "ImagePairs") -> list[Any]:
    """Training pairs in the order in which the outer steps draw them."""
    from spo_lightning.data.batch import draws
    from spo_lightning.training.feed import outer_steps

    count, found = outer_steps(cfg, len(train)), []
    for _, rows in zip(range(count), draws(len(train), cfg.batch_size, cfg.seed, 0)):
        found += [train.pairs[row] for row in rows]
    return found


def _scored(pairs: "ImagePairs", reference: Any, scorer: Any, at: Opened) -> list[Any]:
    """What the reference says of every row at its own draws, [images] each."""
    found = []
    with at.stages.stage("reference", len(pairs)) as advance, at.precision():
        for some in pairs.batches(at.cfg.eval.batch_size):
            batch = pairs.batch(some).to(scorer.device)
            said = reference(batch).logps.cpu()
            found += said.split([len(pairs.pairs[place]) for place in some])
            advance(len(some))
    return found


def _drawn(at: Opened, prompts: Sequence[str], kind: int, title: str) -> Sequence[Any]:
    with at.stages.stage(title, len(prompts)) as advance:
        return at.pipeline.drawn(
            prompts,
            **{"steps": at.cfg.model.sampling.steps, "guidance": at.cfg.model.sampling.guidance},
            seed=4 * at.cfg.seed + kind,
            size=at.cfg.eval.batch_size,
            advance=advance,
            precision=at.precision,
        )


def _look(at: Compared, start: "Drawn | None") -> Any:
    """Numbers of the held-out pairs, and of an image of every held-out prompt."""
    from spo_lightning.diffusion import looks
    from spo_lightning.evaluation.held_out import pair_scores

    how = {"beta": at.cfg.loss.beta, "batch_size": at.cfg.eval.batch_size}
    how |= {"precision": at.precision, "stages": at.stages}
    scores = pair_scores(at.scorer, at.held, **how)
    rows = at.task.held_out[: at.cfg.eval.max_rows if at.judge else GRID]
    images = _drawn(at, [row.prompt for row in rows], LOOK, "held-out images")
    drawn = looks.judged(at.task, at.judge, rows, images)
    told = looks.numbers(drawn, start or drawn) | scores.means
    if at.distance is not None:
        told["images/frechet_distance"] = at.distance(images)
    return Look(told, drawn, scores)


def init(job: Job, at: Compared) -> Measured:
    """Held-out numbers before training, and the images that later ones are held against."""
    if job.goes_on is not None:
        job.goes_on.refuse_another(at.scorer)
    before = _look(at, None)
    job.begin(before, at.seconds)
    return grown(Measured, at, before=before)


def training(job: Job, at: Measured) -> Trained:
    """Preference training under Lightning, from where the run goes on."""
    from spo_lightning.losses import balanced
    from spo_lightning.training.fit import Material, fit

    rows: tuple[Any, ...] = (at.train, at.held, None, None, at.mismatched, at.beside)
    # of images, which the rooms that know texts take as theirs (Compared)
    given, loss = Material(at.scorer, *rows, at.precision, dict, dict), job.loss  # type: ignore
    if at.cfg.data.unpaired:
        loss, told = balanced(loss, [bool(pair.chosen) for pair in at.train.pairs])
        log.info("%s", told)
    steps = job.steps(at.train)  # type: ignore[arg-type]
    if steps:
        steps = fit(at.cfg, given, loss, job.solver, steps, job.goes_on, job.run, at.stages)
    at.scorer.to(at.world.device)
    return grown(Trained, at, steps=steps)


def final(at: Trained) -> Ended:
    """The same numbers after training: the same prompts, from the same noise."""
    return grown(Ended, at, after=_look(at, at.before.drawn))


def save(job: Job, at: Ended) -> Ended:
    """The denoiser and its scheduler as diffusers has them, adapters merged."""
    from spo_lightning.diffusion.opening import merged
    from spo_lightning.records.disk import writing_folder
    from spo_lightning.records.summary import model_card

    if job.run.writes:
        with writing_folder(job.run.model):
            merged(at.pipeline)
            at.pipeline.save(job.run.model)
            card = model_card(job.choices, at.cfg).replace("transformers", "diffusers")
            (job.run.model / "README.md").write_text(card, encoding="utf-8")
    return at


def report(job: Job, at: Ended) -> Ended:
    """Numbers, what images show before and after, and grids of them."""
    from spo_lightning.capability.paired import changes
    from spo_lightning.diffusion.looks import grid

    before, after = at.before.drawn, at.after.drawn
    job.numbers["paired"] = changes(before.items, after.items)
    rows = []
    for place, row in enumerate(at.task.held_out[: len(after.images)]):
        seen = [at.task.seen(it) if at.task.seen else "" for it in (row.chosen, row.rejected)]
        texts = {"prompt": row.prompt, "reference": row.prompt}
        texts |= {"before": before.seen[place], "after": after.seen[place]}
        told = {"before_ok": before.right[place], "after_ok": after.right[place]}
        deltas = at.after.scores.chosen_delta, at.after.scores.rejected_delta
        told |= {"chosen_delta": deltas[0][place], "rejected_delta": deltas[1][place]}
        rows.append(texts | told | dict(zip(("chosen", "rejected"), seen)))
    if job.run.writes:
        grid(job.run.path / "samples.png", {"before": before.images, "after": after.images})
        held = [(row.chosen, row.rejected) for row in at.task.held_out]
        sides = zip(("held-out pairs: chosen", "rejected"), zip(*held))
        grid(job.run.path / "pairs.png", dict(sides))  # type: ignore[arg-type]
    job.end(at.after, at.steps, rows, [])  # type: ignore[arg-type]
    return at


def after_data(job: Job) -> list[Stage]:
    """All other stages: name, work, what it costs, how a run goes on that was killed in it."""
    look, again = "forwards and images", "measures again"
    shared = "once for all runs"
    return [
        Stage("policy", policy, f"sft.max_steps of pretraining, {shared}", "begins again"),
        Stage("pairs", pairs, f"data.samples images a prompt, {shared}", "draws again"),
        Stage("latents", latents, "the autoencoder on every image, if any", "what was kept stays"),
        Stage("held-out: init", partial(init, job), look, again),
        Stage("training", partial(training, job), "max_steps", "from its last checkpoint"),
        Stage("held-out: final", final, look, again),
        Stage("save", partial(save, job), "a model's write", "writes again"),
        Stage("report", partial(report, job), "nothing", "writes again"),
    ]
