"""A configuration in; out comes nothing, or one line that refuses what a search cannot be."""

from typing import TYPE_CHECKING

from spo_lightning.config.apart import Only, check_only
from spo_lightning.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

ONLY: Only = [
    ("data.stream", (None, False), "a search asks single prompts: leave it out"),
    ("data.system", (None,), "start is the system prompt: leave it out"),
    ("data.chat", (None, False), "system_turn says how a prompt is asked: leave it out"),
    ("hardware.devices", (1,), "a search runs in one process: leave it out"),
]
# who is asked; the last one where the judge is a model that reads
ROLES = ("roles.base", "roles.optimizer", "judge.engine")
# what must stand in a text, in braces
NAMES = {"rewrite": ("history", "cases"), "revise": ("cases",)}


def refuse(cfg: "DictConfig") -> None:
    """Before anything is read."""
    from omegaconf import OmegaConf

    check_only(cfg, ONLY, "a search")
    for key, names in NAMES.items():
        for name in (name for name in names if f"{{{name}}}" not in cfg[key]):
            raise UserError(f"{key} has no {{{name}}}: it must hold each of {names}")
    _refuse_roles(cfg, {role: OmegaConf.select(cfg, role) for role in ROLES})


def _refuse_roles(cfg: "DictConfig", nodes: dict[str, "DictConfig | None"]) -> None:
    priced = False
    for role, node in nodes.items():
        if node is None:
            continue
        if node.model is None:
            raise UserError(
                f"{role}.model=null: name who answers: a directory, .gguf file, pkg://NAME or hub "
                f"id, or an endpoint (engine@{role}=openai)"
            )
        priced |= bool(node.get("dollars_read") or node.get("dollars_written"))
    if cfg.budget.dollars is not None and not priced:
        raise UserError(
            f"budget.dollars={cfg.budget.dollars} has no effect: no role has a price: set "
            "dollars_read and dollars_written of roles.base, roles.optimizer or judge.engine"
        )
