"""What does not go with a command, with pairs of images or with a denoiser: one line that refuses,
or nothing."""

from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.config.ranges import DIAGNOSTICS
from spo_lightning.errors import UserError

TOKENS = "it is of tokens, and images have none: leave it out"
# key, values refused, why
IMAGES: list[tuple[str, Callable[[Any], bool], str]] = [
    ("loss.rewards", bool, "a reward model reads answers of text: take another loss"),
    ("loss.template", bool, "a ranker reads answers of text: take another loss"),
    ("loss.language", lambda v: v is not None, "it reads sentences: take another loss"),
    (
        "loss.odds",
        bool,
        "it takes 1 - p of a probability, and an image has but a surrogate",
    ),
    ("loss.wpo", bool, TOKENS),
    ("loss.ld_alpha", lambda v: v not in (None, 1), TOKENS),
    ("hardware.devices", lambda v: v not in (None, 1), "they train in one process: leave it out"),
    ("hardware.sharding", lambda v: v is not None, "they train in one process: leave it out"),
    ("hardware.compile", bool, "a denoiser is not compiled: leave it out"),
    (
        "hardware.precision",
        lambda v: v not in (None, "32-true", "bf16-mixed"),
        "a denoiser trains in 32-true or bf16-mixed",
    ),
    (
        "judge._target_",
        lambda v: not str(v).endswith((".local.task", ".local.reward")),
        "images are judged by the data itself, or by judge=reward judge.model=CLIP",
    ),
    ("eval.judge.every_n_steps", bool, "images are drawn before and after training: leave it out"),
    ("eval.rival", lambda v: v not in (None, "start"), "images are judged against the start's"),
    ("eval.by", lambda v: v is not None, "rows of images have no other columns: leave it out"),
    ("eval.prompts", lambda v: v is not None, "it counts answers of text: leave it out"),
    ("eval.tasks", bool, "they ask for answers of text: leave it out"),
    *(
        (f"diagnostics.{name}.every_n_steps", bool, "it reads answers of text: leave it out")
        for name in DIAGNOSTICS
        if name != "displacement"
    ),
]
# keys that nothing reads then
UNREAD = (
    *("max_length", "eval.max_new_tokens", "eval.stop", "eval.pairs", "eval.refusals"),
    "refusals",
)
OTHERS = ("plan", "preflight", "loop", "what")  # of other commands, which read texts
# key, the values that go with a command, why no other does
Only = Sequence[tuple[str, tuple[Any, ...], str]]


def check_only(cfg: DictConfig, only: Only, command: str) -> None:
    for key, values, why in only:
        value = OmegaConf.select(cfg, key)
        if value not in values:
            raise UserError(f"{key}={value} does not go with {command}: {why}")


def check_apart(cfg: DictConfig, touched: Sequence[str]) -> None:
    """``touched``: the keys that the command line names."""
    images = bool(OmegaConf.select(cfg, "data.images"))
    draws = OmegaConf.select(cfg, "model.surrogate") is not None
    if not images and not draws:
        return
    if "max_steps" not in cfg or any(key in cfg for key in OTHERS):
        raise UserError("pairs of images are read by spo_lightning.train alone: take other data")
    if not draws:
        raise UserError("this data is pairs of images: add model=diffusion, which draws them")
    if not images:
        raise UserError("a denoiser draws images, and this data is texts: add data=shapes, images")
    for name, part in (OmegaConf.select(cfg, "loss.parts") or {}).items():
        if part.get("odds") and part.get("weight"):
            raise UserError(f"loss.parts.{name}.weight={part.weight}: an image has no odds")
    _check_keys(cfg, touched)


def _check_keys(cfg: DictConfig, touched: Sequence[str]) -> None:
    for key, refused, why in IMAGES:
        value = OmegaConf.select(cfg, key)
        if refused(value):
            told = str(value).splitlines()[0]  # a ranker's question has more
            raise UserError(f"{key}={told} does not go with pairs of images: {why}")
    for key in touched:
        if key in UNREAD:
            raise UserError(f"{key} has no effect: {TOKENS}")
