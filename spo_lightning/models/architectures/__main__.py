"""``python -m spo_lightning.models.architectures [NAME ...] [--output FILE]``."""

import argparse
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m spo_lightning.models.architectures")
    parser.add_argument("names", nargs="*", help="architectures; every one by default")
    parser.add_argument("--output", type=Path, help="write the page here; else rows are printed")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    asked = parser.parse_args()

    from spo_lightning.models.architectures.table import kinds, page, row, verdicts

    found = []
    for verdict in verdicts(asked.names or kinds(), asked.jobs):
        found.append(verdict)
        print(row(verdict), verdict.single, verdict.double, flush=True)
    if asked.output:
        asked.output.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
