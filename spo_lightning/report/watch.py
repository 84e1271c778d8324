"""The page of runs that go on, served on loopback and made anew when their files change."""

import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from spo_lightning.report.build import sections
from spo_lightning.report.page import page
from spo_lightning.report.reading import MARKS

EVERY_SECONDS = 3


def serve(directories: Sequence[Path], port: int) -> ThreadingHTTPServer:
    """A server of the page; ``serve_forever`` runs it. ``port`` 0 takes a free one."""
    made = threading.Lock()
    kept: dict[str, bytes] = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state = state_of(directories)
            if self.path == "/state":
                self._send(state.encode(), "text/plain")
            elif self.path in ("/", "/report.html"):
                with made:
                    if state not in kept:
                        html = page(*sections(directories), again=EVERY_SECONDS)
                        kept.clear()
                        kept[state] = html.encode("utf-8", "replace")
                    body = kept[state]
                self._send(body, "text/html; charset=utf-8")
            else:
                self.send_error(404)

        def _send(self, body: bytes, kind: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None: ...

    return ThreadingHTTPServer(("127.0.0.1", port), Handler)


def state_of(directories: Sequence[Path]) -> str:
    """Changes whenever a run's files do."""
    times = [
        path.stat().st_mtime_ns
        for directory in directories
        for name in MARKS
        for path in directory.rglob(name)
    ]
    return f"{len(times)}-{max(times, default=0)}"
