"""Preference data from any causal LM and any judge: ``python -m spo_lightning.sample``."""

from functools import partial
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs


def main() -> None:
    command.run("sample", work, together=True)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> dict[str, int]:
    """Draw answers, score them, write the pairs; counts of prompts, samples and pairs."""
    knobs.check(cfg, line)
    from spo_lightning.run import processes, sampling

    return processes.together(partial(sampling.sample, cfg), cfg.hardware)


if __name__ == "__main__":
    main()
