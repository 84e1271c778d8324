"""``python -m spo_lightning.report DIR [DIR ...]``: the page of a run, of several, of a sweep.

Written into the directory, or of several into ./report: report.html, table.md and figures/. Of a
csv that ``sweep.table`` wrote: the tables and pictures of its methods.
"""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from spo_lightning.errors import UserError
from spo_lightning.report.table import finished

TITLED = ("loss", "solver")  # groups that a picture's title names


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="spo-report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    told = "run or sweep directory, or a sweep.table csv"
    parser.add_argument("dirs", nargs="+", type=Path, metavar="DIR", help=told)
    where = "where the report is written; of one directory into it, of several into ./report"
    parser.add_argument("--output", type=Path, metavar="DIR", help=where)
    watch = "serve the page on this machine only, made anew as the runs go on; Ctrl-C ends it"
    parser.add_argument("--watch", action="store_true", help=watch)
    parser.add_argument("--port", type=int, default=0, help="of --watch; 0: a free one")
    args = parser.parse_args()
    try:
        report(args)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def report(args: argparse.Namespace) -> None:
    if len(args.dirs) == 1 and args.dirs[0].suffix == ".csv":
        return of_jobs(args.dirs[0])
    for directory in args.dirs:
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}")
    if args.watch:
        return watched(args.dirs, args.port)
    from spo_lightning.report.build import build, markdown

    try:
        # a run's own page is not written over by a comparison with another
        room = args.output or (args.dirs[0] if len(args.dirs) == 1 else Path("report"))
        files = [*build(args.dirs, room), *evolutions(args.dirs, room)]
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}: the report is not written"
        ) from error
    print(markdown(args.dirs) or "no run has come to its numbers yet")
    for file in files:
        print(f"written to {file}", file=sys.stderr)
    return None


def of_jobs(path: Path) -> None:
    from spo_lightning.report import paper

    text, files = paper.report(path)
    print(text, end="")
    for file in files:
        print(f"written to {file}", file=sys.stderr)


def watched(directories: Sequence[Path], port: int) -> None:
    from spo_lightning.report.build import sections
    from spo_lightning.report.watch import serve

    sections(directories)  # refuses directories without a run
    try:
        server = serve(directories, port)
    except (OSError, OverflowError) as error:
        raise UserError(f"--port {port}: {error}: name another") from error
    print(f"http://127.0.0.1:{server.server_port}/ (Ctrl-C ends it)", flush=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        server.serve_forever()
    except KeyboardInterrupt:
        server.server_close()


def evolutions(directories: Sequence[Path], room: Path) -> list[Path]:
    """Every step as predicted and measured, where a run watched it."""
    from spo_lightning.report import steps

    runs = {
        " ".join(f"{k}={numbers['choices'].get(k)}" for k in TITLED) + f"\n{run.name}": run
        for run, numbers, _ in finished(directories)
        if (run / "evolution.csv").is_file()
    }
    return steps.report(runs, room) if runs else []


if __name__ == "__main__":
    main()
