"""Overrides that cannot have been meant are refused before anything is loaded.

Hydra refuses unknown keys; here: a mandatory value left out, a key added or removed that nothing
reads or misses, a value of another kind than the default or out of range, and a knob that the
chosen combination never reads.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from spo_lightning.config.apart import check_apart
from spo_lightning.config.objective import check_loss
from spo_lightning.config.ranges import DIAGNOSTICS, NEEDS, RANGES, check_kind, holds, number
from spo_lightning.config.sharded import check_sharded
from spo_lightning.config.studies import check_study
from spo_lightning.errors import UserError

# of the model that answers
BUILT = ("pretrained", "base", "config", "revision", "lora", "quantize")
# (prefix of the knobs, when they are idle, why)
IDLE: list[tuple[str, Callable[[DictConfig], bool], str]] = [
    ("model.lora.", lambda c: c.model.lora.rank == 0, "model.lora.rank is 0"),
    ("model.config.", lambda c: c.model.pretrained is not None, "model.pretrained brings its own"),
    *(
        (key, lambda c, of=of: OmegaConf.select(c, of, default="") is None, f"{of} is null")
        for key, of in NEEDS
    ),
    (
        *("model.double_quantization", lambda c: c.model.get("quantize") != "nf4"),
        "only model.quantize=nf4 has scales that it rounds",
    ),
    ("model.shape", lambda c: "plan" not in c, "only plan reads it"),
    ("model.sync.alpha", lambda c: c.model.reference_sync == "hard", "a hard move takes all"),
    ("model.reference_sync", lambda c: not c.get("max_steps"), "nothing is trained"),
    ("sft.", lambda c: warm_start_steps(c) == 0, "there is no warm start (sft.max_steps is 0)"),
    (
        "micro_batch_size",
        lambda c: c.data.get("tokens_per_batch") is not None,
        "data.tokens_per_batch is set",
    ),
    ("epochs", lambda c: c.max_steps >= 0, "max_steps is set; make it -1"),
    (
        "solver.weight",
        lambda c: str(c.solver.get("schedule", {}).get("_target_")).endswith("SlackBarrier"),
        "solver/schedule=barrier finds it",
    ),
    (
        "solver.hvp",
        lambda c: c.solver.get("apply") is not None and c.solver.apply.get("order") != "second",
        "only solver/apply=hypergradient with solver.apply.order=second takes Hessian products",
    ),
    ("cache.", lambda c: not c.cache.get("enabled", True), "cache.enabled is false"),
    *(
        (f"eval.tasks_{key}", lambda c: not c.eval.tasks, "eval.tasks names none")
        for key in ("path", "limit", "batch_size", "chat")
    ),
    *(
        (key, lambda c: "samples" in c and "base_url" in c.engine, "an endpoint answers")
        for key in ("checkpoint", "base", *(f"model.{key}" for key in BUILT), "sft.")
    ),
    (
        "eval.judge.",
        lambda c: not OmegaConf.select(c, "eval.judge.every_n_steps"),
        "eval.judge.every_n_steps is 0",
    ),
    ("optimizer.", lambda c: c.get("max_steps") == 0, "max_steps is 0: nothing is trained"),
    (
        "optimizer.bf16",
        lambda c: not _trains_bfloat16(c),
        "model.dtype is not bfloat16, or adapters train, which are in float32",
    ),
    ("data.eval_fraction", lambda c: bool(c.data.get("eval_path")), "data.eval_path is set"),
    ("data.chunk_rows", lambda c: not c.data.get("stream"), "data.stream is false"),
    (
        "data.sft",
        lambda c: _sft_is_idle(c),
        "no lower level reads it (solver=none, or nothing is trained), nor does the warm start",
    ),
    (
        "data.drop_high_ches",
        lambda c: c.get("max_steps", 0) == 0,
        "training pairs are dropped, and nothing is trained",
    ),
    *(
        (
            f"diagnostics.{d}.",
            lambda c, d=d: c.diagnostics[d].every_n_steps == 0,
            f"diagnostics.{d}.every_n_steps is 0",
        )
        for d in DIAGNOSTICS
    ),
]
# what does not go with FlexAttention: key, values refused, why
FLEX: list[tuple[str, Callable[[Any], bool], str]] = [
    ("hardware.accelerator", lambda v: v == "cpu", "it has no backward there: leave it out"),
    ("hardware.compile", lambda v: bool(v), "it compiles its own kernel: leave one of them out"),
    (
        "diagnostics.evolution.every_n_steps",
        lambda v: v > 0,
        "it has no forward-mode derivative: leave one of them out",
    ),
]
# what does not go with a quantised model: key, values refused, why
QUANTISED: list[tuple[str, Callable[[Any], bool], str]] = [
    (
        "model.pretrained",
        lambda v: v is None,
        "a model that is built here first learns with every weight: name a checkpoint",
    ),
    (
        "model.lora.fresh",
        lambda v: bool(v),
        "merged adapters leave full weights: export merges, then name what it wrote",
    ),
    ("model.dtype", lambda v: v == "float64", "quantised weights are read in float32 at most"),
    ("hardware.compile", lambda v: bool(v), "quantised layers are not compiled: leave it out"),
    ("sft.max_steps", lambda v: v > 0, "a warm start trains every weight: leave it out"),
    (
        "loss.rewards",
        lambda v: bool(v),
        "transformers does not know a body as quantised under another head: train it in full",
    ),
    (
        "diagnostics.evolution.every_n_steps",
        lambda v: v > 0,
        "quantised layers have no forward-mode derivative: leave it out",
    ),
]
# what cannot be had of rows that are never all there: key, values refused, why
STREAM: list[tuple[str, Callable[[Any], bool], str]] = [
    ("max_steps", lambda v: v < 0, "how many pairs an epoch has is not known: set it"),
    ("data.max_rows", lambda v: v is not None, "it samples among all rows: leave it out"),
    ("data.drop_high_ches", lambda v: bool(v), "it ranks all pairs: leave it out"),
    ("diagnostics.ches.every_n_steps", lambda v: v > 0, "it scores all pairs: leave it out"),
]
READ_ALWAYS = (
    *("model.lora.rank", "sft.max_steps", "cache.enabled", "eval.judge.every_n_steps"),
    *("model.lora.fresh", "model.lora.merge"),  # adapters of a checkpoint need no rank
    *(f"diagnostics.{d}.every_n_steps" for d in DIAGNOSTICS),
)
# what stands here goes to a constructor, which knows its own keys
OPEN = (
    *("model.config.", "optimizer.", "solver.", "solvers.", "data.", "logger."),
    *("judge.", "engine.", "strategy.", "loss.parts.", "roles.", "retrieval.", "knobs."),
)


def warm_start_steps(cfg: DictConfig) -> int:
    """``sft.max_steps``, or what null stands for."""
    if cfg.sft.max_steps is not None:
        return cfg.sft.max_steps
    return 0 if cfg.model.pretrained is not None else cfg.data.sft_steps


def _sft_is_idle(cfg: DictConfig) -> bool:
    if cfg.data.get("sft") is None or "max_steps" not in cfg:  # the other commands only show it
        return False
    watched = str(cfg.solver.get("_target_")).endswith("NoLower")
    # of pairs it is the warm start's text too; other sources bring that themselves
    warms = str(cfg.data.get("_target_")).endswith("pairs.pairs") and warm_start_steps(cfg) > 0
    return (watched or cfg.max_steps == 0) and not warms


def _trains_bfloat16(cfg: DictConfig) -> bool:
    dtype, rank = (OmegaConf.select(cfg, key) for key in ("model.dtype", "model.lora.rank"))
    return dtype == "bfloat16" and not rank and cfg.get("max_steps") != 0


@dataclass(frozen=True)
class Given:
    """What the command line said: the keys it names, the options chosen, the values without it."""

    touched: Sequence[str]
    choices: Mapping[str, str]
    defaults: DictConfig
    several: bool = False  # whether this is one job of a sweep
    ours: bool = False  # whether our launcher runs it


@cache
def defaults_of(config_name: str, options: tuple[str, ...]) -> DictConfig:
    """The configuration with these options and no other word."""
    from hydra import compose

    return compose(config_name, overrides=list(options))


def given() -> Given:
    """Read from Hydra, inside its main."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    settings = HydraConfig.get()
    choices = {k: v for k, v in settings.runtime.choices.items() if not k.startswith("hydra/")}
    choices = {k.split("@")[0]: str(v) for k, v in choices.items() if v is not None}
    overrides: Any = OmegaConf.to_container(settings.overrides.task)  # one may hold a ${...}
    for removed in (text for text in overrides if text.startswith("~")):
        raise UserError(f"{removed} removes what is read: give it a value instead")
    keys = [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
    groups = tuple(text for key, text in zip(keys, overrides) if key in choices)
    touched = [key.replace("/", ".") for key in keys]
    defaults = defaults_of(settings.job.config_name, groups)
    several = settings.mode == RunMode.MULTIRUN
    ours = several and settings.launcher._target_.endswith(".ProcessLauncher")
    return Given(touched, choices, defaults, several, ours)


def check(cfg: DictConfig, line: Given) -> None:
    """Refuse what the command line gets wrong, in one line that names the key."""
    check_study(cfg, line.touched)
    check_apart(cfg, line.touched)
    _check_whole(cfg, line)
    for key in line.touched:
        if not (_declared(line.defaults, key) or key.startswith(OPEN) or key in line.choices):
            raise UserError(f"{key} is no setting of this command: leave it out")
        check_kind(key, OmegaConf.select(cfg, key), OmegaConf.select(line.defaults, key))
    for key, (rule, words) in RANGES.items():
        value = OmegaConf.select(cfg, key)
        if (value is not None or key in line.touched) and not holds(rule, value):
            raise UserError(f"{key}={value}: it must be {words}")
    check_loss(cfg, line.touched)
    _check_reading(cfg)
    _check_precision(cfg)
    check_sharded(cfg)
    _check_inner_steps(cfg)
    _check_looks(cfg)
    _check_stream(cfg)
    _check_sweep(line)
    for prefix, idle, why in IDLE:
        for key in line.touched:
            below = key == prefix or key.startswith(prefix.removesuffix(".") + ".")
            if below and key not in READ_ALWAYS and idle(cfg):
                raise UserError(f"{key} has no effect: {why}; leave it out")


def _check_whole(cfg: DictConfig, line: Given) -> None:
    """What no single key shows."""
    try:
        for key in sorted(OmegaConf.missing_keys(cfg)):
            raise UserError(f"{key} has no default: give it a value, {key}=...")
        OmegaConf.resolve(cfg.copy())
    except InterpolationResolutionError as error:
        raise UserError(str(error).splitlines()[0]) from error
    if line.choices.get("loss") == "spo" and line.choices.get("solver") == "none":
        raise UserError("loss=spo with solver=none is plain DPO: use loss=dpo")
    if "model" in cfg and cfg.model.pretrained is None and not cfg.model.config:
        raise UserError(
            "model.pretrained is not set, and this model has no config to be built from: "
            "name a directory or hub id"
        )
    pairs, devices = (OmegaConf.select(cfg, key) for key in ("batch_size", "hardware.devices"))
    if number(pairs) and number(devices) and 1 <= pairs < devices:
        raise UserError(
            f"batch_size={pairs} gives no pair to some of the {devices} devices: raise it"
        )


def _check_reading(cfg: DictConfig) -> None:
    """How the model is read."""
    if OmegaConf.select(cfg, "model.attention") == "flex":
        _refuse(cfg, FLEX, "model.attention=flex")
    bits = OmegaConf.select(cfg, "model.quantize")
    if bits is not None:
        # the bench reads a checkpoint of its own, which it builds first
        rules = [rule for rule in QUANTISED if "what" not in cfg or rule[0] != "model.pretrained"]
        _refuse(cfg, rules, f"model.quantize={bits}")


def _check_precision(cfg: DictConfig) -> None:
    wanted = {"64-true": "float64", "bf16-true": "bfloat16"}
    precision = OmegaConf.select(cfg, "hardware.precision")
    for key in ("model.dtype", "dtype"):  # the latter of the commands that only look
        dtype = OmegaConf.select(cfg, key)
        if dtype is not None and wanted.get(precision, dtype) != dtype:
            raise UserError(
                f"hardware.precision={precision} works on weights in {wanted[precision]}, of "
                f"policy and reference alike: set {key}={wanted[precision]} too"
            )


def _check_inner_steps(cfg: DictConfig) -> None:
    for key in ("solver.lower_lr", "solver.value.lower_lr"):
        rate = OmegaConf.select(cfg, key)
        if rate is not None and _trains_bfloat16(cfg):
            raise UserError(
                f"{key}={rate} is of steps that the solver takes on the weights itself, and in "
                "bfloat16 they would round away: set model.dtype=float32 (and "
                "hardware.precision=bf16-mixed), or train adapters (model.lora.rank)"
            )


def _check_sweep(line: Given) -> None:
    for key in line.touched:
        if key.startswith("sweep.") and not line.several:
            raise UserError(f"{key} has no effect: this is one run; add -m, or leave it out")
        if key.startswith("sweep.") and key != "sweep.objective" and not line.ours:
            raise UserError(f"{key} has no effect: only hydra/launcher=process reads it")


def _check_looks(cfg: DictConfig) -> None:
    key, other = "diagnostics.overoptimisation.every_n_steps", "eval.every_n_steps"
    looks, evaluated = (OmegaConf.select(cfg, name) for name in (key, other))
    if looks and (not evaluated or looks % evaluated):
        raise UserError(
            f"{key}={looks}: it reads held-out numbers, so it must be a multiple of {other} "
            f"({evaluated}), and that above 0"
        )
    wins, quality = "eval.judge.every_n_steps", "diagnostics.quality.every_n_steps"
    counted = [key for key in (wins, quality) if OmegaConf.select(cfg, key)]
    if len(counted) > 1:
        raise UserError(f"{wins} and {quality} both count wins: leave one out")
    monitor = OmegaConf.select(cfg, "checkpoint.monitor")
    if str(monitor).startswith("eval/win_rate") and not counted:
        raise UserError(f"checkpoint.monitor={monitor}: set {wins}, or nothing counts wins")
    if str(monitor).startswith("eval/win_rate") and cfg.checkpoint.mode == "min":
        raise UserError(f"checkpoint.monitor={monitor}: set checkpoint.mode=max")


def _check_stream(cfg: DictConfig) -> None:
    if "max_steps" in cfg and OmegaConf.select(cfg, "data.stream"):
        _refuse(cfg, STREAM, "data.stream=true")


def _refuse(cfg: DictConfig, rules: Sequence[tuple], word: str) -> None:
    """What does not go with a word."""
    for key, refused, why in rules:
        if holds(refused, value := OmegaConf.select(cfg, key)):
            told = f"{key}={'null' if value is None else value}"
            raise UserError(f"{told} does not go with {word}: {why}")


def _declared(cfg: DictConfig, key: str) -> bool:
    """Whether the configuration has the key, also where its value must be given (???)."""
    above, _, last = key.rpartition(".")
    parent = OmegaConf.select(cfg, above) if above else cfg
    return isinstance(parent, DictConfig) and last in parent.keys()  # noqa: SIM118 (skips ???)
