"""A server of OpenAI's protocol with a judge of known mind behind it, in a thread of the test."""

import contextlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BOTH = re.compile(r"Answer A:\n(.*?)\n\nAnswer B:\n(.*?)\n\n", re.DOTALL)


def longer(first, second):
    """Which answer the judge likes: A, B or tie."""
    return "tie" if len(first) == len(second) else "AB"[len(second) > len(first)]


class Server(ThreadingHTTPServer):
    """``says``: the reply to two answers. ``faults``: of the n-th request, from 0, in its place:
    a status, ``slow``, ``garbled`` or ``cut``. ``at``: what is done when the n-th comes."""

    daemon_threads = True

    def __init__(self, says=longer, faults=(), key=None, top=None, handler=None, at=()):
        super().__init__(("127.0.0.1", 0), handler or Handler)
        self.at = dict(at)
        self.says, self.faults, self.key, self.top = says, dict(faults), key, top
        self.asked, self.lock, self.times, self.at_once, self.most = [], threading.Lock(), [], 0, 0

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.asked)
            self.server.asked.append(body)
            self.server.times.append(time.monotonic())
            self.server.at_once += 1
            self.server.most = max(self.server.most, self.server.at_once)
        self.server.at.get(number, lambda: None)()
        self.answer(body, self.server.faults.get(number))

    def said(self, body):
        return self.server.says(*BOTH.search(body["messages"][-1]["content"]).groups())

    def answer(self, body, fault):
        if self.path != "/v1/chat/completions":
            return self.send(404, {"error": "no such path"})
        key = self.server.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            return self.send(401, {"error": f"wrong key {self.headers.get('Authorization')}"})
        if isinstance(fault, int):
            return self.send(fault, {"error": "as planned"}, {"Retry-After": "0.01"})
        if fault == "slow":
            time.sleep(3)
        if fault == "garbled":
            return self.send(200, {"nothing": "of the protocol"})
        choice = {"message": {"role": "assistant", "content": self.said(body)}}
        if body.get("logprobs") and self.server.top is not None:
            top = [{"token": token, "logprob": logp} for token, logp in self.server.top.items()]
            choice["logprobs"] = {"content": [{"top_logprobs": top}]}
        usage = {"prompt_tokens": 100, "completion_tokens": 2}
        return self.send(200, {"choices": [choice], "usage": usage}, cut=fault == "cut")

    def send(self, status, found, more=(), cut=False):
        text = json.dumps(found).encode()
        with self.server.lock:  # before it is read: then the next one may come
            self.server.at_once -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            for name, value in {"Content-Length": str(len(text)), **dict(more)}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text[: len(text) // 2] if cut else text)
        self.close_connection = True


@contextlib.contextmanager
def serving(**how):
    server = Server(**how)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
