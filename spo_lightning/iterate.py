"""Rounds: ``python -m spo_lightning.iterate loop=NAME ...``; ``resume=DIR`` goes on with one."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    command.run("iterate", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Refuse bad input, then walk the rounds; what loop.json holds."""
    from spo_lightning.rounds.asked import refuse

    knobs.check(cfg, line)
    refuse(cfg, line)
    from spo_lightning.rounds.loop import iterate
    from spo_lightning.run import processes

    words = command.begun_with(line.several)
    walked = partial(iterate, cfg, Path(run_dir).absolute(), line.choices, words)
    return processes.together(walked, cfg.hardware)


if __name__ == "__main__":
    main()
