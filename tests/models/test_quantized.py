"""Linear layers in four and eight bits: read as transformers reads them, adapted, and merged."""

import json
from contextlib import nullcontext
from pathlib import Path

import peft
import pytest
import torch
from omegaconf import OmegaConf
from test_adapters import PAD_ID, PAIRS, close, load, logps, packed, stirred
from tiny import lora, policy, slow_logps
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from spo_lightning.cache.reference import files_name, weights_name
from spo_lightning.data.batch import collate
from spo_lightning.errors import UserError
from spo_lightning.models import quantized
from spo_lightning.models.quantized import Bits, bits_of
from spo_lightning.models.scorer import Scorer

pytest.importorskip("bitsandbytes")

MODEL = Path(__file__).resolve().parents[3] / "shared/models/stories260k"
MAPS = Path("/proc/self/maps")
KINDS = {
    "nf4": Bits("nf4", False),
    "double": Bits("nf4", True),
    "int8": Bits("int8", False),
}
SIZE = {"hidden_size": 64, "intermediate_size": 96, "initializer_range": 0.1}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    where = tmp_path_factory.mktemp("models") / "base"
    policy("llama-grouped", dtype="float32", **SIZE).save(where, merge=False, card="")
    return where


def theirs(base, bits):
    """As transformers itself has it, with peft's adapters; in training mode, in which bitsandbytes
    rounds no activations."""
    four = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": bits.double_quantization}
    kind = {"load_in_8bit": True} if bits.quantize == "int8" else {"load_in_4bit": True, **four}
    how = BitsAndBytesConfig(**kind)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=how, dtype="float32")


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_transformers_own_model(base, kind):
    bits = KINDS[kind]
    mine = load(base, bits=bits)
    own = theirs(base, bits).train()
    assert bits_of(mine.lm) == bits
    expected = logps(own)
    assert (expected - logps(load(base).lm)).abs().max() > 1e-3  # quantised it is
    close(logps(mine.lm), expected, 0)
    mine.lm.eval()  # in evaluation bitsandbytes would round otherwise
    close(logps(mine.lm), expected, 0)
    close(packed(mine.lm), expected, 2e-5)
    assert type(mine.lm.get_output_embeddings()) is torch.nn.Linear


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_get_the_gradients_of_pefts_own(base, kind):
    mine = stirred(lora(load(base, bits=KINDS[kind])).module)
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    other = stirred(peft.get_peft_model(theirs(base, KINDS[kind]).train(), settings))
    copy = dict(other.named_parameters())
    with torch.no_grad():
        for name, p in mine.named_parameters():
            if p.requires_grad:
                p.copy_(copy[name])
    found = Scorer(mine.get_base_model(), True)(collate(PAIRS, PAD_ID)).logps
    expected = torch.cat([slow_logps(other.get_base_model(), pair) for pair in PAIRS])
    close(found, expected, 2e-5)
    found.sum().backward()
    expected.sum().backward()
    ours = {n: p.grad for n, p in mine.named_parameters() if p.requires_grad}
    assert len(ours) == 28
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, copy[name].grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_merged_they_are_a_plain_checkpoint_of_the_same_numbers(base, tmp_path, kind):
    made = lora(load(base, bits=KINDS[kind]))
    begun = logps(made.lm)
    stirred(made.module)
    expected = logps(made.lm)
    assert (expected - begun).abs().max() > 1e-2
    with made.start():
        close(logps(made.lm), begun, 0)

    made.save(tmp_path / "adapters", merge=False, card="")
    again = load(tmp_path / "adapters")  # says itself in how many bits its base was
    assert bits_of(again.lm) == KINDS[kind]
    close(logps(again.lm), expected, 0)

    made.save(tmp_path / "whole", merge=True, card="")
    close(logps(made.lm), expected, 0)  # saving left it as it was
    config = json.loads((tmp_path / "whole/config.json").read_text())
    assert "quantization_config" not in config and config["dtype"] == "float32"
    close(logps(AutoModelForCausalLM.from_pretrained(tmp_path / "whole")), expected, 5e-5)
    rounded = logps(load(tmp_path / "whole").lm) - logps(load(tmp_path / "adapters").lm)
    full = logps(AutoModelForCausalLM.from_pretrained(base))
    assert rounded.abs().max() < 1e-2 * (full - begun).abs().max()


@pytest.mark.skipif(not MAPS.exists(), reason="needs Linux's list of what is mapped")
def test_the_file_that_was_quantised_is_let_go(tmp_path):
    for kind, bits in {**KINDS, "full": None}.items():
        where = tmp_path / kind
        policy("llama-grouped", dtype="float32", **SIZE).save(where, merge=False, card="")
        made = load(where, bits=bits)
        assert (str(where) in MAPS.read_text()) == (bits is None)
        assert logps(made.lm).isfinite().all()


def test_caches_keep_them_apart(base):
    models = {kind: load(base, bits=bits) for kind, bits in KINDS.items()} | {"full": load(base)}
    names = {kind: weights_name(made, torch.no_grad) for kind, made in models.items()}
    assert len({*names.values()}) == 4
    assert names["nf4"] == weights_name(lora(models["nf4"]), torch.no_grad)
    made = load(base, bits=KINDS["nf4"])
    quantized._layers(made.lm)[0][1].weight.quant_state.absmax[0] *= 2  # a scale, no parameter
    assert weights_name(made, torch.no_grad) != names["nf4"]
    settings = OmegaConf.create({"dtype": "float32", "attention": "auto"})
    settings.trust_remote_code = False
    how = (str(base), settings, torch.device("cpu"), nullcontext)
    by_file = [files_name(*how, bits) for bits in (*KINDS.values(), None)]
    assert len({*by_file}) == 4 and by_file[-1] == files_name(*how)


def test_what_cannot_be_quantised(base, tmp_path, monkeypatch):
    policy("gpt2", dtype="float32", n_embd=64).save(tmp_path / "gpt2", merge=False, card="")
    with pytest.raises(UserError, match="GPT2LMHeadModel, whose matrices stand transposed"):
        load(tmp_path / "gpt2", bits=KINDS["nf4"])
    theirs(base, KINDS["double"]).save_pretrained(tmp_path / "four")
    load(base).tokenizer.save_pretrained(tmp_path / "four")
    with pytest.raises(UserError, match="four is quantised already: leave it out"):
        load(tmp_path / "four", bits=KINDS["nf4"])
    close(logps(load(tmp_path / "four").lm), logps(load(base, bits=KINDS["double"]).lm), 0)
    absent = {"bitsandbytes": None}
    find = quantized.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: absent.get(n, find(n, *a)))
    with pytest.raises(UserError, match=r'pip install "spo-lightning\[bitsandbytes\]"'):
        load(base, bits=KINDS["nf4"])


@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
def test_from_a_gguf_file_or_from_safetensors(tmp_path):
    """A model that was read whole is quantised as one that is read file by file."""
    made = load(MODEL, bits=KINDS["double"])
    whole = load(MODEL).lm
    again = quantized.in_bits(whole, KINDS["double"], {"dtype": torch.float32})
    quantized.prepared(again, "stories")
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        close(again(input_ids=ids).logits, made.lm(input_ids=ids).logits, 0)
        off = (whole(input_ids=ids).logits - made.lm(input_ids=ids).logits).abs().max()
    assert 0 < off < 5
