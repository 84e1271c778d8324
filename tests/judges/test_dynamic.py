"""Dynamic rewarding: what is read in a reply, who is asked what, and what is refused."""

from contextlib import nullcontext

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF
from planted import playing

from spo_lightning.errors import UserError
from spo_lightning.judges.dynamic import named_in, scores_in
from spo_lightning.judges.local import Asked
from spo_lightning.models.engines import Place, hf
from spo_lightning.records.progress import silent

NAMES = ["clarity", "critical-thinking", "depth"]


def judge_of(url, **keys):
    node, engine = (
        OmegaConf.load(CONF / f"{name}.yaml") for name in ("judge/dynamic", "engine/openai")
    )
    del node["defaults"]
    told = {"base_url": url, "model": "judge", "retries": 0}
    node = OmegaConf.merge(node, {"engine": OmegaConf.merge(engine, told)}, keys)
    asked = Asked(None, None, lambda *_, **__: None, nullcontext, silent(), 4, 64)
    return instantiate(node)(asked)


@pytest.mark.parametrize(
    "text, found",
    [
        ("clarity: 4, says little\ndepth: 2", {"clarity": 4, "depth": 2}),
        (
            "**Clarity** - 5/5\n- Critical Thinking: 3.5 (no doubt)",
            {"clarity": 5, "critical-thinking": 3.5},
        ),
        ('{"clarity": {"score": 1, "reason": "x"}, "depth": 3}', {"clarity": 1, "depth": 3}),
        ("clarity: 10\ndepth: 0\nunclarity: 3", {}),
        ("I cannot say.", {}),
    ],
)
def test_scores_are_read_in_whatever_form_they_come(text, found):
    assert {name: score for name, (score, _) in scores_in(text, NAMES).items()} == found


def test_reasons_and_names():
    assert scores_in("clarity: 4/5 - says little.\n", NAMES)["clarity"] == (4.0, "says little.")
    assert named_in("1. Depth\n2. critical_thinking; not clarityless", NAMES) == NAMES[1:]


def test_it_judges_anywhere_and_picks_once_for_a_question():
    rows = [{"prompt": [{"role": "user", "content": "How?"}]}] * 2
    with playing() as server:
        judge = judge_of(server.url)
        assert judge(rows, ["brief and kind", "brief"]) == [3.0, 2.0]
        assert len(server.asked) == 3  # one question, two answers
        assert judge.compare(rows[:1], ["kind"], ["no"]).wins == [1.0]
        first, *_ = [body["messages"][0]["content"] for body in server.asked]
        assert "user: How?" in first and "sensitivity: it respects" in first
        assert {body["temperature"] for body in server.asked} == {0.0}


@pytest.mark.parametrize(
    "keys, says",
    [
        ({"pick": "Which?"}, "judge.pick has no {prompt}"),
        ({"question": "{prompt} {answer}"}, "judge.question has no {aspects}"),
        ({"aspects": ["clarity"]}, "judge.aspects: give names and what each means"),
    ],
)
def test_refused(keys, says):
    with pytest.raises(UserError) as refused:
        judge_of("http://localhost:1/v1", **keys)
    assert says in str(refused.value)


def test_a_model_beside_the_policy_is_asked_for_where_several_are():
    with pytest.raises(UserError, match="engine.model=x: with engine=hf the command's own"):
        hf(Place(None, 1), model="x")
