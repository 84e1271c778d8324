"""A checkpoint, written as others read it: ``python -m spo_lightning.export checkpoint=DIR``."""

import logging
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs

log = logging.getLogger(__name__)


def main() -> None:
    command.run("export", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> Path:
    """Write ``checkpoint`` to ``output``, adapters merged; returns where that is."""
    knobs.check(cfg, line)
    from spo_lightning.run.export import export

    written = export(cfg)
    log.info("Written to %s", written)
    return written


if __name__ == "__main__":
    main()
