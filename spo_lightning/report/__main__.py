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
        if args.watch:
            return watched(args.dirs, args.port)
        for file in report(args.dirs, args.output):
            print(f"written to {file}", file=sys.stderr)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def report(directories: Sequence[Path], output: Path | None) -> list[Path]:
    """Print the table; what was written."""
    if len(directories) == 1 and directories[0].suffix == ".csv":
        from spo_lightning.report import paper

        text, files = paper.report(directories[0])
        print(text, end="")
        return files
    refuse_missing(directories)
    from spo_lightning.report.build import TABLE, build

    # a run's own page is not written over by a comparison with another
    room = output or (directories[0] if len(directories) == 1 else Path("report"))
    try:
        files = build(directories, room)
    except OSError as error:
        told = f"{error.filename}: {error.strerror}: the report is not written"
        raise UserError(told) from error
    tables = [file.read_text(encoding="utf-8") for file in files if file.name == TABLE]
    print(*tables or ["no run has come to its numbers yet"])
    return files


def watched(directories: Sequence[Path], port: int) -> None:
    refuse_missing(directories)
    from spo_lightning.report.build import found
    from spo_lightning.report.watch import serve

    found(directories)  # refuses directories without a run
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


def refuse_missing(directories: Sequence[Path]) -> None:
    for directory in directories:
        if not directory.is_dir():
            raise UserError(f"no such directory: {directory}")


if __name__ == "__main__":
    main()
