"""What the data becomes: ``python -m spo_lightning.inspect data=... model=...``."""

from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs


def main() -> None:
    command.run("inspect", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> str:
    """Print counts, length histograms and one rendered pair; returns the page."""
    knobs.check(cfg, line)
    from spo_lightning.records import terminal
    from spo_lightning.run.inspection import inspect

    text = inspect(cfg)
    print(text)
    terminal.check()  # it has no other product
    return text


if __name__ == "__main__":
    main()
