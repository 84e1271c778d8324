"""Adapters of a checkpoint: read as peft reads them, a start of their own, and written back."""

import json
from pathlib import Path

import peft
import pytest
import torch
from tiny import lora, policy, random_pairs, slow_logps
from transformers import AutoModelForCausalLM

from spo_lightning.cache.reference import weights_name
from spo_lightning.data.batch import collate
from spo_lightning.errors import UserError
from spo_lightning.models import policy as policies
from spo_lightning.models.scorer import Scorer
from spo_lightning.world import World

PAIRS = random_pairs(4)
PAD_ID = 257
KINDS = {
    "lora": peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5),
    "scaled": peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj"], use_rslora=True, alpha_pattern={"v_proj": 32}
    ),
    "dora": peft.LoraConfig(r=4, target_modules="all-linear", use_dora=True),
    "whole head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "tokens": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 5]),
    "loha": peft.LoHaConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "lokr": peft.LoKrConfig(r=4, target_modules=["q_proj", "up_proj"]),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]
    ),
    "oft": peft.OFTConfig(r=0, oft_block_size=8, target_modules=["q_proj"]),
}


def load(where, **changes):
    given = {"revision": None, "trust_remote_code": False, "dtype": "float32", "attention": "auto"}
    return policies.load(pretrained=str(where), **given | {"config": {}, "seed": 0} | changes)


def stirred(module, seed=0):
    """No trained number is at its beginning, where half of them are zero."""
    drawn = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=drawn))
    return module


@torch.no_grad()
def logps(lm):
    """Token by token, as transformers itself computes."""
    return torch.cat([slow_logps(lm, pair) for pair in PAIRS])


@torch.no_grad()
def packed(lm):
    return Scorer(lm, True)(collate(PAIRS, PAD_ID)).logps


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("models") / "base"
    policy("llama-grouped", dtype="float32").save(where, merge=False, card="")
    return where


def written(base, where, settings):
    """A directory of adapters as peft writes it, and what it computes."""
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_pretrained(base)
    settings.task_type, settings.base_model_name_or_path = "CAUSAL_LM", str(base)
    made = stirred(peft.get_peft_model(lm, settings))
    made.save_pretrained(where)
    made.eval()
    return logps(made)


@pytest.mark.parametrize("kind", KINDS)
def test_peft_directories_are_read_as_peft_reads_them(base, tmp_path, kind):
    expected = written(base, tmp_path / "adapters", KINDS[kind])
    assert (expected - logps(load(base).lm)).abs().max() > 1e-2
    made = load(tmp_path / "adapters")
    made.lm.train()  # as it trains: their dropout is off
    close(logps(made.lm), expected)
    close(packed(made.lm), expected, 5e-5)
    assert made.adapted and not made.built

    made.save(tmp_path / "again", merge=False, card="")
    close(logps(load(tmp_path / "again").lm), expected)
    if True:
        made.save(tmp_path / "whole", merge=True, card="")
        close(logps(load(tmp_path / "whole").lm), expected, 2e-5)
        assert not load(tmp_path / "whole").adapted
    close(logps(made.lm), expected, 0)  # saving left it as it was


def test_the_start_is_what_the_adapters_held(base, tmp_path):
    expected = written(base, tmp_path / "adapters", KINDS["lora"])
    made = load(tmp_path / "adapters")
    begun = packed(made.lm)
    name = weights_name(made, torch.no_grad)
    stirred(made.module, seed=1)
    moved = packed(made.lm)
    assert (moved - begun).abs().max() > 1e-2
    with made.start():
        assert packed(made.lm).equal(begun)
        close(packed(made.lm), expected, 5e-5)
    assert packed(made.lm).equal(moved)
    with pytest.raises(KeyError), made.start():
        raise KeyError
    assert packed(made.lm).equal(moved)
    assert weights_name(made, torch.no_grad) == name
    assert policies.adapt(made, **LORA) is made  # it goes on with its own


LORA = {"rank": 0, "alpha": 8, "targets": "all-linear", "merge": False, "seed": 0}


def test_the_reference_is_known_by_adapters_and_their_scale(base, tmp_path):
    """Other adapters, another scale, the same in another place, and none."""
    names = []
    for place, scale in (("one", 1), ("two", 1), ("three", 2)):
        settings = peft.LoraConfig(r=4, lora_alpha=8 * scale, target_modules=["q_proj", "v_proj"])
        written(base, tmp_path / place, settings)
        names.append(weights_name(load(tmp_path / place), torch.no_grad))
    one, two, three = names
    assert one == two != three
    file = tmp_path / "two/adapter_model.safetensors"
    made = load(tmp_path / "two")
    stirred(made.module)
    made.save(tmp_path / "two", merge=False, card="")
    assert file.exists() and weights_name(load(tmp_path / "two"), torch.no_grad) != one
    assert weights_name(load(base), torch.no_grad) not in names


@pytest.mark.parametrize("rank", [0, 2])
def test_fresh_merges_and_begins_anew(base, tmp_path, rank):
    expected = written(base, tmp_path / "adapters", KINDS["lora"])
    made = policies.adapt(load(tmp_path / "adapters"), **LORA | {"rank": rank, "fresh": True})
    close(logps(made.lm), expected)
    trains = {name for name, p in made.lm.named_parameters() if p.requires_grad}
    assert all((".lora_" in name) == bool(rank) for name in trains) and trains
    stirred(made.module)
    with made.start():
        if rank:
            close(logps(made.lm), expected)
    made.save(tmp_path / "out", merge=False, card="")  # its base is in no file
    again = load(tmp_path / "out")
    assert not again.adapted
    close(logps(again.lm), logps(made.lm), 2e-5)


