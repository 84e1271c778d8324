"""Answers from an endpoint: what is asked, nothing twice, and what is refused."""

import contextlib
import json
import signal
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from conftest import SMALL, Fork, command, forked
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF
from tiny import policy

from spo_lightning.errors import UserError
from spo_lightning.models.engines import Place
from spo_lightning.models.generate import Answer, Decoding, answered
from spo_lightning.records.progress import silent

HERE = Path(__file__).parent
PATHS = f"{HERE}:{HERE.parent}:{CONF.parent}"  # of a command that calls a judge of these tests
SAMPLE, EVAL = (("-m", f"spo_lightning.{name}") for name in ("sample", "eval"))
FEW = [w for w in SMALL if w.startswith(("data", "hardware", "eval."))]
ROWS = [{"prompt": "1+1=?"}, {"prompt": [{"role": "user", "content": "1+2=?"}]}, {"prompt": "x"}]


class Handler(BaseHTTPRequestHandler):
    """Says how long the prompt is and with which seed it was asked."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.asked.append((self.path, body))
            server.times.append(time.monotonic())
            server.now += 1
            server.most = max(server.most, server.now)
            number = len(server.asked)
        server.at.get(number, lambda: None)()
        if server.down:
            server.refused += 1
            return self.send(503, {"error": "as planned"})
        if server.key and self.headers.get("Authorization") != f"Bearer {server.key}":
            return self.send(401, {"error": "no such key"})
        if body["model"] != "m":
            return self.send(404, {"error": "no such model"})
        text = f"{len(str(body.get('prompt')))}.{body.get('seed')};"
        named = {"text": text} if "prompt" in body else {"message": {"content": text}}
        end = "length" if body["max_tokens"] == 1 else "stop"
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        return self.send(200, {"choices": [{**named, "finish_reason": end}], "usage": usage})

    def send(self, status, found):
        text = json.dumps(found).encode()
        with self.server.lock:  # before it is read: then the next one may come
            self.server.now -= 1
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)


@contextlib.contextmanager
def answering():
    """``at``: what happens as the n-th request comes, from 1."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.times, server.at, server.lock = [], [], {}, threading.Lock()
    server.now, server.most, server.refused, server.down, server.key = 0, 0, 0, False, None
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def decoding(url, cache=None, temperature=0.0, processes=1, **keys):
    node = OmegaConf.load(CONF / "engine/openai.yaml")
    node = OmegaConf.merge(node, {"base_url": url, "model": "m", "retries": 0}, keys)
    engine = instantiate(node)(Place(cache, processes))
    return Decoding(8, 4, (";",), temperature, seed=2, engine=engine)


def ask(rows, how):
    return answered(None, rows, how, silent(), "answers")  # type: ignore[arg-type]


def test_a_text_is_completed_and_messages_are_a_conversation(tmp_path):
    with answering() as (server, url):
        found = ask(ROWS, decoding(url, tmp_path))
        assert found == [Answer(f"{n}.None", 3, cut=False) for n in (5, 4, 1)]
        asked = dict(server.asked)
        assert len(server.asked) == 3 and {*asked} == {"/v1/completions", "/v1/chat/completions"}
        assert asked["/v1/chat/completions"] == {
            **{"model": "m", "messages": ROWS[1]["prompt"], "temperature": 0.0},
            **{"max_tokens": 8, "stop": [";"]},
        }
        assert ask(ROWS, decoding(url, tmp_path)) == found and len(server.asked) == 3
        (short,) = ask(ROWS[:1], Decoding(1, 4, (), engine=decoding(url, tmp_path).engine))
        assert short.cut and len(server.asked) == 4
        (kept,) = ask(ROWS[:1], Decoding(1, 4, (), engine=decoding(url, tmp_path).engine))
        assert kept.cut and len(server.asked) == 4


