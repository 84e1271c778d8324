"""``python -m spo_lightning.report DIR [DIR ...]``: the table of a run, of several, of a sweep.

Of a csv that ``sweep.table`` wrote: the tables and pictures of its methods.
"""

import argparse
import sys
from pathlib import Path

from spo_lightning.errors import UserError
from spo_lightning.report import paper, steps
from spo_lightning.report.table import finished, run_table, sweep_table

NAMES = (
    "exact_match",
    "win_rate",
    "nll/chosen",
    "rewards/accuracies",
    "preference/accuracy",
    "displacement/rate",
    "displacement/chosen",
)


def table_of_jobs(path: Path) -> None:
    try:
        text, files = paper.report(path)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(text, end="")
    for file in files:
        print(f"written to {file}", file=sys.stderr)


def main() -> None:
    parser = argparse.ArgumentParser(prog="spo-report", description=__doc__)
    parser.add_argument(
        "dirs",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="run or sweep directory, or a sweep.table csv",
    )
    args = parser.parse_args()
    if len(args.dirs) == 1 and args.dirs[0].suffix == ".csv":
        table_of_jobs(args.dirs[0])
        return
    for directory in args.dirs:
        if not directory.is_dir():
            print(f"error: no such directory: {directory}", file=sys.stderr)
            sys.exit(2)
    runs = finished(args.dirs)
    if not runs:
        where = ", ".join(map(str, args.dirs))
        print(f"error: no finished run (metrics.json) in {where}", file=sys.stderr)
        sys.exit(2)
    watched = {
        f"loss={numbers['choices']['loss']} solver={numbers['choices']['solver']}\n{run.name}": run
        for run, numbers, _ in runs
        if (run / "evolution.csv").is_file()
    }
    if watched:
        for path in steps.report(watched, args.dirs[0]):
            print(f"written to {path}", file=sys.stderr)
    if len(runs) == 1:
        print(run_table(runs[0][1]))
        return
    table = sweep_table(args.dirs, NAMES)
    print(table)
    where = args.dirs[0] / "table.md"
    where.write_text(table, encoding="utf-8")
    print(f"written to {where}", file=sys.stderr)


if __name__ == "__main__":
    main()
