"""The page of runs that go on, served on loopback and made anew when their files change."""

import html
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from spo_lightning.report.build import content, found
from spo_lightning.report.page import page
from spo_lightning.report.reading import MARKS

WAITING = (
    '<!doctype html><meta charset="utf-8"><meta http-equiv="refresh" content="3">'
    "<title>report</title><p>The page cannot be made now ({}). It is tried again.</p>"
)


def serve(directories: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page; ``serve_forever`` runs it. ``port`` 0 takes a free one."""
    made = threading.Lock()  # the page is made once, however many ask
    kept: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = state_of(directories)
            body, kind = state.encode(), "text/plain"
            if self.path in ("/", "/report.html"):
                with made:
                    if state not in kept:
                        page = fresh(directories, state).encode("utf-8", "replace")
                        kept.clear()
                        kept[state] = page
                    body, kind = kept[state], "text/html; charset=utf-8"
            elif self.path != "/state":
                self.send_error(404)
                return
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def fresh(directories: Sequence[Path], state: str) -> str:
    """The page as the files are now; one that tries again where they cannot be read."""
    try:
        return page(*content(directories, found(directories)), state=state)
    except Exception as error:  # a run may be writing; a server must not end for it
        return WAITING.format(html.escape(f"{type(error).__name__}: {error}"))


def state_of(directories: Sequence[Path]) -> str:
    """Changes whenever a run's files do."""
    times = [
        path.stat().st_mtime_ns
        for directory in directories
        for name in MARKS
        for path in directory.rglob(name)
    ]
    return f"{len(times)}-{max(times, default=0)}"
