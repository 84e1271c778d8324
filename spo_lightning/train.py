"""Train one run: ``python -m spo_lightning.train [group=option] [key=value]``; ``-m`` for several.

``train(cfg, run_dir)`` does the same from a notebook or a test and returns the numbers.
"""

import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs, studies

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def main() -> None:
    command.run("train", work, together=True)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> Any:
    """One job of the command: refuse bad input, then train; what a search maximises, or all."""
    from omegaconf import OmegaConf

    from spo_lightning.records.resume import resumed
    from spo_lightning.report.build import attempted
    from spo_lightning.run.processes import refuse_sweep

    knobs.check(cfg, line)
    if line.several:
        refuse_sweep()
    choices = line.choices
    if cfg.ckpt_path is not None:
        cfg, choices = resumed(cfg, run_dir, line.touched, line.choices)
    numbers = train(cfg, run_dir, choices)
    # a run that goes on may be older than its report
    paged = studies.heeds(cfg, "report.enabled")
    if paged and OmegaConf.select(cfg, "report.enabled", default=True):
        log.info("%s", attempted(Path(run_dir)))
    if cfg.sweep.objective is None:
        return numbers
    from spo_lightning.sweep.objective import score

    return score(numbers, **cfg.sweep.objective)


def train(
    cfg: "DictConfig", run_dir: Path, choices: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Run everything, in as many processes as the config or the outside asks for, and return what
    metrics.json holds."""
    from spo_lightning.run import processes, training

    walked = partial(training.train, cfg, Path(run_dir).absolute(), choices or {})
    return processes.together(walked, cfg.hardware)


if __name__ == "__main__":
    main()
