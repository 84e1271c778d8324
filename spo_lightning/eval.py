"""Held-out numbers of a causal LM: ``python -m spo_lightning.eval checkpoint=DIR data=...``."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs

log = logging.getLogger(__name__)


def main() -> None:
    command.run("eval", work, together=True)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Measure what metrics.json of a run holds under ``final``; writes and returns it.

    Rewards, displacement and win_rate compare with ``reference``, and so do pairs that the data
    samples from a policy: without one they are left out.
    """
    knobs.check(cfg, line)
    from spo_lightning.records.directory import write_text
    from spo_lightning.records.summary import flat
    from spo_lightning.run import evaluation, processes

    numbers = processes.together(partial(evaluation.evaluate, cfg), cfg.hardware)
    write_text(Path(cfg.output), json.dumps(numbers, indent=1) + "\n")
    for name, value in flat(numbers).items():
        log.info("%-28s%12.4f", name, value)
    log.info("Written to %s", Path(cfg.output).absolute())
    return numbers


if __name__ == "__main__":
    main()
