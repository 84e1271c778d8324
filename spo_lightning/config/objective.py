"""What a loss asks of other keys in; out comes nothing, or one line that refuses."""

from collections.abc import Callable, Sequence
from difflib import get_close_matches
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning.config.ranges import DIAGNOSTICS
from spo_lightning.errors import UserError

FIELDS = ("{prompt}", "{first}", "{second}")  # of a ranker's question
# what a model that ranks has nothing for: key, values refused, why
ANSWERLESS: list[tuple[str, Callable[[Any], bool], str]] = [
    ("eval.judge.every_n_steps", bool, "it answers nothing: leave it out"),
    ("eval.rival", lambda v: v not in (None, "start"), "it answers nothing: leave it out"),
    (
        "judge._target_",
        lambda v: v is not None and not v.endswith(".local.task"),
        "it answers nothing: leave judge out",
    ),
]
# a ranker
RANKER: list[tuple[str, Callable[[Any], bool], str]] = [
    *ANSWERLESS,
    ("data.stream", bool, "its questions are made before training: leave it out"),
    *(
        (f"diagnostics.{name}.every_n_steps", bool, "it answers with a letter: leave it out")
        for name in ("quality", "probes")
    ),
]
# a reward model
REWARDS: list[tuple[str, Callable[[Any], bool], str]] = [
    *ANSWERLESS,
    ("model.reference", lambda v: v is not None, "rewards have no reference: leave it out"),
    ("data.drop_high_ches", bool, "it ranks pairs by likelihoods' states: leave it out"),
    ("data.stream", bool, "its pairs are read before training: leave it out"),
    *(
        (
            f"diagnostics.{name}.every_n_steps",
            bool,
            "it reads likelihoods or answers: leave it out",
        )
        for name in DIAGNOSTICS
        if name != "displacement"  # which sees by itself that there is none
    ),
]


# what the yaml of a mixture's part says -> why it is none
APART = {
    "unpaired": "its rows have one answer and a label, and those of a mixture have two",
    "whole_batch": "it needs all pairs of a step at once, and a mixture judges each by itself",
    "rewards": "it reads the rewards of a head, and a mixture log-probabilities",
    "template": "it reads questions about two answers, and a mixture the answers",
    "language": "it reads sentences, which are looked for where it is the loss",
}
# facts that are read somewhere
WORDS = (*APART, "unit", "compares", "smooths", "similarity", "odds")


def check_loss(cfg: DictConfig, touched: Sequence[str]) -> None:
    """``touched``: the keys that the command line names."""
    for key, check in OF_A_RUN.items():
        if OmegaConf.select(cfg, key) not in (None, False) and "max_steps" in cfg:
            check(cfg)
    if OmegaConf.select(cfg, "loss.language") is not None:
        _check_similarity(cfg)
    if "max_steps" in cfg and OmegaConf.select(cfg, "data.unpaired") is not None:
        _check_unpaired(cfg)
    _check_words(cfg)
    _check_parts(cfg, touched)


def _check_words(cfg: DictConfig) -> None:
    """A fact that is nearly one that is read here, and would go unread."""
    for key, value in (cfg.get("loss") or {}).items():
        near = get_close_matches(str(key), WORDS, 1, cutoff=0.85)
        if near and key not in WORDS and isinstance(value, bool | str):
            raise UserError(f"loss.{key}={value}: nobody reads it; {near[0]} is meant")


def _check_parts(cfg: DictConfig, touched: Sequence[str]) -> None:
    """Parts of a mixture that do not go with others, and keys of those that do not count."""
    for name, part in (OmegaConf.select(cfg, "loss.parts") or {}).items():
        weight = part.get("weight")
        if isinstance(weight, bool) or not isinstance(weight, int | float):
            raise UserError(f"loss.parts.{name}.weight={weight}: it must be a number, 0 or more")
        for key, why in APART.items():
            if weight > 0 and part.get(key) not in (None, False):
                raise UserError(f"loss.parts.{name}.weight={weight}: {why}; take it alone")
    for key in touched:
        part, _, knob = key.rpartition(".")
        while part.count(".") > 2:
            part = part.rpartition(".")[0]
        weight = (
            OmegaConf.select(cfg, f"{part}.weight") if part.startswith("loss.parts.") else None
        )
        if weight == 0 and knob != "weight":
            raise UserError(f"{key} has no effect: {part}.weight is 0; give it one")


def _check_similarity(cfg: DictConfig) -> None:
    alpha, similarity = cfg.loss.alpha, cfg.loss.similarity
    if not 0 <= alpha <= 1:
        raise UserError(f"loss.alpha={alpha}: it must be at least 0 and at most 1")
    if alpha > 0 and similarity is None:
        raise UserError(
            f"loss.alpha={alpha} weighs similarities, and there are none: name a function or an "
            "embedding model as loss.similarity, or leave it at 0"
        )
    if alpha == 0 and similarity is not None:
        raise UserError("loss.similarity has no effect: loss.alpha is 0; raise it")
    if cfg.get("data", {}).get("stream"):
        raise UserError(
            "data.stream=true: this loss looks for sentences before training begins: leave it out"
        )


def _check_whole_batch(cfg: DictConfig) -> None:
    micro, size, devices = cfg.micro_batch_size, cfg.batch_size, cfg.hardware.devices
    apart = {
        "data.tokens_per_batch is set": cfg.data.get("tokens_per_batch") is not None,
        f"micro_batch_size={micro} is less than batch_size={size}": micro < size,
        f"hardware.devices={devices} share them": devices > 1,
    }
    for what in (what for what, is_so in apart.items() if is_so):
        raise UserError(
            f"this loss needs all pairs of an outer step at once, and {what}: take "
            "micro_batch_size=batch_size on one device"
        )


def _check_rewards(cfg: DictConfig) -> None:
    if not str(cfg.solver.get("_target_")).endswith("NoLower"):
        raise UserError(
            "a reward model is trained with solver=none: the others keep the likelihood of "
            "answers, and it has none"
        )
    _refuse(cfg, REWARDS, "a reward model")


def _check_ranker(cfg: DictConfig) -> None:
    lacking = [field for field in FIELDS if field not in cfg.loss.template]
    if lacking:
        raise UserError(f"loss.template lacks {lacking[0]}: the model has to be shown it")
    _refuse(cfg, RANKER, "a ranker")


def _refuse(
    cfg: DictConfig, rules: list[tuple[str, Callable[[Any], bool], str]], kind: str
) -> None:
    for key, refused, why in rules:
        value = OmegaConf.select(cfg, key)
        if refused(value):
            raise UserError(f"{key}={value} does not go with {kind}: {why}")


# what the loss's yaml says -> what a training run's other keys are asked then
OF_A_RUN = {
    "loss.whole_batch": _check_whole_batch,
    "loss.rewards": _check_rewards,
    "loss.template": _check_ranker,
}


def _check_unpaired(cfg: DictConfig) -> None:
    unpaired = bool(cfg.loss.get("unpaired"))
    if cfg.data.unpaired is not unpaired:
        rows = "one answer and its label" if unpaired else "two answers"
        raise UserError(
            f"data.unpaired={cfg.data.unpaired}: this loss takes rows of {rows}: leave it out"
        )
    if unpaired and cfg.data.get("stream"):
        raise UserError("data.stream=true: this loss weighs the labels of all rows: leave it out")
