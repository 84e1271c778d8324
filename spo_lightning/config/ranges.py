"""What a key's value must be, wherever a command has that key; ``knobs.py`` refuses the rest."""

import math
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, ListConfig

from spo_lightning.errors import UserError

FORMS = "a directory, .gguf file, pkg://NAME or hub id"
CHECKPOINTS = ("model.pretrained", "model.reference", "model.base", "base", "reference")
# what may ask an endpoint
ASKING = ("judge", "judge.engine", "engine", "roles.base", "roles.optimizer")
DIAGNOSTICS = (
    *("displacement", "evolution", "geometry", "ches", "overoptimisation", "quality", "probes"),
)
# of experiment=guided_design
NETS, ENDS = ("denoiser", "classifier", "surrogate"), ("first", "last")
# a key, or those below it, that has no effect while the other one is null
NEEDS = (
    *((f"model.{key}", "model.pretrained") for key in ("revision", "trust_remote_code")),
    ("model.sync.", "model.reference_sync"),
    ("checkpoint.mode", "checkpoint.monitor"),
    *((key, "system_prompt") for key in ("system_turn", "examples", "retrieval")),
    *((key, "examples.path") for key in ("examples.count", "retrieval", "bank", "revise")),
)
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
    "loss.label_smoothing": (lambda v: 0 <= v < 0.5, "at least 0 and below 0.5"),
    "loss.tau": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "loss.ld_alpha": (lambda v: 0 <= v <= 1, "at least 0 and at most 1"),
    **{f"loss.{key}": (lambda v: 0 < v <= 1, "above 0 and at most 1") for key in ("r1", "r2")},
    "loss.similarity": (
        lambda v: v is None or isinstance(v, str),
        "module.function, the directory of an embedding model, or null",
    ),
    "loss.desirable_weight": (lambda v: v is None or v >= 0, "at least 0, or null"),
    "loss.undesirable_weight": (lambda v: v is None or v >= 0, "at least 0, or null"),
    "loss.filtered": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "sft.max_steps": (lambda v: v is None or v >= 0, "at least 0, or null"),
    "sft.batch_size": (lambda v: v >= 1, "at least 1"),
    "sft.lr": (lambda v: v > 0, "above 0"),
    "log.every_n_steps": (lambda v: v >= 1, "at least 1"),
    "eval.every_n_steps": (lambda v: v >= 0, "at least 0"),
    "eval.judge.every_n_steps": (lambda v: v >= 0, "at least 0"),
    "eval.judge.rows": (lambda v: v >= 1, "at least 1"),
    "eval.rival": (lambda v: isinstance(v, str), "start, chosen, a file of answers, or a model"),
    "eval.pairs": (lambda v: v in ("texts", "ids", "off"), "texts, ids or off"),
    "eval.batch_size": (lambda v: v >= 1, "at least 1"),
    "eval.max_new_tokens": (lambda v: v >= 1, "at least 1"),
    "eval.stop": (lambda v: all(isinstance(text, str) and text for text in v), "[TEXT, ...]"),
    "eval.by": (lambda v: v is None or isinstance(v, str), "the name of a column, or null"),
    "eval.prompts": (lambda v: v is None or isinstance(v, str), "a file or hub id, or null"),
    "eval.tasks_path": (lambda v: v is None or isinstance(v, str), "a directory, or null"),
    "eval.tasks": (lambda v: all(isinstance(it, str) and it for it in v), "names, [NAME, ...]"),
    "eval.refusals": (
        lambda v: all(isinstance(it, str) and any(map(str.isalnum, it)) for it in v),
        "how answers begin, each with a letter, [TEXT, ...]",
    ),
    "eval.tasks_limit": (
        lambda v: v is None or (type(v) is int and v >= 1),
        "a whole number, at least 1, or null",
    ),
    "eval.tasks_batch_size": (lambda v: v >= 1, "at least 1"),
    "eval.max_rows": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "checkpoint.every_n_steps": (lambda v: v >= 0, "at least 0"),
    "checkpoint.monitor": (lambda v: v is None or isinstance(v, str), "a number's name, or null"),
    "checkpoint.mode": (lambda v: v in ("min", "max"), "min or max"),
    "optimizer.lr": (lambda v: v >= 0, "at least 0"),
    "optimizer.warmup": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "optimizer.schedule": (
        lambda v: v in ("constant", "linear", "cosine"),
        "constant, linear or cosine",
    ),
    "optimizer.bf16": (
        lambda v: v in ("stochastic", "master", "plain"),
        "stochastic, master or plain",
    ),
    "optimizer.weight_decay": (lambda v: v >= 0, "at least 0"),
    "data.eval_fraction": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "data.chunk_rows": (lambda v: v >= 1, "at least 1"),
    "data.tokens_per_batch": (
        lambda v: v in (None, "auto") or v >= 2,
        "at least 2, auto (as many as fit), or null",
    ),
    "hardware.logits_mib": (lambda v: v >= 1, "at least 1"),
    "data.scored": (lambda v: v in ("assistant", "all"), "assistant or all"),
    "data.on_mismatch": (lambda v: v in ("split", "drop", "error"), "split, drop or error"),
    "data.drop_high_ches": (lambda v: v is None or 0 <= v < 1, "at least 0 and below 1, or null"),
    "cache.max_gb": (lambda v: v > 0, "above 0"),
    "preflight.pilot_steps": (lambda v: v >= 2, "at least 2"),
    "preflight.pilots": (lambda v: v >= 1, "at least 1"),
    "preflight.max_pairs": (lambda v: v >= 2, "at least 2"),
    "plan.prompt": (lambda v: v >= 1, "at least 1"),
    "plan.completion": (lambda v: v >= 2, "at least 2"),
    "plan.pairs": (lambda v: v >= 1, "at least 1"),
    "plan.device_gib": (lambda v: v > 0, "above 0"),
    "plan.rates": (lambda v: v is None or isinstance(v, str), "the path of a bench.json"),
    "steps": (lambda v: v >= 1, "at least 1"),
    "warmup": (lambda v: v >= 1, "at least 1"),
    "repetitions": (lambda v: v >= 1, "at least 1"),
    "only": (lambda v: v is None or isinstance(v, ListConfig), "a list of names, [...], or null"),
    "samples": (lambda v: v >= 2, "at least 2"),
    "temperature": (lambda v: v > 0, "above 0"),
    "top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "loop.rounds": (lambda v: 1 <= v <= 100, "1 to 100"),
    "loop.prompts": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "loop.answers": (lambda v: v >= 1, "at least 1"),
    "loop.beside": (lambda v: v in (0, 1), "0 or 1"),
    "loop.temperature": (lambda v: v > 0, "above 0"),
    "loop.top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "loop.reference": (lambda v: v in ("round", "start"), "round or start"),
    "loop.earlier": (lambda v: v >= 0, "at least 0"),
    "loop.alpha": (lambda v: 0 <= v <= 1, "at least 0 and at most 1"),
    "loop.betas": (lambda v: v is None or isinstance(v, ListConfig), "a list, [...], or null"),
    "loop.lower": (lambda v: v in ("round", "all", "data"), "round, all or data"),
    "resume": (lambda v: v is None or isinstance(v, str), "the directory of a loop or a search"),
    **{
        f"search.{key}": (lambda v: v >= 1, "at least 1")
        for key in ("actions", "beam", "depth", "questions", "shown", "max_tokens")
    },
    "search.temperature": (lambda v: v >= 0, "at least 0"),
    "search.top_p": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "search.enough": (lambda v: v is None or number(v), "a number, or null"),
    "search.again": (lambda v: 0 <= v <= 9, "0 to 9"),
    "budget.calls": (lambda v: v is None or (type(v) is int and v >= 1), "at least 1, or null"),
    "budget.dollars": (lambda v: v is None or (number(v) and v > 0), "above 0, or null"),
    "bank.rounds": (lambda v: v >= 0, "at least 0"),
    "check.rows": (lambda v: v >= 0, "at least 0"),
    "examples.count": (lambda v: v >= 1, "at least 1"),
    "examples.path": (lambda v: v is None or isinstance(v, str), "a file, or null"),
    "system_prompt": (lambda v: v is None or isinstance(v, str), "the file of a prompt, or null"),
    "judge.again": (lambda v: v >= 0, "at least 0"),
    "strategy.keep": (lambda v: v >= 2, "at least 2"),
    "strategy.beta": (lambda v: v >= 0, "at least 0"),
    "prompts.max_rows": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "sweep.parallel": (lambda v: v >= 1, "at least 1"),
    "sweep.objective": (
        lambda v: v is None or {*v} == {"maximise", "keep", "within"},
        "{maximise: NAME, keep: NAME, within: NUMBER}, or null",
    ),
    "judge.tie": (lambda v: v is None or isinstance(v, str), "a word, or null"),
    "judge.system": (lambda v: v is None or isinstance(v, str), "a text, or null"),
    "judge.max_tokens": (lambda v: v >= 1, "at least 1"),
    **{f"{group}.timeout": (lambda v: v > 0, "above 0") for group in ASKING},
    **{f"{group}.retries": (lambda v: v >= 0, "at least 0") for group in ASKING},
    **{f"{group}.concurrency": (lambda v: v >= 1, "at least 1") for group in ASKING},
    **{
        f"{group}.requests_per_minute": (lambda v: v is None or v > 0, "above 0, or null")
        for group in ASKING
    },
    "strategy.most": (lambda v: v >= 1, "at least 1"),
    "sweep.table": (lambda v: v is None or isinstance(v, str), "the path of a csv file"),
    "sweep.numbers": (lambda v: all(isinstance(name, str) for name in v), "a list of names"),
    "sweep.resume": (lambda v: v is None or isinstance(v, str), "the directory of a sweep"),
    "ckpt_path": (lambda v: v is None or isinstance(v, str), "last, or the path of a checkpoint"),
    "model.reference_sync": (lambda v: v in (None, "soft", "hard"), "soft, hard or null"),
    "model.sync.alpha": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
    "model.sync.every_n_steps": (lambda v: v >= 1, "at least 1"),
    "model.sync.value": (lambda v: v in ("start", "moving"), "start or moving"),
    "model.quantize": (lambda v: v in (None, "nf4", "int8"), "nf4, int8 or null"),
    "model.file_gb": (lambda v: v > 0, "above 0"),
    "model.lora.rank": (lambda v: v >= 0, "at least 0"),
    "model.surrogate.scale": (lambda v: v > 0, "above 0"),
    "model.surrogate.draws": (lambda v: v >= 1, "at least 1"),
    "model.surrogate.eval_draws": (lambda v: v >= 1, "at least 1"),
    "model.weighting.gamma": (lambda v: v > 0, "above 0"),
    "model.sampling.steps": (lambda v: v >= 1, "at least 1"),
    "model.sampling.guidance": (lambda v: v >= 1, "at least 1"),
    "model.lora.alpha": (lambda v: v > 0, "above 0"),
    **{key: (lambda v: v is None or isinstance(v, str), FORMS) for key in CHECKPOINTS},
    "hardware.devices": (lambda v: v >= 1, "at least 1"),
    "hardware.strategy": (lambda v: v in ("auto", "ddp", "fsdp"), "auto or ddp; hardware=fsdp"),
    "hardware.sharding.copies": (lambda v: v >= 1, "at least 1"),
    "hardware.threads": (lambda v: v is None or v >= 1, "at least 1, or null"),
    "hardware.precision": (
        lambda v: v in ("32-true", "bf16-mixed", "bf16-true", "64-true"),
        "32-true, bf16-mixed, bf16-true or 64-true (fp16 needs loss scaling, which fights "
        "clipping and several gradients per step)",
    ),
    **{f"diagnostics.{d}.every_n_steps": (lambda v: v >= 0, "at least 0") for d in DIAGNOSTICS},
    "problem.name": (lambda v: isinstance(v, str), "a name"),
    **{
        f"problem.{key}": (
            lambda v: v is None or (type(v) is int and v >= 2),
            "at least 2, or null",
        )
        for key in ("variables", "objectives")
    },
    "problem.generations": (lambda v: v >= 1, "at least 1"),
    "problem.amateur": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "study.data.rows": (lambda v: v >= 10, "at least 10"),
    "study.data.left_out": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "study.data.population": (lambda v: v >= 4, "at least 4"),
    "study.data.held_out": (lambda v: 0 < v < 1, "above 0 and below 1"),
    "study.schedule.times": (lambda v: v >= 2, "at least 2"),
    **{f"study.schedule.{end}": (lambda v: 0 < v < 1, "above 0 and below 1") for end in ENDS},
    **{
        f"study.{net}.{key}": (lambda v: v >= 1, "at least 1")
        for net in NETS
        for key in ("depth", "steps", "batch_size")
    },
    **{f"study.{net}.width": (lambda v: v >= 4, "at least 4") for net in NETS},
    **{f"study.{net}.lr": (lambda v: v > 0, "above 0") for net in NETS},
    **{f"study.{net}.weight_decay": (lambda v: v >= 0, "at least 0") for net in NETS},
    "study.threshold": (lambda v: v >= 0, "at least 0"),
    "study.generations": (lambda v: v >= 1, "at least 1"),
    "study.guidance.weight": (lambda v: v >= 0, "at least 0"),
    "study.guidance.weights": (lambda v: all(w >= 0 for w in v), "a list of numbers, at least 0"),
    "study.guidance.samples": (lambda v: v >= 4, "at least 4"),
    "study.guidance.clamp_every": (lambda v: v >= 1, "at least 1"),
    "study.reference": (lambda v: v > 0, "above 0"),
    "diagnostics.displacement.share": (lambda v: 0 <= v < 1, "at least 0 and below 1"),
    "diagnostics.displacement.tolerance": (lambda v: v >= 0, "at least 0"),
    "diagnostics.displacement.window": (lambda v: v >= 1, "at least 1"),
    "diagnostics.overoptimisation.entropy_tolerance": (lambda v: v >= 0, "at least 0"),
    "diagnostics.overoptimisation.mass_tolerance": (lambda v: v >= 0, "at least 0"),
    "diagnostics.overoptimisation.patience": (lambda v: v >= 1, "at least 1"),
    "diagnostics.probes.rows": (lambda v: v >= 2, "at least 2"),
    "diagnostics.probes.share": (lambda v: 0 < v <= 1, "above 0 and at most 1"),
}


def holds(rule: Callable[[Any], bool], value: Any) -> bool:
    try:
        return rule(value)
    except TypeError:
        return False


def check_kind(key: str, value: Any, default: Any) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{key}={value}: it must be finite")
    if value is None and key in RANGES and holds(RANGES[key][0], None):
        return
    for kind, accepts, words in KINDS:
        if isinstance(default, kind):
            if value is not None and not accepts(value):
                raise UserError(f"{key}={value}: it must be {words}")
            if value is None and kind is not int and kind is not float:
                raise UserError(f"{key}=null: it must be {words}")
            return


def number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


# the default's kind, what is accepted for it, in words; bool first, because True is an int
KINDS: list[tuple[type, Callable[[Any], bool], str]] = [
    (bool, lambda v: isinstance(v, bool), "true or false"),
    (int, lambda v: isinstance(v, int) and not isinstance(v, bool), "a whole number"),
    (float, number, "a number"),
    (str, lambda v: isinstance(v, (str, ListConfig)), "text"),
    (DictConfig, lambda v: isinstance(v, DictConfig), "settings, key by key"),
    (ListConfig, lambda v: isinstance(v, ListConfig), "a list, [...]"),
]
