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

RATES = ("matrices", "attention", "optimizer")

log = logging.getLogger(__name__)


def main() -> None:
    command.run("plan", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Refuse bad input, add up, say it, write plan.json; what the json holds."""
    knobs.check(cfg, line)
    _refuse(cfg)
    rates = _rates(cfg.plan.rates)
    from spo_lightning.plan import sums
    from spo_lightning.records.disk import write_text
    from spo_lightning.records.progress import quiet

    quiet()
    plan, room = sums.planned(cfg), cfg.plan.device_gib * sums.GIB
    found: dict[str, Any] = {"device": plan.device, "peak": plan.peak, "disk": plan.disk}
    found |= {"products": plan.products, "attended": plan.attended, "fits": plan.peak <= room}
    if rates is not None:
        step = sums.seconds(plan, rates)
        found |= {"seconds_per_step": step, "seconds": step * steps(cfg)}
    if not found["fits"]:
        found["changes"] = dict(sums.changes(cfg, room))
    write_text(run_dir / "plan.json", json.dumps(found, indent=1) + "\n")
    log.info("%s\nNumbers: %s", told(cfg, found), run_dir / "plan.json")
    return found


def steps(cfg: "DictConfig") -> int:
    """Outer steps of the run."""
    return cfg.max_steps if cfg.max_steps >= 0 else cfg.epochs * cfg.plan.pairs // cfg.batch_size


def told(cfg: "DictConfig", found: dict[str, Any]) -> str:
    """The table, and what follows from it."""
    gib = 2**30
    name = cfg.model.pretrained or cfg.model.config.model_type
    lines = [f"{name} on each of {cfg.hardware.devices} device(s), GiB at the peak", ""]
    lines += [f"{kind:<14}{size / gib:>10.2f}" for kind, size in found["device"].items()]
    fits = "fits" if found["fits"] else "does not fit"
    lines += [f"{'all':<14}{found['peak'] / gib:>10.2f}  of {cfg.plan.device_gib}: {fits}", ""]
    lines += ["on the disk, GiB", ""]
    lines += [f"{kind:<14}{size / gib:>10.2f}" for kind, size in found["disk"].items()]
    if "seconds" in found:
        step, whole = found["seconds_per_step"], found["seconds"] / 3600
        lines += ["", f"{step:.2f} s a step, {whole:.2f} hours for {steps(cfg)} steps of training"]
    else:
        lines += ["", "time: not known without plan.rates, which bench what=rates writes"]
    fitting = [(words, peak) for words, peak in found.get("changes", {}).items()
               if peak <= cfg.plan.device_gib * gib]  # fmt: skip
    if not found["fits"]:
        lines += ["", "one of these makes it fit:" if fitting else "no single change makes it fit"]
        lines += [f"  {words}: {peak / gib:.2f} GiB" for words, peak in fitting]
    return "\n".join(lines)


def _refuse(cfg: "DictConfig") -> None:
    if cfg.study is not None or cfg.loss.get("rewards") or cfg.loss.get("template"):
        raise UserError("plan reckons with losses on pairs of answers alone: choose another loss")
    for key in ("prompt", "completion", "pairs", "device_gib", "shards"):
        if not cfg.plan[key] > 0:
            raise UserError(f"plan.{key}={cfg.plan[key]}: it must be above 0")
    if cfg.plan.prompt + cfg.plan.completion > cfg.max_length:
        raise UserError(
            f"plan.prompt + plan.completion is more than max_length={cfg.max_length}, where it "
            "would be cut: lower one, or raise max_length"
        )


def _rates(path: str | None) -> dict[str, float] | None:
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
