"""Overrides that cannot have been meant are refused before anything is loaded.

Hydra refuses unknown keys; here: a value of another kind than the default, a value out of range,
and a knob that the chosen combination never reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.errors import UserError

# key -> (what holds, in words)
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "seed": (lambda v: v >= 0, "at least 0"),
    "max_steps": (lambda v: v >= -1, "at least 0, or -1 to follow epochs"),
    "epochs": (lambda v: v > 0, "above 0"),
    "batch_size": (lambda v: v >= 1, "at least 1"),
    "micro_batch_size": (lambda v: v >= 1, "at least 1"),
    "max_length": (lambda v: v >= 2, "at least 2"),
    "clip_norm": (lambda v: v is None or v > 0, "above 0, or null"),
    "loss.beta": (lambda v: v > 0, "above 0"),
    "sft.max_steps": (lambda v: v is None or v >= 0, "at least 0, or null"),
    "sft.batch_size": (lambda v: v >= 1, "at least 1"),
    "sft.lr": (lambda v: v > 0, "above 0"),
    "log.every_n_steps": (lambda v: v >= 1, "at least 1"),
    "eval.every_n_steps": (lambda v: v >= 0, "at least 0"),
    "eval.batch_size": (lambda v: v >= 1, "at least 1"),
    "eval.max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "eval.max_rows": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "checkpoint.every_n_steps": (lambda v: v >= 0, "at least 0"),
    "checkpoint.mode": (lambda v: v in ("min", "max"), "min or max"),
    "optimizer.lr": (lambda v: v >= 0, "at least 0"),
    "optimizer.warmup": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "optimizer.schedule": (
        lambda v: v in ("constant", "linear", "cosine"),
        "constant, linear or cosine",
    ),
    "data.eval_fraction": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "data.on_mismatch": (lambda v: v in ("split", "drop", "error"), "split, drop or error"),
    "model.lora.rank": (lambda v: v >= 0, "at least 0"),
    "hardware.devices": (lambda v: v >= 1, "at least 1"),
    "hardware.precision": (
        lambda v: v in ("32-true", "bf16-mixed", "bf16-true", "64-true"),
        "32-true, bf16-mixed, bf16-true or 64-true (fp16 needs loss scaling, which fights "
        "clipping and several gradients per step)",
    ),
}

# (prefix of the knobs, when they are idle, why)
IDLE: list[tuple[str, Callable[[DictConfig], bool], str]] = [
    ("model.lora.", lambda c: c.model.lora.rank == 0, "model.lora.rank is 0"),
    (
        "model.config.",
        lambda c: c.model.pretrained is not None,
        "model.pretrained brings its own config",
    ),
    ("model.revision", lambda c: c.model.pretrained is None, "model.pretrained is null"),
    (
        "model.trust_remote_code",
        lambda c: c.model.pretrained is None,
        "model.pretrained is null",
    ),
    ("sft.", lambda c: warm_start_steps(c) == 0, "there is no warm start (sft.max_steps is 0)"),
    ("epochs", lambda c: c.max_steps >= 0, "max_steps is set; make it -1"),
    ("checkpoint.mode", lambda c: c.checkpoint.monitor is None, "checkpoint.monitor is null"),
    ("optimizer.", lambda c: c.max_steps == 0, "max_steps is 0: nothing is trained"),
    (
        "data.eval_fraction",
        lambda c: c.data.get("eval_path") is not None,
        "data.eval_path is set",
    ),
]
READ_ALWAYS = ("model.lora.rank", "sft.max_steps")


def warm_start_steps(cfg: DictConfig) -> int:
    """``sft.max_steps``, or what null stands for."""
    if cfg.sft.max_steps is not None:
        return cfg.sft.max_steps
    return 0 if cfg.model.pretrained is not None else cfg.data.sft_steps


@dataclass(frozen=True)
class Given:
    """What the command line said: the keys it names, the options chosen, the values without it."""

    touched: Sequence[str]
    choices: Mapping[str, str]
    defaults: DictConfig


def given(config_name: str) -> Given:
    """Read from Hydra, inside its main."""
    from hydra import compose
    from hydra.core.hydra_config import HydraConfig

    settings = HydraConfig.get()
    choices = {k: v for k, v in settings.runtime.choices.items() if not k.startswith("hydra/")}
    choices = {k.split("@")[0]: str(v) for k, v in choices.items() if v is not None}
    overrides = list(settings.overrides.task)
    keys = [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
    groups = [text for key, text in zip(keys, overrides) if key in choices]
    touched = [key.replace("/", ".") for key in keys]
    return Given(touched, choices, compose(config_name, overrides=groups))


def check(cfg: DictConfig, line: Given) -> None:
    """Refuse what the command line gets wrong, in one line that names the key."""
    touched = line.touched
    if line.choices.get("loss") == "spo" and line.choices.get("solver") == "none":
        raise UserError("loss=spo with solver=none is plain DPO: use loss=dpo")
    for key in touched:
        _check_kind(key, OmegaConf.select(cfg, key), OmegaConf.select(line.defaults, key))
    for key, (holds, words) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if (value is not None or key in touched) and not _holds(holds, value):
            raise UserError(f"{key}={value}: it must be {words}")
    for prefix, idle, why in IDLE:
        for key in touched:
            if key.startswith(prefix) and key not in READ_ALWAYS and idle(cfg):
                raise UserError(f"{key} has no effect: {why}; leave it out")


def _holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return rule(value)
    except TypeError:
        return False


def _check_kind(key: str, value: Any, default: Any) -> None:
    if default is None or isinstance(default, (DictConfig,)):
        return
    number = isinstance(default, (int, float)) and not isinstance(default, bool)
    given = isinstance(value, (int, float)) and not isinstance(value, bool)
    if number and isinstance(default, int) and isinstance(value, float) and value != int(value):
        raise UserError(f"{key}={value}: it must be a whole number")
    if number and not given and value is not None:
        raise UserError(f"{key}={value}: it must be a number")
    if isinstance(default, bool) and not isinstance(value, bool):
        raise UserError(f"{key}={value}: it must be true or false")
