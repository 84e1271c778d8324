"""What was asked of the bench in; the training command's configuration out, and what was refused.

So every key of the training command that stands here too, ``model.attention=...`` or
``hardware.precision=...``, holds for our side; ``train=[...]`` says the others.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from spo_lightning.bench.cell import Cell, hushed
from spo_lightning.config import knobs
from spo_lightning.config.build import one_line
from spo_lightning.errors import UserError
from spo_lightning.records import progress
from spo_lightning.records.directory import without_secrets, write_text
from spo_lightning.records.progress import Stages, Stop
from spo_lightning.run import prepare

log = logging.getLogger(__name__)

BUILT = ("pretrained", "reference", "revision", "trust_remote_code", "lora")  # of the model
OPEN = ("optimizer.fused", "optimizer.foreach")  # how the same steps are computed
FIXED = ("data=pairs", "model=pretrained", "loss=dpo", "solver=none", "optimizer=adamw")


def refuse_models(line: knobs.Given) -> None:
    """Another model than one built here."""
    for key in line.touched:
        parts = key.split(".")
        if parts[0] == "model" and len(parts) > 1 and parts[1] in BUILT:
            raise UserError(f"{key} has no effect: the bench builds its model from model.config")


def refuse_below(cfg: DictConfig, key: str, least: float, *, within: bool) -> None:
    """A number, or one of a list, under ``least``; ``within``: which itself is allowed."""
    value = cfg[key]
    for number in value if OmegaConf.is_list(value) else [value]:
        known = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not known or number < least or (number == least and not within):
            words = "at least" if within else "above"
            raise UserError(f"{key}={value}: it must be {words} {least}")
    if OmegaConf.is_list(value) and not value:
        raise UserError(f"{key}=[]: name at least one")


def span(found: Sequence[Any], where: str) -> tuple[int, int]:
    """[least, most] tokens."""
    whole = len(found) == 2 and all(isinstance(length, int) for length in found)
    if not whole or not 2 <= found[0] <= found[1]:
        raise UserError(f"{where}={list(found)}: [least, most] tokens, both from 2 up")
    return found[0], found[1]


def cell_of(cfg: DictConfig) -> Cell:
    """The one shape and vocabulary of a question that has no more."""
    refuse_below(cfg, "vocabulary", 8, within=True)
    prompt, completion = (span(cfg[key], key) for key in ("prompt", "completion"))
    return Cell("pairs", cfg.vocabulary, prompt, completion)


def begin(cfg: DictConfig, run_dir: Path) -> Stages:
    """Quiet libraries, threads, signals, and config.yaml in the run directory."""
    stages = Stages(lambda *_: None, Stop(), "Run the command again.")
    stages.stop.install()
    progress.quiet()
    prepare.set_threads(cfg.hardware)
    log.info("Run directory: %s", run_dir)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(without_secrets(resolved)))
    return stages


def device_of(cfg: DictConfig) -> torch.device:
    with hushed():  # it says what it took, and here it is asked again for every cell
        return prepare.device_of(cfg.hardware)


def machine(cfg: DictConfig) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = device_of(cfg).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "precision": cfg.hardware.precision,
    }


def trained(cfg: DictConfig, words: Sequence[str] = ()) -> DictConfig:
    """The training command's configuration with what was said here, and last with ``words``."""
    from hydra import compose
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    own = {
        "model": {**cfg.model, "pretrained": "here", "config": {}},
        "hardware": cfg.hardware,
        "optimizer": {"lr": cfg.lr},
        "loss": {"beta": cfg.beta},
        **{key: cfg[key] for key in ("seed", "batch_size", "clip_norm")},
    }
    for word in cfg.train:
        key = str(word).lstrip("+").split("=")[0]
        if key.split(".")[0] in own and key not in OPEN:
            raise UserError(f"train: {word} stands on this command line, or not at all")
    for word in words:
        if word.split("=")[0] in ("model", "hardware"):
            raise UserError(f"{word}: say {word.split('=')[0]}.key=value, as the rest stands here")
    try:
        found = compose("train", [*FIXED, "model.pretrained=here", *cfg.train, *words])
        found.merge_with(own)
        found.merge_with_dotlist([word for word in words if _is_value(found, word)])
    except (HydraException, OmegaConfBaseException) as error:
        said = [*cfg.train, *words]
        raise UserError(f"train={said}: {one_line(error)}") from error
    return found


def _is_value(found: DictConfig, word: str) -> bool:
    """Whether it sets a key, rather than choosing an option of a group."""
    key = word.split("=")[0]
    return "/" not in key and not OmegaConf.is_dict(OmegaConf.select(found, key))


def settled(mine: DictConfig, model: Path, cell: Cell, room: Path) -> Any:
    """The same for one cell's model, without references to anything else."""
    own = {
        "model": {"pretrained": str(model)},
        "max_length": cell.longest,
        "cache": {"dir": str(room / "cache")},
    }
    whole: Any = OmegaConf.to_container(OmegaConf.merge(mine, own), resolve=True)
    flat: Any = OmegaConf.create(whole)
    return flat
