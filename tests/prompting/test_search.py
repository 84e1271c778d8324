"""Searches against an endpoint with a planted best prompt: found, cut short, gone on with."""

import json
import signal

import pytest
from conftest import Fork
from endpoints import serving
from hydra import compose, initialize_config_dir
from pairs import CONF
from planted import PLANTED, START, Played, playing, roles

from spo_lightning.config import knobs
from spo_lightning.errors import UserError
from spo_lightning.prompting.asked import refuse
from spo_lightning.prompting.found import find
from spo_lightning.prompting.page import told
from spo_lightning.world import ALONE

MODULE = ("-m", "spo_lightning.prompt_search")
SHORT = (
    *(f"start={START}", "prompts.path=questions.jsonl", "hardware=cpu"),
    *("search.depth=7", "cache.dir=cache"),
)


@pytest.fixture
def place(tmp_path, monkeypatch):
    rows = [{"prompt": f"What is {n}?"} for n in range(12)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "questions.jsonl").write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def composed(*words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose("prompt_search", [*SHORT, *words])


def searched(place, *words, run="run"):
    """As the command, in this process."""
    return find(composed(*words), place / run, {}, [], ALONE)


def tree(place, run="run") -> dict:
    return json.loads((place / run / "tree.json").read_text())


def calls(place) -> list[dict]:
    return [json.loads(line) for line in (place / "run/calls.jsonl").read_text().splitlines()]


def once(server):
    """How many requests there were, none of them twice."""
    bodies = [json.dumps(body, sort_keys=True) for body in server.asked]
    assert len({*bodies}) == len(bodies)
    return len(bodies)


def test_the_planted_prompt_is_found(place):
    with playing() as server:
        searched(place, *roles(server.url), "check.rows=3")
        count = once(server)
        found = (place / "run/prompt.txt").read_text()
        assert all(word in found for word in PLANTED)
        kept = tree(place)
        best = kept["nodes"][kept["best"]]
        assert best["prompt"] == found.strip() and best["reward"] == 5.0
        assert kept["nodes"][0]["reward"] == 1.0 and kept["stopped"] is None
        # once it is good enough it is kept, and nothing is asked of the optimizer for it
        assert best["how"] == "kept" and best["path"][-2:] == [5.0, 5.0]
        assert best["value"] == pytest.approx(sum(best["path"]) / 8)
        case = best["cases"][0]
        assert case["aspects"] == {"clarity": 5.0, "critical-thinking": 5.0}
        assert case["reasons"]["clarity"] == "more words"
        steps = {n: [one for one in kept["nodes"] if one["depth"] == n] for n in range(8)}
        assert len(steps[1]) == 3 and all(len(some) <= 6 for some in steps.values())
        assert all(sum(one["in_beam"] for one in some) <= 2 for some in steps.values())
        check = kept["check"]
        assert check["best"]["score"] == 5.0 and check["start"]["score"] == 1.0
        assert check["best"]["against_start"]["low"] == 4.0 and check["random"]["rows"] == 3
        log = calls(place)
        assert len(log) == count == sum(of["calls"] for of in kept["calls"].values())
        assert {line["dollars"] for line in log} == {(100 * 1 + 2 * 10) / 1e6}
        assert "best   5.0000" in told(kept)
        page = (place / "run/tree.html").read_text()
        assert "Prompts that were tried" in page and "critical-thinking 5.00" in page
        searched(place, *roles(server.url), "check.rows=3")  # it has ended: nothing is asked
        assert once(server) == count and tree(place) == kept
        deeper = (*roles(server.url), "check.rows=3", "search.depth=8")
        searched(place, *deeper)
        assert once(server) > count and tree(place)["nodes"][-1]["depth"] == 8


def test_it_survives_what_endpoints_do(place):
    faults = {0: 429, 3: 500, 6: "garbled", 9: "cut", 12: 503, 20: "slow"}
    with playing(faults=faults) as server:
        searched(place, *roles(server.url, "timeout=1"))
        assert tree(place)["nodes"][tree(place)["best"]]["reward"] == 5.0
        assert len(server.asked) == len(calls(place)) + len(faults)


def test_nonsense_is_asked_anew_and_then_left_out(place, caplog):
    """A judge that cannot be read about one question, and an optimizer that gives no prompt."""

    class Odd(Played):
        def said(self, body):
            text = str(body["messages"])
            if body["model"] == "judge" and "What is 2?" in text and "matter" not in text:
                return "I would rather not."
            if body["model"] == "optimizer" and "What is 1?" in text:
                return "No."
            return super().said(body)

    with serving(handler=Odd) as server:
        searched(place, *roles(server.url), "search.depth=3", "search.questions=2")
        kept = tree(place)
        anew = [body for body in server.asked if "I cannot read that" in str(body)]
        assert anew and anew[0]["messages"][1]["content"] == "I would rather not."
        second = [case for one in kept["nodes"] if one["depth"] == 1 for case in one["cases"]]
        assert {case["score"] for case in second} >= {None}
        # step 0 asked What is 1?: nothing to rewrite by, so the start is kept
        assert {one["how"] for one in kept["nodes"] if one["depth"] == 1} == {"kept"}
        assert "hold no text" in caplog.text and "cannot be read" in caplog.text


@pytest.mark.slow
def test_it_stops_at_its_budget_with_what_it_has(place, caplog):
    with playing() as server:
        one = (*roles(server.url), "batch_size=1", "search.depth=4")
        searched(place, *one, "budget.calls=30")
        assert once(server) == 30 == len(calls(place))
        kept = tree(place)
        assert kept["stopped"] == "budget.calls=30" and "The budget is spent" in caplog.text
        depth = kept["nodes"][-1]["depth"]
        assert 1 <= depth < 4 and (place / "run/prompt.txt").read_text().startswith(START)
        searched(place, *one, "budget.dollars=0.006")  # 0.00012 a call
        assert once(server) == 50 and tree(place)["stopped"] == "budget.dollars=0.006"
        assert tree(place)["nodes"][-1]["depth"] > depth
        searched(place, *one)
        whole = tree(place)
        assert whole["stopped"] is None and once(server) == len(calls(place))
    with playing() as server:  # as one that was never stopped
        again = (*roles(server.url), "batch_size=1", "search.depth=4", "cache.dir=elsewhere")
        searched(place, *again, run="other")
        assert tree(place, "other")["nodes"] == whole["nodes"]


@pytest.mark.slow
def test_killed_it_goes_on_and_asks_nothing_twice(place):
    words = ("search.questions=2", "cache.enabled=false", "batch_size=1")
    with playing() as server:
        running = []
        for number in (3, 25, 61):
            server.at[number] = lambda: running[-1].process.kill()
            first = (*SHORT[:-1], *roles(server.url), *words, "hydra.run.dir=run")
            running.append(
                Fork.begin(place, *(("resume=run",) if running else first), module=MODULE)
            )
            assert running[-1].end(300).code == -signal.SIGKILL
        fork = Fork.begin(place, "resume=run", module=MODULE).end(300)
        assert fork.code == 0, fork.err
        # each kill loses the one request that was on its way
        assert len(server.asked) == len(calls(place)) + 3
        names = [line["name"] for line in calls(place)]
        assert len({*names}) == len(names)
    with playing() as server:
        searched(place, *roles(server.url), *words, run="other")
        assert tree(place, "other")["nodes"] == tree(place)["nodes"]


def test_what_ends_it_anywhere_loses_one_request(place):
    """The same without a process of its own: the endpoint goes away, and the last line is torn."""
    words = ("search.depth=3", "cache.enabled=false", "batch_size=1")
    with playing() as server:
        server.faults[17] = 404
        with pytest.raises(UserError, match="answers 404"):
            searched(place, *roles(server.url), *words)
        log = place / "run/calls.jsonl"
        assert len(calls(place)) == 17
        whole = log.read_bytes()
        log.write_bytes(whole.replace(b"{", b"", 1))
        with pytest.raises(UserError, match="calls.jsonl, line 1: no call of a search"):
            searched(place, *roles(server.url), *words)
        log.write_bytes(whole[:-9])
        searched(place, *roles(server.url), *words)
        assert len(server.asked) == len(calls(place)) + 2
        with pytest.raises(UserError, match="search.beam is 2 in .* and 3 here"):
            searched(place, *roles(server.url), *words, "search.beam=3")


def test_examples_are_rewritten_and_asked_after(place):
    pytest.importorskip("bm25s", reason="the extra retrieval is not installed")
    rows = [
        {"prompt": f"What is {word}?", "completion": text}
        for word, text in (("3", "three"), ("a whale", "brief kind exact sober"), ("7", "seven"))
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (place / "examples.jsonl").write_text(text)
    words = ("examples.path=examples.jsonl", "examples.count=1", "search.depth=1")
    with playing() as server:
        searched(place, *roles(server.url), *words)
        lines = (place / "run/examples.jsonl").read_text().splitlines()
        three, whale, _ = [json.loads(line) for line in lines]
        assert three["completion"] == "brief kind, as rewritten" and three["before"] == "three"
        assert three["score"] == 3.0 and whale["completion"] == whale["before"]
        asked = [body["messages"] for body in server.asked if body["model"] == "base"]
        assert {len(turns) for turns in asked} == {4}
        (about,) = {
            (turns[1]["content"], turns[2]["content"])
            for turns in asked
            if turns[-1]["content"] == "What is 0?"
        }
        assert about in {
            (row["prompt"], json.loads(line)["completion"]) for row, line in zip(rows, lines)
        }


@pytest.mark.parametrize(
    "words, says",
    [
        (("roles.base.model=x",), "roles.optimizer.model=null: name who answers"),
        (("examples.count=3",), "examples.count has no effect: examples.path is null"),
        (("data.system=Be.",), "start is the system prompt"),
        (("search.actions=0",), "search.actions=0: it must be at least 1"),
        (("budget.dollars=1", "judge=answer"), "no role has a price"),
        (("judge.pick=none",), "judge.pick has no {prompt}"),
        (("check.rows=20",), "check.rows=20 leaves no prompt"),
        (("rewrite=none",), "rewrite has no {history}"),
        (("start=' '",), "is empty: give a prompt"),
        (("judge=task",), "judge=task: this data has none"),
    ],
)
def test_refused_in_one_line(place, words, says):
    names = [f"{role}.model=nowhere" for role in ("roles.base", "roles.optimizer")]
    names += [] if "judge=" in str(words) else ["judge.engine.model=nowhere"]
    if "name who answers" in says:
        names = []
    data = ("prompts.path=null", "data=slips", "data.prompts=8", "data.sft_rows=8")
    where = data if "judge=task" in words else ()
    cfg = composed(*names, *where, *words)
    keys = [word.partition("=")[0] for word in words]
    with pytest.raises(UserError) as refused:
        knobs.check(cfg, knobs.Given(keys, {}, composed()))
        refuse(cfg)
        find(cfg, place / "run", {}, [], ALONE)
    assert says in str(refused.value) and "\n" not in str(refused.value)
    assert not (place / "run/tree.json").exists()
