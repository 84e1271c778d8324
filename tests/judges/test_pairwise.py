"""The pairwise judge against a server of known mind: orders, faults, the cache, costs, keys."""

import logging
import threading
import time
from types import SimpleNamespace

import pytest
from endpoints import longer, serving
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF

from spo_lightning.errors import Interrupted, UserError
from spo_lightning.evaluation.wins import Judged, Verdicts
from spo_lightning.judges.local import Asked, ByScore
from spo_lightning.judges.panel import kappa, panel
from spo_lightning.records.progress import Stages, Stop, silent
from spo_lightning.run.judging import called

ROWS = [{"prompt": f"prompt {n}"} for n in range(12)]
MINE = ["x" * (3 + n) for n in range(12)]
THEIRS = ["y" * 8 for _ in range(12)]
TRUE = [0.0] * 5 + [0.5] + [1.0] * 6  # of the longer answer


def judge(server, cache=None, stages=None, option="pairwise", **keys):
    base = OmegaConf.load(CONF / "judge/pairwise.yaml")
    own = OmegaConf.load(CONF / f"judge/{option}.yaml")
    own.pop("defaults", None)
    quick = {"model": "m", "base_url": server.url, "timeout": 20.0, "retries": 3}
    node = OmegaConf.merge(base, own, quick, keys)
    asked = SimpleNamespace(cache=cache, stages=stages or silent(), processes=1)
    return instantiate(node)(asked)


@pytest.mark.parametrize("option", ["pairwise", "pairwise_safety"])
def test_it_says_what_the_server_does(option):
    with serving() as server:
        found = judge(server, option=option).compare(ROWS, MINE, THEIRS)
        assert found.wins == TRUE and found.contradicting == [False] * 12
        assert len(server.asked) == 24 and server.most <= 8
        seen = server.asked[0]
        assert (seen["model"], seen["temperature"]) == ("m", 0.0)
        assert [turn["role"] for turn in seen["messages"]] == ["system", "user"]
        same = judge(server).compare(ROWS[:2], ["a", "b"], ["a", "b"])
        assert same == Verdicts([0.5, 0.5], [None, None]) and len(server.asked) == 24


def test_a_judge_that_always_names_the_first_has_no_say():
    def first(a, b):
        return "A"

    with serving(says=first) as server:
        found = judge(server).compare(ROWS, MINE, THEIRS)
    assert found.wins == [0.5] * 12 and found.contradicting == [True] * 12

    def leans(a, b):  # to the first, where the difference is small
        return "A" if abs(len(a) - len(b)) < 3 else longer(a, b)

    with serving(says=leans) as server:
        found = judge(server).compare(ROWS, MINE, THEIRS)
    assert found.wins == [0.0] * 3 + [0.5] * 5 + [1.0] * 4
    numbers = Judged(MINE, THEIRS, found, [(len(t), 8) for t in MINE], MINE).numbers(range(12))
    assert numbers["judge/contradicting"] == pytest.approx(5 / 12)


@pytest.mark.parametrize("fault", [429, 500, 503, "slow", "garbled", "cut"])
def test_a_fault_is_asked_again(fault, tmp_path):
    with serving(faults={0: fault, 3: fault, 7: fault}) as server:
        patience = 2.0 if fault == "slow" else 20.0  # seconds; slow is 3
        found = judge(server, tmp_path, timeout=patience).compare(ROWS, MINE, THEIRS)
        assert found.wins == TRUE and len(server.asked) == 27


@pytest.mark.parametrize("reply", ["", "I cannot judge that.", "A or B", "(A) and (B)", "C"])
def test_nonsense_is_no_verdict(reply, caplog):
    with serving(says=lambda a, b: reply) as server, caplog.at_level(logging.WARNING):
        found = judge(server).compare(ROWS[:3], MINE[:3], THEIRS[:3])
    assert found == Verdicts([None] * 3, [None] * 3)
    assert "no reply is a verdict" in caplog.text
    told = Judged(MINE[:3], THEIRS[:3], found, [(1, 1)] * 3, MINE[:3]).numbers(range(3))
    assert told == {"judge/silent": 1.0}


def test_marks_around_a_verdict_are_none(tmp_path):
    with serving(says=lambda a, b: f"**{longer(a, b).lower()}**.\n") as server:
        assert judge(server).compare(ROWS, MINE, THEIRS).wins == TRUE
    with serving(says=longer) as server:  # a tie that is not allowed is no verdict
        assert judge(server, tie=None).compare(ROWS, MINE, THEIRS).wins[5] is None


def test_probabilities_of_the_first_token():
    top = {"A": -0.1, " B": -2.5, "a": -4.0, "The": -5.0, "tie": -3.0}
    with serving(top=top) as server:
        found = judge(server, logprobs=True).compare(ROWS[:1], ["x"], ["yy"])
    assert found.wins == pytest.approx([0.5]) and found.contradicting == [True]
    with serving() as server, pytest.raises(UserError, match="the endpoint returns none"):
        judge(server, logprobs=True).compare(ROWS[:1], ["x"], ["yy"])


