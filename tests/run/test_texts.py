"""Runs on texts, one answer a row: what is trained, what is measured, what is refused."""

import csv
import json
from pathlib import Path

import pytest
import torch
from chats import says, tokenizer_of, user
from conftest import forked
from fitting import config
from safetensors.torch import load_file
from tiny import GATED, slow_logps

from spo_lightning.data.encode import encode_texts
from spo_lightning.data.load import load
from spo_lightning.errors import UserError
from spo_lightning.models.policy import opened
from spo_lightning.train import train

TINY = (
    *("model.config.hidden_size=32", "model.config.intermediate_size=48", "hardware=cpu"),
    *("model.config.num_hidden_layers=1", "batch_size=4", "micro_batch_size=2", "max_steps=3"),
    *("eval.max_new_tokens=4", "eval.every_n_steps=1", "log.every_n_steps=1", "data=pairs"),
    *("hardware.threads=1", "cache.enabled=false", "data.eval_fraction=0.3", "loss=sft"),
    *("optimizer.lr=1e-2", "model.dtype=float64", "hardware.precision=64-true"),
)
REJECTED = (
    *("logps/rejected", "preference/accuracy", "preference/accuracy_norm"),
    *("rewards/rejected", "rewards/accuracies", "rewards/margins"),
)
SHOWN = ("nll/chosen", "logps/chosen", "rewards/chosen", "displacement/rate", "mass/top10")
TEXTS = [
    {"prompt": f"{n}+1=", "completion": f"{n + 1}", "answer": f"{n + 1}", "odd": n % 2}
    for n in range(20)
]
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["completion"], "rejected": f"no{n}"}
    for n, row in enumerate(TEXTS)
]
LABELLED = [
    {"prompt": "a", "completion": "b", "label": True},
    {"prompt": "a", "completion": "c", "label": False},
]


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "model" / "model.safetensors")


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A run on texts by the command line, all that needs a rejected answer left on."""
    where = tmp_path_factory.mktemp("texts")
    write(where / "sft.jsonl", TEXTS)
    words = ("data.path=sft.jsonl", "eval.by=odd", "hydra.run.dir=run")
    return where, forked(where, *TINY, *words)


def test_what_needs_a_rejected_answer_is_left_out(ran):
    where, done = ran
    assert done.code == 0, done.err
    assert "logps/rejected" not in done.out and "rewards/margins" not in done.out
    numbers = json.loads((where / "run/metrics.json").read_text())
    for found in (numbers["init"], numbers["final"], *numbers["final"]["by"].values()):
        assert {"exact_match", *SHOWN} <= found.keys() and not {*REJECTED} & found.keys()
    assert set(numbers["final"]["by"]) == {"0", "1"}
    assert numbers["final"]["nll/chosen"] < numbers["init"]["nll/chosen"]
    with (where / "run/metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == 3
    for line in lines:
        assert all(line[f"train/{name}"] for name in SHOWN[:4])
        assert all(line[f"eval/{name}"] for name in SHOWN)
        assert not any(
            line.get(f"{side}/{name}") for side in ("train", "eval") for name in REJECTED
        )
    samples = [json.loads(line) for line in (where / "run/samples.jsonl").open()]
    assert all(row["rejected"] is None and row["rejected_delta"] is None for row in samples)
    assert all(row["reference"] and row["chosen_delta"] for row in samples)
    assert "rejected" not in (where / "run/table.md").read_text()
    assert (where / "run/report.html").exists()


def test_the_held_out_nll_by_hand(ran):
    where, _ = ran
    cfg = config(*TINY, f"data.path={where / 'sft.jsonl'}")
    task = load(cfg.data)
    policy = opened(str(where / "run/model"), cfg.model, "cpu")
    texts = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in task.held_out]
    pairs = encode_texts(texts, policy.tokenizer, max_length=512, scored="assistant")
    each = [slow_logps(policy.lm, pair) for pair in pairs]
    expected = -torch.cat(each).sum() / sum(map(len, each))
    final = json.loads((where / "run/metrics.json").read_text())["final"]
    assert final["nll/chosen"] == pytest.approx(expected.item(), rel=1e-9)
    done = forked(
        where,
        *("checkpoint=run/model", "data=pairs", "data.path=sft.jsonl", "data.eval_fraction=0.3"),
        *("hardware=cpu", "dtype=float64", "hardware.precision=64-true", "eval.max_new_tokens=4"),
        module=("-m", "spo_lightning.eval"),
    )
    assert done.code == 0, done.err
    numbers = json.loads((where / "eval.json").read_text())
    assert numbers["nll/chosen"] == pytest.approx(final["nll/chosen"], rel=1e-9)
    assert not {*REJECTED} & numbers.keys()


@pytest.mark.parametrize("words", [(), ("data.stream=true", "data.chunk_rows=32")])
def test_the_same_weights_as_of_pairs_whatever_is_rejected(ran, tmp_path, words):
    where, _ = ran
    path = write(tmp_path / "pairs.jsonl", PAIRS)
    train(config(*TINY, f"data.path={path}", *words), tmp_path / "of pairs")
    texts = where / "run"
    if words:
        texts = tmp_path / "of texts"
        train(config(*TINY, f"data.path={where / 'sft.jsonl'}", *words), texts)
    found, expected = weights(texts), weights(tmp_path / "of pairs")
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=1e-6)


def test_conversations_under_a_chat_template(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    turns = (says("1"), user("sure?"), says("yes"))
    rows = [{"messages": [user(f"{n}+1"), *turns]} for n in range(20)]
    path, model = write(tmp_path / "sft.jsonl", rows), tmp_path / "model"
    tokenizer = tokenizer_of("chatml")
    sizes = {**GATED, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(model)
    tokenizer.save_pretrained(model)
    small = [word for word in TINY if not word.startswith("model.config")]
    given = ("model=pretrained", f"model.pretrained={model}", f"data.path={path}")
    cfg = config(*small, *given, "solver=penalty")
    found = train(cfg, tmp_path / "run")
    policy = opened(str(model), cfg.model, "cpu")
    row = {"prompt": [user("0+1")], "completion": list(turns)}
    (pair,) = encode_texts([row], policy.tokenizer, max_length=512, scored="assistant")
    assert pair.chosen_context  # the user's turn is read, not scored
    samples = [json.loads(line) for line in (tmp_path / "run/samples.jsonl").open()]
    assert samples[0]["chosen"] == "assistant: 1\nuser: sure?\nassistant: yes"
    assert found["final"]["nll/chosen"] < found["init"]["nll/chosen"]


@pytest.mark.parametrize(
    "words, says",
    [
        (("loss=dpo",), "the layout sft has one answer a row, which compares nothing: name it as"),
        (("loss=spo",), "name it as data.sft, and pairs as data.path; or train with loss=sft"),
        (("data.eval_path=pairs.jsonl",), "data.eval_path: the layout trl gives pairs, and sft,"),
        (("data.eval_path=kto.jsonl",), "data.eval_path: the layout kto gives labelled, and sft,"),
        (("diagnostics.ches.every_n_steps=1",), "every_n_steps=1 compares two answers, and"),
        (("data.drop_high_ches=0.5",), "data.drop_high_ches=0.5 compares two answers, and"),
        (("loss.wpo=true",), "loss.wpo=True compares two answers, and sft.jsonl has one a row"),
    ],
)
def test_refusals(ran, words, says, monkeypatch):
    monkeypatch.chdir(ran[0])
    write(Path("pairs.jsonl"), PAIRS)
    write(Path("kto.jsonl"), LABELLED)
    with pytest.raises(UserError) as caught:
        train(config(*TINY, "data.path=sft.jsonl", *words), Path("refused"))
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_inspect(ran):
    where, _ = ran
    words = ("data=pairs", "data.path=sft.jsonl", "model=llama")
    done = forked(where, *words, module=("-m", "spo_lightning.inspect"))
    assert done.code == 0, done.err
    assert "Layout: sft (prompt, completion as text): 20 rows" in done.out
    assert "0+1=" in done.out and "⟦1</s>⟧" in done.out and "prompt + chosen" in done.out
    for text in (done.out, (where / "inspect.html").read_text()):
        assert "longer answer" not in text and "both ways round" not in text
    assert "rejected" not in done.out
