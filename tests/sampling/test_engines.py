"""Answers from an endpoint: what is asked, nothing twice, and what is refused."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import SMALL, forked
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF
from tiny import policy

from spo_lightning.errors import UserError
from spo_lightning.models.engines import Place
from spo_lightning.models.generate import Answer, Decoding, answered
from spo_lightning.records.progress import silent

SAMPLE, EVAL = (("-m", f"spo_lightning.{name}") for name in ("sample", "eval"))
FEW = [w for w in SMALL if w.startswith(("data", "hardware", "eval."))]
ROWS = [{"prompt": "1+1=?"}, {"prompt": [{"role": "user", "content": "1+2=?"}]}, {"prompt": "x"}]


class Handler(BaseHTTPRequestHandler):
    """Says how long the prompt is and with which seed it was asked."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked.append((self.path, body))
        if body["model"] != "m":
            return self.send(404, {"error": "no such model"})
        text = f"{len(str(body.get('prompt')))}.{body.get('seed')};"
        named = {"text": text} if "prompt" in body else {"message": {"content": text}}
        end = "length" if body["max_tokens"] == 1 else "stop"
        usage = {"prompt_tokens": 10, "completion_tokens": 3}
        return self.send(200, {"choices": [{**named, "finish_reason": end}], "usage": usage})

    def send(self, status, found):
        text = json.dumps(found).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)


@contextlib.contextmanager
def answering():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
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
        assert found == [Answer(f"{n}.None;", 3, cut=False) for n in (5, 4, 1)]
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
        assert texts == {f"5.{200006 + n};" for n in range(3)}
        without = {"more": {"seed": None, "top_k": 5}}  # an endpoint that knows no seed
        ask([ROWS[0]] * 3, decoding(url, tmp_path, 1.0, **without))
        assert len(server.asked) == 6
        assert all("seed" not in body and body["top_k"] == 5 for _, body in server.asked[3:])


def test_several_processes_keep_the_limits_together():
    how = {"requests_per_minute": 60.0, "concurrency": 5}
    pace = decoding("", processes=4, **how).engine.endpoint.pace
    assert (pace.at_once, pace.apart) == (1, 4.0)
    assert decoding("", **how).engine.endpoint.pace.apart == 1.0


@pytest.mark.parametrize("key", ["model", "messages", "n"])
def test_keys_that_are_ours(key):
    with pytest.raises(UserError, match=f"engine.more.{key}: it is not yours"):
        decoding("", more={key: 1})


def test_sample_needs_no_model_of_its_own(tmp_path):
    with answering() as (server, url):
        words = [*FEW, "engine=openai", f"engine.base_url={url}", "samples=3", "engine.model=m"]
        words += ["judge=function", "judge.path=builtins.len"]
        done = forked(tmp_path, *words, "engine.model=another", module=SAMPLE)
        assert done.code == 2 and "answers 404" in done.err and "engine.model" in done.err
        assert not (tmp_path / "pairs.jsonl").exists()
        (tmp_path / "pairs.samples.jsonl").unlink()
        del server.asked[:]
        judge = ["judge.path=mine.last"]
        (tmp_path / "mine.py").write_text("def last(row, text):\n    return int(text[-2])\n")
        how = {"module": SAMPLE, "PYTHONPATH": f"{tmp_path}:{_here()}"}
        done = forked(tmp_path, *words, *judge, **how)
        assert done.code == 0, done.err
        pairs = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
        assert len(pairs) == 40 and pairs[0]["model"] == "m" and len(server.asked) == 120
        (tmp_path / "pairs.jsonl").unlink()
        paced = ["engine.concurrency=2", "engine.timeout=9"]
        done = forked(tmp_path, *words, *judge, *paced, **how)
        assert done.code == 0 and "40 of 40 prompts were drawn before" in done.out, done.err
        assert len(server.asked) == 120
        done = forked(tmp_path, *words, *judge, "engine.more={top_k: 1}", **how)
        assert done.code == 2 and "other settings (engine is" in done.err


def _here():
    return CONF.parent


@pytest.mark.parametrize(
    "words, says",
    [
        ((), "engine.model has no default"),
        (("engine.model=m", "engine.key_from=NO_SUCH"), "engine.key_from=NO_SUCH: no such"),
        (("engine.model=m", "checkpoint=somewhere"), "checkpoint has no effect"),
        (("engine.model=m", "engine.concurrency=0"), "engine.concurrency=0: it must be at least"),
        (("engine.model=m", "+engine.foo=1"), "engine: "),
        (("engine.model=m", "judge=likelihood"), "judge.model=null is the policy"),
        (
            (
                "engine.model=m",
                "engine.base_url=http://127.0.0.1:1/v1",
                "engine.retries=0",
                "judge=function",
                "judge.path=builtins.len",
            ),
            "no re",
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
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("checkpoint=model", "data=pairs", "data.path=held.jsonl", "data.eval_fraction=1")
    words += ("hardware=cpu", "eval.max_new_tokens=4", "judge=function", "eval.rival=chosen")
    words += ("judge.path=mine.dots", "engine=openai", "engine.model=m")
    (tmp_path / "mine.py").write_text("def dots(row, text):\n    return text.count('.')\n")
    with answering() as (server, url):
        how = {"module": EVAL, "PYTHONPATH": f"{tmp_path}:{_here()}"}
        done = forked(tmp_path, *words, f"engine.base_url={url}", **how)
        assert done.code == 0, done.err
        found = json.loads((tmp_path / "eval.json").read_text())
        assert found["win_rate"] == 1.0 and found["answers/tokens"] == 3.0
        assert found["logps/chosen"] < 0 and len(server.asked) == 12  # greedy and sampled