def test_nothing_is_asked_twice(tmp_path, caplog):
    with serving() as server, caplog.at_level(logging.INFO):
        judge(server, tmp_path).compare(ROWS[:8], MINE[:8], THEIRS[:8])
        asked = len(server.asked)
        keys = {"dollars_read": 10.0, "dollars_written": 50.0}
        again = judge(server, tmp_path, **keys).compare(ROWS, MINE, THEIRS)
        assert again.wins == TRUE and len(server.asked) == 24 > asked
        assert "Judged: 8 requests, 800 tokens read and 16 written, $0.0088, 16 of earl" in (
            caplog.text
        )
        for kept in list(tmp_path.rglob("*.json"))[:2]:
            kept.write_text('{"text": ')  # a disk that lost its end
        assert judge(server, tmp_path).compare(ROWS, MINE, THEIRS).wins == TRUE
        assert len(server.asked) == 26
        judge(server, tmp_path, temperature=0.5).compare(ROWS[:1], MINE[:1], THEIRS[:1])
        assert len(server.asked) == 28  # another question


def test_a_signal_ends_it_and_what_came_is_kept(tmp_path):
    stop = Stop()

    def slow(a, b):
        time.sleep(0.02)
        if len(server.asked) >= 6:
            stop.signal = 15
        return longer(a, b)

    with serving(says=slow) as server:
        stages = Stages(lambda *_: None, stop, "Again.")
        with pytest.raises(Interrupted):
            judge(server, tmp_path, stages, concurrency=2).compare(ROWS, MINE, THEIRS)
        before = len(server.asked)
        assert before == len(list(tmp_path.rglob("*.json"))) < 12
        assert judge(server, tmp_path).compare(ROWS, MINE, THEIRS).wins == TRUE
        assert len(server.asked) == 24


def test_the_rate_is_kept_and_so_is_the_width():
    with serving(says=lambda a, b: time.sleep(0.05) or "A") as server:
        judge(server, concurrency=3).compare(ROWS, MINE, THEIRS)
        assert 1 < server.most <= 3
    with serving() as server:
        began = time.monotonic()
        judge(server, requests_per_minute=1200.0).compare(ROWS[:5], MINE[:5], THEIRS[:5])
        assert server.times[9] - began > 9 * 0.05


def test_a_key_comes_from_the_environment_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("JUDGE_KEY", "sk-very-secret")
    monkeypatch.delenv("NO_KEY", raising=False)
    with serving(key="sk-very-secret") as server:
        found = judge(server, tmp_path, key_from="JUDGE_KEY").compare(ROWS, MINE, THEIRS)
        assert found.wins == TRUE
        assert not any("very-secret" in p.read_text() for p in tmp_path.rglob("*.json"))
        with pytest.raises(UserError, match="judge.key_from=NO_KEY: no such environment"):
            judge(server, key_from="NO_KEY")
        with pytest.raises(UserError, match="answers 401"):
            judge(server).compare(ROWS, MINE, THEIRS)
    with serving(key="another") as server:
        with pytest.raises(UserError, match="answers 401") as caught:
            judge(server, key_from="JUDGE_KEY").compare(ROWS, MINE, THEIRS)
        assert "very-secret" not in str(caught.value) and "\n" not in str(caught.value)


def test_an_endpoint_that_is_down_loses_nothing(tmp_path):
    with serving() as server:
        judge(server, tmp_path).compare(ROWS[:3], MINE[:3], THEIRS[:3])
        url = server.url
    down = SimpleNamespace(url=url)
    with pytest.raises(UserError, match=r"gave no reply in 2 tries \(ConnectionError\)") as caught:
        judge(down, tmp_path, retries=1).compare(ROWS, MINE, THEIRS)
    assert "\n" not in str(caught.value)
    assert judge(down, tmp_path).compare(ROWS[:3], MINE[:3], THEIRS[:3]).wins == TRUE[:3]


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"question": "{prompt} {first}"}, r"judge.question has no \{second\}"),
        ({"labels": ["A", "a"]}, "give two words that differ"),
        ({"labels": ["A"]}, "give two words that differ"),
        ({"base_url": "nowhere"}, "judge.base_url=nowhere: Invalid URL"),
    ],
)
def test_keys_that_cannot_be_meant(keys, says):
    with pytest.raises(UserError, match=says):
        judge(SimpleNamespace(url=""), **keys).compare(ROWS, MINE, THEIRS)