def test_sampled_answers_to_one_prompt_are_draws_of_their_own(tmp_path):
    with answering() as (server, url):
        texts = {one.text for one in ask([ROWS[0]] * 3, decoding(url, tmp_path, 1.0))}
        assert texts == {f"5.{200006 + n}" for n in range(3)}
        without = {"more": {"seed": None, "top_k": 5}}  # an endpoint that knows no seed
        ask([ROWS[0]] * 3, decoding(url, tmp_path, 1.0, **without))
        assert len(server.asked) == 6
        assert all("seed" not in body and body["top_k"] == 5 for _, body in server.asked[3:])


def test_several_processes_keep_the_limits_together():
    how = {"requests_per_minute": 60.0, "concurrency": 5}
    pace = decoding("", processes=4, **how).engine.endpoint.pace
    assert (pace.at_once, pace.apart) == (1, 4.0)
    assert decoding("", **how).engine.endpoint.pace.apart == 1.0


@pytest.mark.parametrize("more", [{"model": "x"}, {"messages": None}, {"temperature": 0.5}])
def test_keys_that_are_ours(more):
    with pytest.raises(UserError, match=f"engine.more.{[*more][0]}: the command says it itself"):
        decoding("", more=more)


def last(row, text):
    """A judge of a user's own: the last figure of the seed that an answer was asked with."""
    return int(text[-2])


def dots(row, text):
    return text.count(".")


def sampling(url, *words):
    """The words of a command with 40 prompts, three answers each."""
    return (
        *(*FEW, "engine=openai", f"engine.base_url={url}", "engine.model=m", "samples=3"),
        *("judge=function", f"judge.path={__name__}.last", *words),
    )


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_sample_needs_no_model_of_its_own(tmp_path):
    with answering() as (server, url):
        done = forked(tmp_path, *sampling(url, "engine.model=another"), module=SAMPLE)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert "answers 404" in done.err and "engine.model" in done.err
        assert not (tmp_path / "pairs.jsonl").exists()
        del server.asked[:]
        done = forked(tmp_path, *sampling(url), module=SAMPLE)  # over a record that holds nothing
        assert done.code == 0, done.err
        pairs = rows_of(tmp_path / "pairs.jsonl")
        assert len(pairs) == 40 and pairs[0]["model"] == "m" and len(server.asked) == 120
        (tmp_path / "pairs.jsonl").unlink()
        again = sampling(url, "engine.concurrency=2", "engine.timeout=9")
        done = forked(tmp_path, *again, module=SAMPLE)
        assert done.code == 0 and "40 of 40 prompts were drawn before" in done.out, done.err
        assert rows_of(tmp_path / "pairs.jsonl") == pairs and len(server.asked) == 120
        done = forked(tmp_path, *sampling(url, "+engine.more.top_k=1"), module=SAMPLE)
        assert done.code == 2 and "other settings (engine is" in done.err


def test_a_killed_one_asks_nothing_twice(tmp_path):
    """But what was on its way when the kill came."""
    with answering() as (server, url):
        words = sampling(url, "engine.concurrency=1", "eval.batch_size=12")
        server.at[50] = lambda: run.process.kill()
        run = Fork.begin(tmp_path, *words, module=SAMPLE)
        assert run.end().code == -signal.SIGKILL and len(server.asked) == 50
        drawn = len(rows_of(tmp_path / "pairs.samples.jsonl")) - 1
        assert drawn == 16  # four whole parts of four prompts, three answers each
        done = forked(tmp_path, *words, module=SAMPLE)
        assert done.code == 0 and "16 of 40 prompts were drawn before" in done.out, done.err
        assert len(server.asked) == 121 and server.asked[49] == server.asked[50]
        assert len(rows_of(tmp_path / "pairs.jsonl")) == 40


def test_an_endpoint_that_goes_down_loses_nothing(tmp_path):
    with answering() as (server, url):
        server.at[50] = lambda: setattr(server, "down", True)
        words = sampling(url, "engine.concurrency=1", "engine.retries=0")
        done = forked(tmp_path, *words, module=SAMPLE)
        assert done.code == 2 and done.err.count("\n") == 1, done.err
        assert f"{url} gave no reply in 1 tries (status 503)" in done.err
        assert not (tmp_path / "pairs.jsonl").exists()
        server.down = False
        done = forked(tmp_path, *words, module=SAMPLE)
        assert done.code == 0 and len(server.asked) == 120 + server.refused, done.err


