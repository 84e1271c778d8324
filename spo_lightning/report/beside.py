"""A command of directories: what it finds is printed as a table, and written as a page."""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from spo_lightning.errors import UserError

Report = Callable[[Sequence[Path], Path], str]  # directories and where to write; the table


def main(name: str, about: str | None, dirs: str, report: Report) -> None:
    """``spo-name DIR... [--output name]``; ``dirs`` says what the directories hold."""
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(f"spo-{name}", description=about, formatter_class=how)
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help=dirs)
    parser.add_argument("--output", type=Path, default=Path(name), metavar="DIR")
    args = parser.parse_args()
    try:
        print(report(args.dirs, args.output), end="")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
