"""A run of guided design that takes a second: few designs, narrow nets, few times."""

from fitting import config
from stops import nowhere

from spo_lightning.config.build import built

EXPERIMENT = "experiment=guided_design"
NETS = ("denoiser", "classifier", "surrogate")
TINY = (
    *("problem.generations=8", "study.data.rows=400", "study.data.population=40"),
    *("study.schedule.times=20", "study.schedule.last=0.5", "study.guidance.clamp_every=5"),
    *(f"study.{net}.width=16" for net in NETS),
    *(f"study.{net}.steps=12" for net in NETS),
    *(f"study.{net}.batch_size=32" for net in NETS),
    *("study.generations=3", "study.guidance.samples=16", "study.guidance.weights=[3]"),
)


def study(*overrides, problem="zdt1"):
    return built(config(EXPERIMENT, f"problem={problem}", *TINY, *overrides).study)


def ran(directory, *overrides, advance=nowhere, checkpoint_every=5):
    """The study's numbers, of a directory like a run's."""
    (directory / "checkpoints").mkdir(exist_ok=True)
    return study(*overrides).run(
        directory, advance, log_every=4, checkpoint_every=checkpoint_every
    )
