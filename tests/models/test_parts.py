"""Weights read from their files block by block, and written one by one, are those of the whole."""

import copy
import json
import logging

import pytest
import torch
from safetensors.torch import load_file
from test_sharded import read
from tiny import CONFIGS, lora, policy

from spo_lightning.errors import UserError
from spo_lightning.models import policy as policies
from spo_lightning.models.parts import INDEX
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding

HOW = {"trains": True, "unpaired": False}


def opened(where, *, unread, dtype="float64"):
    return policies.load(
        pretrained=str(where),
        revision=None,
        trust_remote_code=False,
        dtype=dtype,
        attention="auto",
        config={},
        seed=0,
        unread=unread,
    )


def spread(found, world):
    return Sharding(True, 1, False)(found, lambda it: Scorer(it.lm, True), world, **HOW)


def saved(where, name="llama", file_gb=None, **changes):
    policy(name, **changes).save(where, merge=False, card="", file_gb=file_gb)
    return where


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("name", sorted({*CONFIGS} - {"qwen2"}))  # whose tokenizer adds a token
def test_a_model_begins_without_weights_and_ends_as_the_whole(tmp_path, name, tied):
    where = saved(tmp_path / "m", name, file_gb=1e-5, tie_word_embeddings=tied)
    assert (where / INDEX).exists()
    whole, made = (opened(where, unread=unread, dtype="bfloat16") for unread in (False, True))
    assert made.unread is not None and all(p.is_meta for p in made.lm.parameters())
    assert not any(b.is_meta for b in made.lm.buffers())
    made.unread.fill(made.lm, "cpu")
    theirs, mine = (dict([*it.lm.state_dict().items(), *it.lm.named_buffers()])
                    for it in (whole, made))  # fmt: skip
    assert mine.keys() == theirs.keys()
    assert all(mine[n].equal(v) and mine[n].dtype == v.dtype for n, v in theirs.items())
    assert made.lm.config.to_dict() == whole.lm.config.to_dict()
    assert made.lm.generation_config.to_dict() == whole.lm.generation_config.to_dict()
    assert (made.lm.lm_head.weight is made.lm.get_input_embeddings().weight) == tied


@pytest.mark.parametrize("adapters", [False, True])
def test_parts_of_files_compute_as_parts_of_the_whole(group_of_one, tmp_path, adapters):
    """Adapters are drawn before the weights are there, and are the same."""
    where, found = saved(tmp_path / "m"), []
    for unread in (False, True):
        made = opened(where, unread=unread)
        made, scorer = spread(lora(made) if adapters else made, group_of_one)
        assert made.unread is None
        found.append([*read(scorer), *(value for _, value in made.tensors())])
    assert len(found[0]) == len(found[1]) > 30
    assert all(mine.equal(theirs) for mine, theirs in zip(*found, strict=True))


@pytest.mark.parametrize("gb", [5.0, 1e-5])
def test_what_is_written_one_by_one_is_what_transformers_writes(group_of_one, tmp_path, gb):
    """To the byte; 1e-5 takes several files."""
    made = policy(tie_word_embeddings=True)
    made.save(tmp_path / "whole", merge=False, card="", file_gb=gb)
    parts, _ = spread(copy.deepcopy(made), group_of_one)
    parts.save(tmp_path / "parts", merge=False, card="", file_gb=gb)
    names = {path.name for path in (tmp_path / "whole").iterdir()}
    assert {path.name for path in (tmp_path / "parts").iterdir()} == names
    assert (INDEX in names) == (gb < 1)
    for name in names:
        mine, theirs = ((tmp_path / place / name).read_bytes() for place in ("parts", "whole"))
        assert mine == theirs, name


def test_adapters_alone_are_written_without_their_base(group_of_one, tmp_path, monkeypatch):
    made = lora(opened(saved(tmp_path / "m"), unread=True))
    made, _ = spread(made, group_of_one)
    gathered = []
    monkeypatch.setattr(
        "spo_lightning.models.spread.whole", lambda p: gathered.append(p) or p.full_tensor()
    )
    made.save(tmp_path / "parts", merge=False, card="")
    assert 0 < len(gathered) == sum(p.requires_grad for p in made.lm.parameters())
    held = load_file(tmp_path / "parts/adapter_model.safetensors")
    assert len(held) == len(gathered)
    again = opened(tmp_path / "parts", unread=True)  # adapters of a checkpoint: whole
    theirs, mine = (dict(it.lm.named_parameters()) for it in (again, made))
    assert again.unread is None
    assert all(mine[name].full_tensor().equal(value) for name, value in theirs.items())


def test_files_that_hold_other_tensors_are_read_whole_and_said(tmp_path, caplog):
    """Experts stand one by one in files, and together in the model."""
    from transformers import MixtralConfig, MixtralForCausalLM

    where = saved(tmp_path / "m")
    shape: dict = {"vocab_size": 258, "hidden_size": 16, "intermediate_size": 24, "head_dim": 8}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    made = MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=2))
    made.save_pretrained(where)
    with caplog.at_level(logging.INFO):
        found = opened(where, unread=True)
    assert found.unread is None and "Every process reads the whole model" in caplog.text
    assert not any(p.is_meta for p in found.lm.parameters())


def test_a_weight_that_lacks_or_has_another_shape_is_refused_as_ever(tmp_path):
    where = saved(tmp_path / "m", file_gb=1e-5)
    index = json.loads((where / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (where / INDEX).write_text(json.dumps(index))
    config = json.loads((where / "config.json").read_text())
    (where / "config.json").write_text(json.dumps(config | {"intermediate_size": 40}))
    with pytest.raises(UserError, match="does not load: it"):
        opened(where, unread=True)


def test_a_part_in_half_precision_is_as_the_file_rounds(group_of_one, tmp_path):
    where = saved(tmp_path / "m")
    made = lora(opened(where, unread=True, dtype="bfloat16"))
    made, _ = spread(made, group_of_one)
    kept = load_file(where / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    mine = dict(made.lm.named_parameters())["model.layers.0.mlp.up_proj.base_layer.weight"]
    assert mine.full_tensor().equal(kept.to(torch.bfloat16))