def test_a_key_goes_where_it_should_and_nowhere_else(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("default login me password theirs")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("JUDGE_KEY", "sk-secret\r\n")  # of a file with such line ends
    with serving(key="sk-secret") as server:
        assert judge(server, key_from="JUDGE_KEY").compare(ROWS, MINE, THEIRS).wins == TRUE
        monkeypatch.setenv("JUDGE_KEY", "sk-secr\net")
        for given in ("JUDGE_KEY", "sk-secret"):  # the second is the key in the variable's place
            with pytest.raises(UserError, match="judge.key_from") as caught:
                judge(server, key_from=given)
            assert "sk-" not in str(caught.value)


def test_labels_may_have_marks_around_them():
    with serving(says=lambda a, b: f"[[{longer(a, b).upper()}]]") as server:
        found = judge(server, labels=["[[A]]", "[[B]]"], tie="[[TIE]]")
        assert found.compare(ROWS, MINE, THEIRS).wins == TRUE


def test_a_signal_is_obeyed_while_the_endpoint_is_silent():
    stop = Stop()
    stages = Stages(lambda *_: None, stop, "", silent().world)
    threading.Timer(0.2, lambda: setattr(stop, "signal", 15)).start()
    silence = dict.fromkeys(range(99), "slow")
    # and no UserError once all tries have timed out
    with serving(faults=silence) as server, pytest.raises(Interrupted):
        judge(server, stages=stages, timeout=0.5).compare(ROWS, MINE, THEIRS)


def test_texts_are_put_in_once():
    with serving(says=lambda a, b: "A") as server:
        row = {"prompt": [{"role": "user", "content": "say {first}"}]}
        judge(server).compare([row], ["{second}"], ["b"])
        said = [body["messages"][1]["content"] for body in server.asked]
    assert sum("Answer A:\n{second}\n\nAnswer B:\nb" in text for text in said) == 1
    assert all("user: say {first}" in text for text in said)


def test_several_answers_are_scored_by_their_wins():
    texts = ["xxx", "x", "xx", "yyyy", "yyyy"]
    rows = [ROWS[0]] * 3 + [ROWS[1]] * 2
    with serving() as server:
        assert judge(server)(rows, texts) == [1.0, 0.0, 0.5, 0.5, 0.5]


def scored(score):
    return lambda asked: ByScore(lambda rows, texts: [score(text) for text in texts])


def test_a_panel_by_hand():
    members = {
        "long": scored(len),
        "short": scored(lambda text: -len(text)),
        "early": scored(lambda text: None if text == "?" else -ord(text[0])),
    }
    mine, theirs = ["aaa", "b", "?", "cc"], ["b", "cc", "d", "cc"]
    found = panel(None, members=members, mean=False).compare(ROWS[:4], mine, theirs)  # type: ignore
    # long: 1 0 0.5 0.5; short: 0 1 0.5 0.5; early: 1 1 None 0.5
    assert found.wins == [1.0, 1.0, 0.5, 0.5]
    mean = panel(None, members=members, mean=True).compare(ROWS[:4], mine, theirs)  # type: ignore
    assert mean.wins == pytest.approx([2 / 3, 2 / 3, 0.5, 0.5])
    # alike on the two ties of four; by chance 2 * (1/4)(1/4) + 1/4
    assert found.numbers["judge/kappa/long/short"] == pytest.approx((0.5 - 0.375) / (1 - 0.375))
    with pytest.raises(UserError, match="name two judges at least"):
        panel(None, members={"one": scored(len)}, mean=False)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="judge.members.data: this data has no judge"):
        panel(None, members={**members, "data": lambda asked: None}, mean=False)  # type: ignore


def test_kappa_by_hand():
    """Cohen's example form: 20 yes-yes, 5 yes-no, 10 no-yes, 15 no-no is 0.4."""
    both = [(1.0, 1.0)] * 20 + [(1.0, 0.0)] * 5 + [(0.0, 1.0)] * 10 + [(0.0, 0.0)] * 15
    assert kappa(both) == pytest.approx(0.4)
    assert kappa([(0.5, 0.5)] * 3) == 1.0


def test_a_panel_is_composed(tmp_path):
    from fitting import config

    before = {*threading.enumerate()}
    words = ("+judge@judge.members.one=answer", "+judge@judge.members.two=pairwise")
    cfg = config("judge=panel", *words, "judge.members.two.model=m")
    made = called(cfg.judge, "judge")
    task = SimpleNamespace(judge=None, answer_of=str.strip)
    asked = Asked(task, None, lambda _: None, None, silent(), 2, 64)  # type: ignore[arg-type]
    with serving() as server:
        found = made(asked)
        object.__setattr__(found.members["two"].endpoint, "base_url", server.url)
        rows = [{"prompt": "1+1", "answer": "2"}]
        assert found.compare(rows, ["2"], [" 31"]).wins == [0.5]
    begun = {*threading.enumerate()} - before
    assert not [one.name for one in begun if one.name.startswith("ThreadPoolExecutor")]
