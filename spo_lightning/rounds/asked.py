"""A configuration in; out comes nothing, or one line that refuses what a loop cannot be."""

from typing import TYPE_CHECKING

from spo_lightning.config.apart import Only, check_only
from spo_lightning.config.knobs import Given
from spo_lightning.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

ONLY: Only = [
    ("data.stream", (None, False), "a round asks all prompts: leave it out"),
    ("data.pairs", (None,), "a loop makes its pairs: leave it out"),
    ("study", (None,), "an experiment without a model has no answers: leave it out"),
    ("ckpt_path", (None,), "a loop goes on with resume=DIR: leave it out"),
    ("hardware.devices", (1,), "a loop runs in one process: leave it out"),
    ("model.reference", (None,), "loop.reference names it: leave it out"),
    ("engine.base_url", (None,), "a round's answers are its own policy's: leave engine out"),
    ("loss.rewards", (None, False), "what gives rewards writes no answers: take another loss"),
    ("loss.template", (None,), "a ranker writes no answers: take another loss"),
]


def refuse(cfg: "DictConfig", line: Given) -> None:
    """Before anything is read."""
    check_only(cfg, ONLY, "a loop")
    if cfg.max_steps == 0:
        raise UserError("max_steps=0: no round would train anything")
    if cfg.model.lora.rank and not cfg.model.lora.merge:
        raise UserError(
            "model.lora.rank: each round stands on the weights of the last one: set "
            "model.lora.merge=true"
        )
    if cfg.model.reference_sync and cfg.loop.reference == "start":
        raise UserError(
            "model.reference_sync moves a round's own start: leave it out, or loop.reference=round"
        )
    _refuse_idle(cfg, line)
    if cfg.loop.betas is not None:
        _refuse_betas(cfg, line)
    _refuse_counts(cfg)


def _refuse_counts(cfg: "DictConfig") -> None:
    loop, keep = cfg.loop, cfg.strategy.get("keep")
    if keep is not None and keep > loop.answers + loop.beside:
        raise UserError(f"strategy.keep={keep} of loop.answers={loop.answers}: draw more answers")
    part = cfg.loss.get("parts", {}).get("xpo", {"weight": 0})
    turns_away = str(cfg.loss._target_).endswith(".xpo") or part["weight"]
    if turns_away and (loop.reference != "start" or not loop.beside):
        raise UserError("loss=xpo turns away from what the loop's start answers: take loop=xpo")
    if loop.alpha and cfg.model.pretrained is not None:
        from spo_lightning.models.sources import check

        if check(cfg.model.pretrained).adapters:
            raise UserError(
                f"loop.alpha={loop.alpha} is of whole weights, and {cfg.model.pretrained} holds "
                "adapters: export it merged, or set loop.alpha=0"
            )


def _refuse_idle(cfg: "DictConfig", line: Given) -> None:
    loop = cfg.loop
    if not loop.pairs._target_.endswith(".judged.pairs"):
        for key in line.touched:
            if key.split(".")[0] == "strategy":
                raise UserError(f"{key} has no effect: this loop chooses without a judge")
        if loop.beside:
            raise UserError("loop.beside has no effect: this loop chooses without a judge")
    if loop.lower != "round" and str(cfg.solver._target_).endswith("NoLower"):
        raise UserError(f"loop.lower={loop.lower} has no effect: solver=none has no lower level")
    if cfg.data.get("sft") is not None and loop.lower != "data":
        raise UserError(f"data.sft has no effect: loop.lower is {loop.lower}; make it data")


def _refuse_betas(cfg: "DictConfig", line: Given) -> None:
    betas, rounds = list(cfg.loop.betas), cfg.loop.rounds
    if "loss.beta" in line.touched:
        raise UserError("loss.beta has no effect: loop.betas has one for each round; set it null")
    if any(isinstance(beta, bool) or not isinstance(beta, int | float) for beta in betas):
        raise UserError(f"loop.betas={betas}: give numbers above 0")
    if len(betas) < rounds or min(betas) <= 0:
        raise UserError(f"loop.betas={betas}: give {rounds} numbers above 0, one for each round")
