import json

import pytest
from conftest import SMALL
from fitting import config

from spo_lightning.models import generate
from spo_lightning.train import train


@pytest.fixture
def drawn(monkeypatch):
    """The titles of what a model generated, run by run."""
    titles, generated = [], generate.answered

    def watched(policy, rows, how, stages, title):
        if how.engine is None:
            titles[-1].append(title)
        return generated(policy, rows, how, stages, title)

    rooms = ("models.generate", "cache.answers", "evaluation.held_out", "capability.look")
    for room in rooms:
        monkeypatch.setattr(f"spo_lightning.{room}.answered", watched)
    return titles


def ran(home, drawn, name, *words):
    drawn.append([])
    words = [
        *SMALL,
        "judge=answer",
        "loss=dpo",
        "max_steps=2",
        f"cache.dir={home / 'cache'}",
        *words,
    ]
    numbers = train(config(*words), home / name)
    files = ("model/model.safetensors", "model/adapter_model.safetensors", "samples.jsonl")
    kept = [path.read_bytes() for path in (home / name / f for f in files) if path.exists()]
    return {k: v for k, v in numbers.items() if k != "seconds"}, kept


def test_the_next_run_draws_none_and_equals_the_first(tmp_path, drawn):
    off = ran(tmp_path, drawn, "off", "cache.enabled=false")
    assert off == ran(tmp_path, drawn, "cold") == ran(tmp_path, drawn, "warm")
    assert drawn[0] == drawn[1]
    # those of the end are never kept; the rivals' are the start's, and a warm start looks too
    end = ["held-out answers", "held-out samples"]
    assert drawn[1][-5:] == ["held-out samples", *end, *end]
    assert drawn[2] == end
    for path in (tmp_path / "cache" / "start_answers").iterdir():
        path.write_text(path.read_text()[:-3])
    assert ran(tmp_path, drawn, "damaged") == off
    assert drawn[3] == ["held-out samples", *end, *end]


def test_others_are_drawn_anew(tmp_path, drawn):
    ran(tmp_path, drawn, "first")
    kept = tmp_path / "cache" / "start_answers"
    before = {path.name for path in kept.iterdir()}
    assert all(len(json.loads((kept / name).read_text())[0]) == 3 for name in before)
    ran(tmp_path, drawn, "other loss", "loss=ipo", "optimizer.lr=1e-5")
    assert {path.name for path in kept.iterdir()} == before
    for words in (("eval.max_new_tokens=3",), ("seed=1",), ("model.dtype=bfloat16",)):
        ran(tmp_path, drawn, words[0].partition("=")[0], *words)
        now = {path.name for path in kept.iterdir()}
        assert now > before
        before = now
