"""The ``logger`` config in, Lightning loggers out: W&B and TensorBoard besides metrics.csv."""

import logging
import netrc
import os
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)


def has_login() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def wandb(
    *,
    project: str,
    name: str | None,
    group: str | None,
    tags: list[str],
    mode: str | None,
    run_dir: Path,
    config: dict[str, Any],
) -> Any:
    """Offline without a login, and never a prompt."""
    from lightning.pytorch.loggers import WandbLogger

    mode = mode or os.environ.get("WANDB_MODE") or ("online" if has_login() else "offline")
    if mode == "offline":
        log.info("W&B is offline: `wandb sync %s/wandb/offline-run-*` uploads the run", run_dir)
    os.environ.setdefault("WANDB_SILENT", "true")
    return WandbLogger(
        project=project,
        name=name or run_dir.name,
        group=group,
        tags=list(tags),
        save_dir=run_dir,
        config=config,
        mode=mode,  # type: ignore[arg-type]
    )


def tensorboard(*, run_dir: Path, config: dict[str, Any]) -> Any:
    """Event files under <run directory>/tensorboard."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from spo_lightning.errors import UserError

    try:
        return TensorBoardLogger(save_dir=run_dir, name="tensorboard", version="")
    except ModuleNotFoundError as error:
        raise UserError(
            "logger=tensorboard needs tensorboard: pip install 'spo-lightning[tensorboard]'"
        ) from error
