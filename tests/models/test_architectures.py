"""docs/models.md against what the code does, and the named architectures at real scales."""

import re
from pathlib import Path

import pytest
import torch
from tiny import gradients

from spo_lightning.data.batch import collate
from spo_lightning.models.architectures.judge import (
    REFUSED,
    RIGHT,
    UNBUILT,
    WRONG,
    built,
    random_pairs,
    read,
    slow,
    verdict,
)
from spo_lightning.models.architectures.small import config_of
from spo_lightning.models.architectures.table import kinds, row, verdicts
from spo_lightning.models.reading import text_config

PAGE = (Path(__file__).parents[2] / "docs" / "models.md").read_text("utf-8")
ROWS = {name: line for line, name in re.findall(r"^(\| `([^`]+)` \|.*)$", PAGE, re.MULTILINE)}
FEW = (  # one of each way, and what must be among the right ones
    *("llama", "gemma2", "gpt_oss", "granite", "cohere", "cohere2", "falcon_h1", "gemma3"),
    *("llama4", "qwen3_5", "gptj", "bert"),
)
SCALES = {  # what real checkpoints have, and what comes out of it
    "granite": ({"logits_scaling": 8.0}, 1 / 8),
    "cohere": ({"logit_scale": 0.0625}, 0.0625),
    "cohere2": ({"logit_scale": 0.25}, 0.25),
    "falcon_h1": ({"lm_head_multiplier": 0.0390625}, 0.0390625),
}


def test_the_page_has_every_architecture():
    assert sorted(ROWS) == kinds()
    assert WRONG not in PAGE


@pytest.mark.parametrize("kind", FEW)
def test_the_page_says_what_the_code_does(kind):
    found = verdict(kind)
    assert row(found) == ROWS[kind]
    assert found.right or found.how == REFUSED
    if found.right:
        assert found.single is not None and found.single <= RIGHT
        # float32 is kept inside, where norms and rotary positions are computed
        assert found.double is not None and found.double <= 1e-5


@pytest.mark.page  # all of it is six minutes of two cores: when transformers moves, not in CI
@pytest.mark.timeout(3600)
def test_the_whole_page():
    """But for what asks for time or a library that another machine may not have."""
    told = list(verdicts(kinds(), jobs=2))
    found = {v.kind: row(v) for v in told}
    assert found.keys() == ROWS.keys()
    wanting = ("too long", "No module named", "library but it was not found")
    for name, line in found.items():
        if not any(why in line or why in ROWS[name] for why in wanting):
            assert line == ROWS[name]
    assert all(v.right or v.how in (REFUSED, UNBUILT) for v in told)


@pytest.mark.parametrize("kind", SCALES)
def test_scales_of_real_checkpoints(kind):
    changes, scale = SCALES[kind]
    config = config_of(kind)
    for name, value in changes.items():
        setattr(config, name, value)
    lm, pairs = built(config), random_pairs()
    plain = slow(lm, pairs)
    scorer, _ = read(lm, pairs)
    assert scorer.reading.scale == scale and not scorer.reading.logits
    torch.testing.assert_close(scorer(collate(pairs, 0)).logps, plain, rtol=0, atol=1e-4)


def test_attention_sinks_are_packed_and_learn():
    lm, pairs = built(config_of("gpt_oss")), random_pairs()
    weights = torch.linspace(-1, 1, sum(len(p.chosen + p.rejected) for p in pairs))
    batch = collate(pairs, 0)
    slow_logps = slow.__wrapped__(lm, pairs)
    (slow_logps * weights).sum().backward()
    expected = gradients(lm)
    lm.zero_grad()
    scorer, _ = read(lm, pairs)
    assert scorer.packs
    (scorer(batch).logps * weights).sum().backward()
    found = gradients(lm)
    assert sum("sinks" in name for name in found) == text_config(lm).num_hidden_layers
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-4)


def test_a_model_that_does_not_build_is_named_with_its_reason():
    found = verdict("blip")
    assert found.how == UNBUILT and "pixel_values" in found.why