def test_dora_and_rslora_are_pefts(base):
    made = policies.adapt(load(base), **LORA | {"rank": 4, "dora": True, "rslora": True})
    (settings,) = made.module.peft_config.values()
    assert settings.use_dora and settings.use_rslora and settings.r == 4
    expected = packed(load(base).lm)
    close(packed(made.lm), expected, 5e-5)
    stirred(made.module)
    with made.start():
        assert packed(made.lm).equal(expected)


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"], ["lm_head", "q_proj"]])
def test_a_tied_matrix_is_merged_where_the_adapters_stand(tmp_path, targets):
    policy("llama-grouped", dtype="float32", tie_word_embeddings=True).save(
        tmp_path / "tied", merge=False, card=""
    )
    made = policies.adapt(load(tmp_path / "tied"), **LORA | {"rank": 4, "targets": targets})
    stirred(made.module)
    made.save(tmp_path / "whole", merge=True, card="")
    close(logps(load(tmp_path / "whole").lm), logps(made.lm), 2e-5)
    made.save(tmp_path / "apart", merge=False, card="")
    close(logps(load(tmp_path / "apart").lm), logps(made.lm), 0)


def test_saved_adapters_find_their_base_from_anywhere(base, tmp_path, monkeypatch):
    monkeypatch.chdir(base.parent)
    made = policies.adapt(load("base"), **LORA | {"rank": 4})
    stirred(made.module)
    made.save(tmp_path / "out", merge=False, card="")
    monkeypatch.chdir(tmp_path)
    close(logps(load("out").lm), logps(made.lm), 0)


def test_another_base_can_be_named(base, tmp_path):
    written(base, tmp_path / "out", KINDS["lora"])
    file = tmp_path / "out/adapter_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps({**settings, "base_model_name_or_path": "/gone/base"}))
    with pytest.raises(UserError, match="adapters on /gone/base.*model.base=DIR"):
        load(tmp_path / "out")
    expected = logps(load(tmp_path / "out", base=str(base)).lm)
    file.write_text(json.dumps(settings))
    close(logps(load(tmp_path / "out").lm), expected, 0)
    file.write_text(json.dumps({**settings, "base_model_name_or_path": None}))
    with pytest.raises(UserError, match="name no base"):
        load(tmp_path / "out")


def test_adapters_of_the_hub(base, tmp_path, monkeypatch):
    """As the hub's cache holds them."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub/models--some--adapters"
    expected = written(base, place / "snapshots/abc", KINDS["lora"])
    (place / "refs").mkdir()
    (place / "refs/main").write_text("abc")
    made = load("some/adapters")
    assert made.adapted
    close(logps(made.lm), expected)
    assert made.tokenizer.get_vocab() == load(base).tokenizer.get_vocab()  # it has none itself


def prompts(base, where):
    lm = AutoModelForCausalLM.from_pretrained(base)
    settings = peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM")
    settings.base_model_name_or_path = str(base)
    peft.get_peft_model(lm, settings).save_pretrained(where)


def of_another_model(base, where):
    written(base, where, KINDS["lora"])
    other = policy("llama", dtype="float32")
    other.save(base.parent / "other", merge=False, card="")
    rename(where, base_model_name_or_path=str(base.parent / "other"))


def of_fewer_layers(base, where):
    written(base, where, KINDS["lora"])
    rename(where, target_modules=["q_proj"])


def of_more_layers(base, where):
    written(base, where, KINDS["scaled"])
    rename(where, target_modules=["q_proj", "v_proj", "k_proj"])


def as_bin(base, where):
    written(base, where, KINDS["lora"])
    (where / "adapter_model.safetensors").rename(where / "adapter_model.bin")


def cut(base, where):
    written(base, where, KINDS["lora"])
    file = where / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def on_adapters(base, where):
    written(base, base.parent / "first", KINDS["lora"])
    written(base, where, KINDS["lora"])
    rename(where, base_model_name_or_path=str(base.parent / "first"))


def rename(where, **changes):
    file = where / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


WRONG = [
    (prompts, "add tokens to the prompt"),
    (of_another_model, "do not fit their base"),
    (of_fewer_layers, "do not fit their base"),
    (of_more_layers, "do not fit their base"),
    (as_bin, r"\.bin only"),
    (cut, "do not fit their base|does not load"),
    (on_adapters, "holds adapters: export that one merged"),
]


@pytest.mark.parametrize("broken, says", WRONG, ids=lambda case: getattr(case, "__name__", None))
def test_adapters_that_would_be_read_wrongly_are_refused(base, tmp_path, broken, says):
    broken(base, tmp_path / "out")
    with pytest.raises(UserError, match=says) as raised:
        load(tmp_path / "out")
    assert "\n" not in str(raised.value)


def test_a_built_model_with_new_adapters_is_as_it_was(tmp_path):
    """The start is the bare model, bit for bit, and what is saved is merged."""
    made = policy("llama-grouped", dtype="float32")
    expected = packed(made.lm)
    adapted = lora(made)
    stirred(adapted.module)
    with adapted.start():
        assert packed(adapted.lm).equal(expected)
    adapted.save(tmp_path / "out", merge=False, card="", world=World())
    assert not (tmp_path / "out/adapter_config.json").exists()
