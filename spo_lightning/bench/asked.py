"""What was asked of the bench in; the training command's configuration out, and what was refused.

Every key of the training command that stands here too, ``model.attention=...`` or
``hardware.precision=...``, holds for our side; ``train=[...]`` says the others.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from hydra import compose
from hydra.errors import HydraException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spo_lightning import __version__
from spo_lightning.bench.cell import Cell
from spo_lightning.bench.ours import device_of
from spo_lightning.config import knobs
from spo_lightning.config.build import one_line
from spo_lightning.errors import UserError
from spo_lightning.models.device import set_threads
from spo_lightning.records import progress
from spo_lightning.records.directory import without_secrets, write_text
from spo_lightning.records.progress import Stages, Stop

log = logging.getLogger(__name__)

BUILT = ("pretrained", "reference", "revision", "trust_remote_code", "lora")  # of the model
ADAPTERS = "lora"
OPEN = ("optimizer.fused", "optimizer.foreach")  # how the same steps are computed
FIXED = ("data=pairs", "model=pretrained", "loss=dpo", "solver=none", "optimizer=adamw")


def refuse(
    cfg: DictConfig,
    line: knobs.Given,
    least: Mapping[str, float],
    positive: Sequence[str] = (),
    *,
    adapters: bool = False,
) -> None:
    """Another model than one built here; a number, or one of a list, below its ``least``, or not
    above 0. ``adapters``: whether these may be put on it."""
    built = [part for part in BUILT if part != ADAPTERS or not adapters]
    for key in line.touched:
        if key.startswith(tuple(f"model.{part}" for part in built)):
            raise UserError(f"{key} has no effect: the bench builds its model from model.config")
    bounds = [(key, number, "at least") for key, number in least.items()]
    for key, bound, words in bounds + [(key, 0, "above") for key in positive]:
        value = cfg[key]
        numbers = value if OmegaConf.is_list(value) else [value]
        if not numbers:
            raise UserError(f"{key}=[]: name at least one")
        for number in numbers:
            known = isinstance(number, (int, float)) and not isinstance(number, bool)
            if not known or number < bound or (number == bound and words == "above"):
                raise UserError(f"{key}={value}: it must be {words} {bound}")


def refuse_strangers(names: Iterable[str], group: str, listed: Iterable[str], said: str) -> None:
    """A name that is none of those listed."""
    for name in names:
        if name not in listed:
            raise UserError(f"{said}: {name} is none of {group}: choose from {', '.join(listed)}")


def span(found: Sequence[Any], where: str) -> tuple[int, int]:
    """[least, most] tokens."""
    whole = len(found) == 2 and all(isinstance(length, int) for length in found)
    if not whole or not 2 <= found[0] <= found[1]:
        raise UserError(f"{where}={list(found)}: [least, most], both from 2 up")
    return found[0], found[1]


def cell_of(cfg: DictConfig) -> Cell:
    """The one shape and vocabulary of a question that has no more."""
    return Cell(
        "pairs", cfg.vocabulary, *(span(cfg[key], key) for key in ("prompt", "completion"))
    )


def begin(cfg: DictConfig, run_dir: Path) -> Stages:
    """Quiet libraries, threads, signals, and config.yaml in the run directory."""
    stages = Stages(lambda *_: None, Stop(), "Run the command again.")
    stages.stop.install()
    progress.quiet()
    set_threads(cfg.hardware)
    log.info("Run directory: %s", run_dir)
    resolved = OmegaConf.to_container(cfg, resolve=True)
    write_text(run_dir / "config.yaml", OmegaConf.to_yaml(without_secrets(resolved)))
    return stages


def machine(cfg: DictConfig) -> dict[str, Any]:
    """What the numbers were measured on."""
    cuda = device_of(cfg.hardware).type == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "cpu",
        "threads": torch.get_num_threads(),
        "precision": cfg.hardware.precision,
    }


def setting(cfg: DictConfig, *keys: str, **more: Any) -> dict[str, Any]:
    """The machine, what was measured, and by which versions."""
    values = {key: cfg[key] for key in keys}
    plain = {key: list(v) if OmegaConf.is_list(v) else v for key, v in values.items()}
    versions = {"spo_lightning": __version__, "torch": torch.__version__}
    return {**machine(cfg), **more, **plain, **versions}


# -- our configuration


def entries(
    cfg: DictConfig, group: str, first: str, composed: Callable[[list[str]], DictConfig]
) -> dict[str, DictConfig]:
    """The configuration of every entry of ``cfg[group]``, a list of words of the command line
    each; ``first`` before all others, of which ``cfg.only`` names some."""
    listed = cfg[group]
    refuse_strangers(cfg.only or (), group, listed, "only")
    found = {}
    for name in dict.fromkeys([first, *(cfg.only or listed)]):
        words = listed[name]
        if not isinstance(words, ListConfig) or not all(isinstance(w, str) for w in words):
            raise UserError(f"{group}.{name}={words}: it must be a list of overrides, [...]")
        try:
            found[name] = composed(list(words))
        except (UserError, HydraException, OmegaConfBaseException) as error:
            raise UserError(f"{group}.{name}: {one_line(error)}") from error
    return found


def trained(cfg: DictConfig, words: Sequence[str] = ()) -> DictConfig:
    """The training command's configuration with what was said here, and last with ``words``."""
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
        # a word wins over what stands here; one that chose an option of a group has done its work
        found.merge_with_dotlist([word for word in words if sets_a_key(found, word)])
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(f"train={[*cfg.train, *words]}: {one_line(error)}") from error
    return found


def sets_a_key(found: DictConfig, word: str) -> bool:
    key = word.split("=")[0]
    return "/" not in key and not OmegaConf.is_dict(OmegaConf.select(found, key))
