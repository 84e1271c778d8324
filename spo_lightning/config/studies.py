"""An experiment without a language model (``study``): which keys it heeds, and what it can do."""

from collections.abc import Sequence

from omegaconf import DictConfig

from spo_lightning.errors import UserError

ALWAYS = ("experiment", "seed", "study", "sweep")


def heeds(cfg: DictConfig, key: str) -> bool:
    """Whether a run reads the key: one with a model all of them, a study those it names."""
    study = cfg.get("study")
    if study is None:
        return True
    named = (*ALWAYS, *study.get("reads", ()))
    return any(key == one or key.startswith(f"{one}.") for one in named)


def goes_on(cfg: DictConfig) -> bool:
    """Whether a run that was stopped goes on where it was, and does not begin again."""
    return heeds(cfg, "ckpt_path")


def check_study(cfg: DictConfig, touched: Sequence[str]) -> None:
    for key in touched:
        if not heeds(cfg, key):
            raise UserError(
                f"{key} has no effect: this experiment trains no language model, and its settings "
                "stand under study; leave it out"
            )
