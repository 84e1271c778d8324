"""Every form of a checkpoint's name; what works; what is refused, in one line."""

import sys
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import torch
from checkpoints import REFUSALS, adapters, rewritten, whole
from conftest import command
from tiny import slow_logps
from transformers import AutoModelForCausalLM

from spo_lightning.cache.reference import files_name
from spo_lightning.data.batch import Pair, collate
from spo_lightning.data.encode import encode_pairs
from spo_lightning.errors import UserError
from spo_lightning.models import policy as policies
from spo_lightning.models import sources
from spo_lightning.models.scorer import Scorer

HOW = {"revision": None, "trust_remote_code": False, "dtype": "float32", "attention": "auto"}
load = partial(policies.load, **HOW, config={}, seed=0)


@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_a_checkpoint_that_lacks_something(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    case.make(tmp_path / case.at)
    with pytest.raises(UserError) as raised:
        load(pretrained=case.at)
    assert case.says in str(raised.value) and "\n" not in str(raised.value)


class Gated(BaseHTTPRequestHandler):
    """A hub that wants its terms accepted, or a login."""

    code, kind = 403, "GatedRepo"

    def do_GET(self):  # noqa: N802 (its name is the library's)
        self.send_response(self.code)
        self.send_header("X-Error-Code", self.kind)
        self.send_header("X-Error-Message", "Access to this model is restricted.")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET  # noqa: N815

    def log_message(self, *_):
        pass


class Hidden(Gated):
    """One that does not know the name, or hides it from who is not logged in."""

    code, kind = 401, "RepoNotFound"


@pytest.mark.parametrize(
    "hub, says",
    [
        (Gated, "is gated: accept its terms at"),
        pytest.param(Hidden, "hf auth login", marks=pytest.mark.slow),
    ],
)
def test_a_hub_id_that_needs_a_login(tmp_path, hub, says):
    server = HTTPServer(("127.0.0.1", 0), hub)
    Thread(target=server.serve_forever, daemon=True).start()
    where = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_OFFLINE": "0"}
    where["HF_HOME"] = str(tmp_path / "hub")
    words = ("checkpoint=some/model", "data=slips", "hardware=cpu")
    done = command(tmp_path, *words, module=("-m", "spo_lightning.eval"), **where)
    server.shutdown()
    (line,) = done.err.splitlines()
    assert done.code == 2 and line.startswith("error: some/model") and says in line
    assert not (tmp_path / "eval.json").exists()


# -- what works


def test_more_rows_than_tokens_are_normal(tmp_path):
    """Real embeddings are padded to a round number of rows."""
    lm = AutoModelForCausalLM.from_pretrained(whole(tmp_path / "model"))
    lm.resize_token_embeddings(320)
    lm.save_pretrained(tmp_path / "model")
    made = load(pretrained=str(tmp_path / "model"))
    assert len(made.tokenizer) == 258 and made.lm.config.vocab_size == 320


@pytest.mark.parametrize("pad", [None, "</s>"])
def test_a_pad_token_that_is_the_end_mark_leaves_the_end_scored(tmp_path, pad):
    """Missing, it is the end mark too: what is padding is known by place, not by id."""
    rewritten(whole(tmp_path / "model") / "tokenizer_config.json", pad_token=pad)
    made = load(pretrained=str(tmp_path / "model"))
    assert made.tokenizer.pad_token_id == made.tokenizer.eos_token_id
    rows = [{"prompt": "2+2=", "chosen": "4", "rejected": "five"}] * 2
    how = {
        "max_length": 32,
        "on_mismatch": "split",
        "strict": True,
        "scored": "assistant",
        "where": "here",
    }
    pairs = encode_pairs(rows, made.tokenizer, **how).pairs
    end = made.tokenizer.eos_token_id
    assert pairs[0].chosen[-1] == pairs[0].rejected[-1] == end
    batch = collate(pairs, made.tokenizer.pad_token_id)
    assert (batch.targets == end).sum() == 4
    with torch.no_grad():
        expected = torch.cat([slow_logps(made.lm, pair) for pair in pairs])
        torch.testing.assert_close(Scorer(made.lm, True)(batch).logps, expected)


def test_tied_weights_stay_tied(tmp_path):
    made = load(pretrained=str(whole(tmp_path / "model")))
    assert made.lm.lm_head.weight is made.lm.model.embed_tokens.weight
    made.save(tmp_path / "again", merge=False, card="")
    again = load(pretrained=str(tmp_path / "again"))
    assert again.lm.lm_head.weight is again.lm.model.embed_tokens.weight


def test_shards(tmp_path):
    lm = AutoModelForCausalLM.from_pretrained(whole(tmp_path / "model"))
    (tmp_path / "model/model.safetensors").unlink()
    lm.save_pretrained(tmp_path / "model", max_shard_size="20KB")
    same(load(pretrained=str(tmp_path / "model")).lm, lm)


@torch.no_grad()
def same(mine, other):
    pair = Pair((1, 2, 3), (4, 5, 6), (7, 8))
    assert slow_logps(mine, pair).equal(slow_logps(other, pair))


# -- models that come in a package


def package(site: Path, name: str, *places: str) -> None:
    """An installed package with models at these places, which must not be imported."""
    home = site / name
    home.mkdir(parents=True)
    (home / "__init__.py").write_text("raise SystemExit('it was imported')\n")
    for place in places:
        if place.endswith(".gguf"):
            (home / place).write_bytes(b"GGUF")
        else:
            whole(home / place)
    info = site / f"{name}-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    files = [path.relative_to(site).as_posix() for path in home.rglob("*") if path.is_file()]
    info.joinpath("RECORD").write_text("".join(f"{file},,\n" for file in files))


def test_the_model_directory_of_a_package(tmp_path, monkeypatch):
    package(tmp_path / "site", "a_model", "weights")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    made = load(pretrained="pkg://a_model")
    same(made.lm, load(pretrained=str(tmp_path / "site/a_model/weights")).lm)
    assert made.base == "pkg://a_model"  # which means the same from any directory
    assert sources.found("pkg://a-model").where == sources.found("pkg://a_model").where
    assert "a_model" not in sys.modules

    adapters(tmp_path / "site/a_model/weights", tmp_path / "adapters")
    rewritten(tmp_path / "adapters/adapter_config.json", base_model_name_or_path="pkg://a_model")
    assert load(pretrained=str(tmp_path / "adapters")).base == "pkg://a_model"


def test_several_models_in_a_package(tmp_path, monkeypatch):
    package(tmp_path / "site", "many", "one.gguf", "two.gguf")
    package(tmp_path / "site", "single", "one.gguf")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    with pytest.raises(UserError, match="holds 2 models; give the path of one, e.g. .*one.gguf"):
        sources.found("pkg://many")
    monkeypatch.setattr(sources.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'one.gguf is read by gguf: pip install "spo-lightning'):
        sources.found("pkg://single")


# -- GGUF


@pytest.fixture(scope="module")
def gguf(tmp_path_factory) -> tuple[Path, torch.nn.Module]:
    """A tiny Llama as llama.cpp holds it, and the same from transformers' own loading."""
    writer = pytest.importorskip("gguf")
    where = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(writer, where)
    return where


def write_gguf(writer, where: Path) -> None:
    made = whole(where.parent / "model")
    lm, held = AutoModelForCausalLM.from_pretrained(made), writer.GGUFWriter(where, "llama")
    config, vocab = lm.config, load(pretrained=str(made)).tokenizer.get_vocab() | {"ab": 258}
    lm.resize_token_embeddings(len(vocab))  # no file is without a merge
    lm.save_pretrained(made)
    held.add_context_length(config.max_position_embeddings)
    held.add_embedding_length(config.hidden_size)
    held.add_block_count(config.num_hidden_layers)
    held.add_feed_forward_length(config.intermediate_size)
    held.add_head_count(config.num_attention_heads)
    held.add_head_count_kv(config.num_key_value_heads)
    held.add_layer_norm_rms_eps(config.rms_norm_eps)
    held.add_rope_freq_base(config.rope_parameters["rope_theta"])
    held.add_vocab_size(len(vocab))
    held.add_tokenizer_model("gpt2")
    held.add_token_list(sorted(vocab, key=vocab.__getitem__))
    held.add_token_merges(["a b"])
    held.add_eos_token_id(vocab["</s>"])
    held.add_pad_token_id(vocab["<pad>"])
    held.add_chat_template("{{ messages[0]['content'] }}")
    names = writer.get_tensor_name_map(writer.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in lm.state_dict().items():
        if name == "lm_head.weight":
            continue
        mapped = names.get_name(name.removesuffix(".weight"))
        if ".q_proj." in name or ".k_proj." in name:  # its pairs of rotary dimensions are beside
            heads = config.num_attention_heads
            value = value.view(heads, 2, -1, value.shape[1]).transpose(1, 2).reshape(value.shape)
        held.add_tensor(f"{mapped}.weight", value.contiguous().numpy())
    held.write_header_to_file()
    held.write_kv_data_to_file()
    held.write_tensors_to_file()
    held.close()


def test_a_gguf_file(gguf, tmp_path):
    made, plain = load(pretrained=str(gguf)), load(pretrained=str(gguf.parent / "model"))
    same(made.lm, plain.lm)
    assert made.tokenizer.chat_template == "{{ messages[0]['content'] }}"
    made.save(tmp_path / "saved", merge=False, card="")
    again = load(pretrained=str(tmp_path / "saved"))
    same(again.lm, plain.lm)
    assert "quantization_config" not in (tmp_path / "saved/config.json").read_text()
    assert again.tokenizer.chat_template == made.tokenizer.chat_template
    settings = type("S", (), HOW)
    names = {
        files_name(str(place), settings, torch.device("cpu"), torch.no_grad)
        for place in (gguf, gguf.parent / "model", gguf)
    }
    assert len(names) == 2 and None not in names


def test_adapters_on_a_gguf_file(gguf, tmp_path):
    lora = {"rank": 2, "alpha": 4, "targets": "all-linear", "merge": False, "seed": 0}
    made = policies.adapt(load(pretrained=str(gguf)), **lora)
    with torch.no_grad():
        for p in made.module.parameters():
            if p.requires_grad:
                p.add_(0.1)
    made.save(tmp_path / "out", merge=False, card="")
    again = load(pretrained=str(tmp_path / "out"))
    same(again.lm, made.lm)
    assert again.base == str(gguf)
