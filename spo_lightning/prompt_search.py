"""Alignment without training: ``python -m spo_lightning.prompt_search ...``; ``resume=DIR`` goes
on with a search."""

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning import command
from spo_lightning.config import knobs

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    command.run("prompt_search", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Refuse bad input, then search; what tree.json holds."""
    from spo_lightning.prompting.asked import refuse

    knobs.check(cfg, line)
    refuse(cfg)
    from spo_lightning.prompting.found import find
    from spo_lightning.run import processes

    words = command.begun_with(line.several)
    searched = partial(find, cfg, Path(run_dir).absolute(), line.choices, words)
    return processes.together(searched, cfg.hardware)


if __name__ == "__main__":
    main()
