"""``python -m spo_lightning.objectives [NAME ...]``: every loss, its formula, needs, defaults."""

import argparse
import os
import sys
from pathlib import Path

from spo_lightning.command import CONF
from spo_lightning.errors import UserError


def main() -> None:
    parser = argparse.ArgumentParser(prog="spo-objectives", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="losses; all if left out")
    more = "a directory with a loss/ of your own, as --config-dir of train"
    parser.add_argument("--config-dir", type=Path, metavar="DIR", help=more)
    where = "write the page and its pictures there in place of printing it"
    parser.add_argument("--output", type=Path, metavar="DIR", help=where)
    args = parser.parse_args()
    try:
        told = objectives_of(args.names, args.config_dir, args.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(told)


def objectives_of(names: list[str], config_dir: Path | None, output: Path | None) -> str:
    """What is printed; with ``output`` the files that were written."""
    from spo_lightning.objectives import found, page

    if config_dir is not None and not (config_dir / "loss").is_dir():
        raise UserError(f"--config-dir {config_dir}: it has no directory loss/")
    sys.path.insert(0, os.getcwd())  # where functions of one's own stand, as train finds them
    every = found.objectives([Path(CONF), *([config_dir] if config_dir else [])])
    known = {one.name: one for one in every}
    for name in names:
        if name not in known:
            raise UserError(f"{name}: no such loss; there are {', '.join(known)}")
    chosen = [known[name] for name in names] or every
    if output is not None:
        return "\n".join(f"written to {path}" for path in page.written(chosen, output))
    return page.page(chosen) if not names else "\n".join(page.section(o, None) for o in chosen)


if __name__ == "__main__":
    main()
