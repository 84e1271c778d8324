"""Look ahead: ``python -m spo_lightning.preflight data=... model=... loss=...``."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from spo_lightning import command
from spo_lightning.config import knobs

if TYPE_CHECKING:
    from omegaconf import DictConfig

log = logging.getLogger(__name__)


def main() -> None:
    command.run("preflight", work)


def work(cfg: "DictConfig", run_dir: Path, line: knobs.Given) -> dict:
    """Refuse bad input, look ahead, write preflight.json and the page; what the json holds."""
    from spo_lightning.errors import UserError
    from spo_lightning.preflight.asked import refuse

    knobs.check(cfg, line)
    refuse(cfg)
    from spo_lightning.preflight import page
    from spo_lightning.preflight.look import look
    from spo_lightning.records.disk import write_text
    from spo_lightning.records.lock import held
    from spo_lightning.report.page import numbered

    with held(run_dir):  # two sweeps that begin within a second are given the same directories
        if (run_dir / "preflight.json").exists():
            raise UserError(f"{run_dir} holds a preflight: take another hydra.run.dir")
        found = asdict(look(cfg))
        write_text(run_dir / "preflight.json", json.dumps(numbered(found), indent=1) + "\n")
        write_text(run_dir / "preflight.html", page.whole(found))
    log.info("%s\nPage: %s", found["advice"], run_dir / "preflight.html")
    return found


if __name__ == "__main__":
    main()
