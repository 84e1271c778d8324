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

    ahead = looked_ahead(cfg.preflight)
    found = inspect(cfg)

    from spo_lightning.data.page import page
    from spo_lightning.report import data_page
    from spo_lightning.report.page import visible

    text = visible(page(found))  # what a row holds must not command the terminal
    print(text)
    print(f"Page: {data_page.write(asdict(found), Path(cfg.output).expanduser(), ahead)}")
    terminal.check()
    return text


def looked_ahead(directory: str | None) -> Any:
    """The sections of its page."""
    if directory is None:
        return []
    import json

    from spo_lightning.errors import UserError
    from spo_lightning.preflight.page import sections

    path = Path(directory).expanduser() / "preflight.json"
    try:
        return sections(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"preflight={directory}: {path.name} is not to be read there "
            f"({type(error).__name__}): name the directory of a preflight that ended"
        ) from error


if __name__ == "__main__":
    main()
