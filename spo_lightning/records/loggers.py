"""The ``logger`` config in, Lightning loggers out: W&B and TensorBoard besides metrics.csv."""

import json
import logging
import math
import netrc
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from spo_lightning.records.directory import choices_of, without_secrets

log = logging.getLogger(__name__)

TAGGED = ("data", "model", "loss", "solver")  # groups whose options are tags of a run
PLACE = "wandb"  # the run directory's folder of W&B
LOGGED = "logged.json"  # in it: the run's id and the last step that was logged
SWEEP = ("sweep.json", "multirun.yaml")  # a sweep's directory holds one of them


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
    job_type: str,
    tags: list[str],
    mode: str | None,
    run_dir: Path,
    config: dict[str, Any],
) -> Any:
    """Offline without a login, and never a prompt. A run that goes on keeps its id."""
    from wandb import Settings

    from spo_lightning.records.wandb_logger import StepwiseLogger

    mode = mode or os.environ.get("WANDB_MODE") or ("online" if has_login() else "offline")
    before = _read(run_dir)
    if mode == "offline":
        # those of tries before this one, then whatever this one makes
        earlier = sorted(map(str, (run_dir / PLACE).glob("offline-run-*")))
        folders = " ".join([*earlier, f"{run_dir}/{PLACE}/offline-run-*"])
        log.info("W&B is offline: `wandb sync %s` uploads the run", folders)
    os.environ.setdefault("WANDB_SILENT", "true")
    number = before.get("id") or os.environ.get("WANDB_RUN_ID") or os.urandom(4).hex()
    options = choices_of(run_dir / "config.yaml")
    return StepwiseLogger(
        last=before.get("step", -1),
        record=run_dir / PLACE / LOGGED,
        **without_secrets(
            {
                "project": project,
                "name": name or run_dir.name,
                "group": group or _sweep_of(run_dir),
                "job_type": job_type,
                "tags": [*tags, *(f"{key}:{options[key]}" for key in TAGGED if key in options)],
            }
        ),
        save_dir=run_dir,
        config=config,
        mode=mode,
        id=number,
        resume="allow" if mode == "online" else None,
        # the command line may hold a secret, and no file of ours does
        settings=Settings(x_disable_meta=True, console="off", disable_git=True, save_code=False),
    )


def _read(run_dir: Path) -> dict[str, Any]:
    """The id of a run that goes on and its last logged step."""
    try:
        return json.loads((run_dir / PLACE / LOGGED).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def _sweep_of(run_dir: Path) -> str | None:
    """The name of the sweep that the run is a job of."""
    for parent in run_dir.absolute().parents[:3]:
        if any((parent / name).is_file() for name in SWEEP):
            return parent.name
    return None


def tell(run_dir: Path, numbers: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """What a run came to, where W&B watches it: summary numbers, a table of the samples, the
    change of log pi(y_w) of every held-out pair as a histogram, a drawing policy's grids."""
    run = _open_run(run_dir)
    if run is None:
        return
    import wandb

    for when in ("init", "final"):
        for name, value in (numbers.get(when) or {}).items():
            run.summary[f"{when}/{name}"] = value
    for name, change in numbers.get("paired", {}).items():
        run.summary[f"paired/{name}"] = change
    columns: list[Any] = list(samples[0]) if samples else []
    logged: dict[str, Any] = {}
    if columns:
        rows: list[Any] = [[row.get(name) for name in columns] for row in samples]
        logged["samples"] = wandb.Table(columns=columns, data=rows)
    moved = [row.get("chosen_delta") for row in samples]
    finite = [value for value in moved if value is not None and math.isfinite(value)]
    if finite:
        logged["displacement/pairs"] = wandb.Histogram(finite)
    grids = sorted(run_dir.glob("*.png"))
    logged |= {f"images/{file.stem}": wandb.Image(str(file)) for file in grids}
    if logged:
        run.log(logged)


def close(run_dir: Path, code: int) -> None:
    """End the directory's run of W&B, if one is open, with a code that says whether it failed."""
    run = _open_run(run_dir)
    if run is not None:
        run.finish(exit_code=code)


def _open_run(run_dir: Path) -> Any:
    """The run that we began: a notebook may have one of its own."""
    run = getattr(sys.modules.get("wandb"), "run", None)
    return run if run is not None and run.id == _read(run_dir).get("id") else None


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
