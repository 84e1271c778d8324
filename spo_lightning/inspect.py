"""What the data becomes: ``python -m spo_lightning.inspect data=... model=...``."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs


def main() -> None:
    command.run("inspect", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> str:
    """Print what became of the rows, and write it as a page; returns what is printed."""
    knobs.check(cfg, line)
    from spo_lightning.records import terminal
    from spo_lightning.run.inspection import inspect

    found = inspect(cfg)

    from spo_lightning.data.page import page
    from spo_lightning.report import data_page
    from spo_lightning.report.page import visible

    text = visible(page(found))  # what a row holds must not command the terminal
    print(text)
    print(f"Page: {data_page.write(asdict(found), Path(cfg.output).expanduser())}")
    terminal.check()
    return text


if __name__ == "__main__":
    main()
