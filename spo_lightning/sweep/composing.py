"""A job's words in, its configuration out; as few as may be before the first job begins.

One takes an eighth of a second, and Hydra composes all to look at them and again to run them.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import OmegaConf


def key_of(word: str) -> str:
    """``loss.beta`` of ``+loss.beta=0.1``; of a group without its package."""
    return word.lstrip("+~").partition("=")[0].partition("@")[0]


class Checking:
    """Hydra's loader as a sweeper is given it: what cannot be composed is refused, no more.

    A sweeper composes every job before the first. Whether a word can be had depends on the options
    that are chosen beside it and not on the other values: so one job stands for all that bring no
    new word beside the same options. What two values do to each other the job itself finds out.
    """

    def __init__(self, loader: Any):
        self.loader = loader
        self.seen: set[tuple[Any, str]] = set()
        self.is_group = cache(lambda key: bool(loader.get_group_options(key)))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)

    def load_sweep_config(self, master_config: Any, sweep_overrides: list[str]) -> None:
        options = self.options(sweep_overrides)
        new = {(options, word) for word in sweep_overrides} - self.seen
        if new or not sweep_overrides:
            self.loader.load_sweep_config(master_config, sweep_overrides)
            self.seen |= new

    def options(self, words: Sequence[str]) -> tuple[str, ...]:
        """Those that choose an option of a group."""
        return tuple(word for word in words if self.is_group(key_of(word)))


def yamls_before_schemas() -> None:
    """A launcher's options in conf/ stand for an engine's own of that name: Hydra would merge the
    two, and refuse what only one of them has."""
    launchers: Any = ConfigStore.instance().repo["hydra"]["launcher"]
    for name in ("submitit_slurm.yaml", "submitit_local.yaml"):
        launchers.pop(name, None)


def is_numbered(config: Any) -> bool:
    """Whether a job's directory is named by its number alone, so that it need not be composed."""
    plain: Any = OmegaConf.to_container(config.hydra.sweep, resolve=False)
    return plain["subdir"] == "${hydra.job.num}"


def of_the_task(words: Sequence[str]) -> list[str]:
    """Without those that are Hydra's or the sweep's own."""
    own = ("hydra.", "hydra/", "sweep.")
    return [word for word in words if not key_of(word).startswith(own)]
