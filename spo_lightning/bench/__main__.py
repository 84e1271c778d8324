"""Measure time and memory: ``python -m spo_lightning.bench [what=option] [key=value]``.

``conf/what`` has an option per question; each names the function that answers it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    command.run("bench", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Refuse bad input, then measure; returns bench.json."""
    from spo_lightning.errors import UserError

    knobs.check(cfg, line)
    if cfg.hardware.devices != 1:
        raise UserError("hardware.devices: costs are measured on one device; leave it out")
    if (run_dir / "bench.json").exists():
        raise UserError(f"{run_dir} holds a benchmark: take another hydra.run.dir")
    import hydra.utils

    measure = hydra.utils.get_method(cfg.what._target_)
    return measure(cfg, run_dir, line)


if __name__ == "__main__":
    main()
