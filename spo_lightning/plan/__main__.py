"""Reckon before running: ``python -m spo_lightning.plan model=... solver=...``."""

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs
from spo_lightning.errors import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from spo_lightning.plan.sums import Planned, Run

RATES = ("matrices", "attention", "optimizer")
GIB, TITLE = 2**30, "GiB on a device"
NONE = "No single change makes it fit: take two, or a smaller model"

log = logging.getLogger(__name__)


def main() -> None:
    command.run("plan", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Refuse bad input, add up, say it, write plan.json; what the json holds."""
    knobs.check(cfg, line)
    refuse(cfg)
    rates = rates_of(cfg.plan.rates)
    from spo_lightning.plan.changes import changes
    from spo_lightning.plan.sums import planned, run_of, seconds
    from spo_lightning.records.disk import write_text
    from spo_lightning.records.progress import quiet

    quiet()
    run = run_of(cfg)
    plan, room = planned(run), cfg.plan.device_gib * GIB
    found: dict[str, Any] = {"stages": plan.stages, "peak": plan.peak, "disk": plan.disk}
    found |= {"products": plan.products, "attended": plan.attended, "fits": plan.peak <= room}
    if rates is not None:
        step = seconds(plan, rates)
        found |= {"seconds_per_step": step, "seconds": step * steps(cfg)}
    if not found["fits"]:
        found["changes"] = changes(run, room)
    write_text(run_dir / "plan.json", json.dumps(found, indent=1) + "\n")
    log.info("%s\n\nNumbers: %s", told(run, plan, found), run_dir / "plan.json")
    return found


def steps(cfg: "DictConfig") -> int:
    """Outer steps of the run."""
    return cfg.max_steps if cfg.max_steps >= 0 else cfg.epochs * cfg.plan.pairs // cfg.batch_size


def told(run: "Run", plan: "Planned", found: dict[str, Any]) -> str:
    """The tables, and what follows from them."""
    from spo_lightning.bench.output import table

    cfg, size = run.cfg, run.shape.size
    rows = [
        {
            "GiB on a device": kind,
            **{name: _gib(stage[kind]) for name, stage in plan.stages.items()},
        }
        for kind in plan.device
        if any(stage[kind] for stage in plan.stages.values())
    ]
    whole = {name: _gib(sum(stage.values())) for name, stage in plan.stages.items()}
    rows.append({TITLE: "all", **whole})
    fits = "fits" if found["fits"] else "does not fit"
    lines = [
        f"{cfg.model.pretrained or cfg.model.config.model_type}: {size.weights / 1e9:.3f} billion "
        f"weights, {size.trained / 1e9:.3f} of them or of adapters trained; devices: "
        f"{cfg.hardware.devices}, pairs of a step on each: {run.own}, at once: {run.micro}, of "
        f"{cfg.plan.prompt} + {cfg.plan.completion} tokens",
        *("", table(rows), ""),
        f"At the peak, in {plan.fullest}: {_gib(plan.peak)} GiB of {cfg.plan.device_gib}: {fits}",
    ]
    if not found["fits"]:
        changes = [f"  {words}: {_gib(peak)} GiB" for words, peak in found["changes"].items()]
        lines += ["One of these makes it fit:", *changes] if changes else [NONE]
    disk = [{"GiB on the disk": kind, "": _gib(held)} for kind, held in plan.disk.items()]
    lines += ["", table(disk), ""]
    if "seconds" in found:
        step, whole = found["seconds_per_step"], found["seconds"] / 3600
        lines.append(f"{step:.2f} s a step, {whole:.2f} hours for {steps(cfg)} steps of training")
    else:
        lines.append("Time: not known without plan.rates, which bench what=rates writes")
    return "\n".join(lines)


def _gib(held: float) -> str:
    return f"{held / GIB:.2f}"


def refuse(cfg: "DictConfig") -> None:
    """What is not reckoned with, before anything is read."""
    if cfg.study is not None or cfg.loss.get("rewards") or cfg.loss.get("template"):
        raise UserError("plan reckons with losses on pairs of answers alone: choose another loss")
    if cfg.max_steps == 0:
        raise UserError("max_steps=0: nothing would be trained, so nothing is planned")
    if cfg.plan.prompt + cfg.plan.completion > cfg.max_length:
        raise UserError(
            f"plan.prompt + plan.completion is more than max_length={cfg.max_length}, where it "
            "would be cut: lower one, or raise max_length"
        )
    if cfg.hardware.devices > cfg.batch_size:
        raise UserError(
            f"batch_size={cfg.batch_size} gives no pair to some of the {cfg.hardware.devices} "
            "devices: raise it"
        )
    from omegaconf import OmegaConf

    if OmegaConf.select(cfg, "hardware.sharding.offload"):
        raise UserError(
            "hardware.sharding.offload: what the host holds is not planned; leave it out"
        )
    if cfg.hardware.strategy == "fsdp" and cfg.model.get("quantize"):
        raise UserError(
            "hardware=fsdp: quantised weights are bytes that no process can have a part of: take "
            "hardware=ddp, or weights in full"
        )


def rates_of(path: str | None) -> dict[str, float] | None:
    if path is None:
        return None
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))["rates"]
        return {name: float(found[name]) for name in RATES}
    except (OSError, ValueError, KeyError, TypeError) as error:
        told = "a bench.json of bench what=rates"
        raise UserError(f"plan.rates={path} is not {told}: {error}") from error


if __name__ == "__main__":
    main()