def test_a_key_that_is_wrong(tmp_path):
    with answering() as (server, url):
        server.key = "sk-right-one"
        words = sampling(url, "engine.key_from=ENGINE_KEY")
        done = forked(tmp_path, *words, module=SAMPLE, ENGINE_KEY="sk-wrong-one")
        assert done.code == 2 and "answers 401" in done.err and done.err.count("\n") == 1
        done = forked(tmp_path, *words, module=SAMPLE, ENGINE_KEY="sk-right-one")
        assert done.code == 0, done.err
        said = "".join(path.read_text() for path in tmp_path.rglob("*.json*"))
        assert "sk-" not in said + done.out


@pytest.mark.slow
def test_two_processes_ask_at_the_pace_of_one(tmp_path):
    two = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")
    with answering() as (server, url):
        pace = ("engine.requests_per_minute=1200", "engine.concurrency=2", "eval.batch_size=12")
        words = [word for word in sampling(url, *pace) if not word.startswith("hardware")]
        done = command(tmp_path, *words, *two, module=SAMPLE, PYTHONPATH=PATHS)
        assert done.code == 0, done.err
        assert len(rows_of(tmp_path / "pairs.jsonl")) == 40 and len(server.asked) == 120
        assert server.most <= 2
        within = [b - a for a, b in zip(server.times, server.times[22:])]
        assert min(within) > 20 * 60 / 1200 * 0.9  # of 22, two may begin at once


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "engine.model has no default"),
        (("engine.model=m", "engine.key_from=NO_SUCH"), "engine.key_from=NO_SUCH: no such"),
        (("engine.model=m", "checkpoint=somewhere"), "checkpoint has no effect"),
        (("engine.model=m", "engine.concurrency=0"), "engine.concurrency=0: it must be at least"),
        (("engine.model=m", "+engine.foo=1"), "engine: "),
        (("engine.model=m", "eval.stop=[5]"), "eval.stop=[5]: it must be [TEXT, ...]"),
        (("engine.model=m", "model=qwen"), "model has no effect: an endpoint answers"),
        (("engine.model=m", "+engine.more.seed=1"), "engine.more.seed: the command says"),
        (("engine.model=m", "judge=likelihood"), "judge.model=null is the policy"),
        (
            (
                "engine.model=m",
                "engine.base_url=http://127.0.0.1:1/v1",
                "engine.retries=0",
                "judge=function",
                "judge.path=builtins.len",
            ),
            "http://127.0.0.1:1/v1 gave no reply in 1 tries (ConnectionError): see that it runs",
        ),
    ],
)
def test_refused_in_one_line(tmp_path, words, says):
    done = forked(tmp_path, *FEW, "engine=openai", *words, module=SAMPLE)
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1, done.err
    assert not (tmp_path / "pairs.jsonl").exists()


def test_eval_judges_the_endpoints_answers(tmp_path):
    policy(dtype="float32", num_hidden_layers=1).save(tmp_path / "model", merge=False, card="")
    rows = [{"prompt": f"p{n}", "chosen": "c" * n, "rejected": "r"} for n in range(2, 8)]
    for name, some in (("train", rows[:1]), ("held", rows[1:])):
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    words = ("checkpoint=model", "data=pairs", "data.path=train.jsonl")
    words += ("data.eval_path=held.jsonl",)
    words += ("hardware=cpu", "eval.max_new_tokens=4", "judge=function", "eval.rival=chosen")
    words += (f"judge.path={__name__}.dots", "engine=openai", "engine.model=m")
    with answering() as (server, url):
        done = forked(tmp_path, *words, f"engine.base_url={url}", module=EVAL)
        assert done.code == 0, done.err
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["win_rate"] == 1.0 and found["answers/tokens"] == 3.0
        assert found["logps/chosen"] < 0 and len(server.asked) == 10  # greedy and sampled
