"""Runs on messages: several turns, text as turns, templates that cannot."""

import json
from contextlib import nullcontext

import pytest
from chats import says, tokenizer_of, user
from conftest import SMALL
from fitting import config
from tiny import GATED, slow_logps

from spo_lightning.data.load import load
from spo_lightning.errors import UserError
from spo_lightning.train import train

ROWS = [
    {
        "prompt": [user(f"{n}+1")],
        "chosen": [says(str(n + 1)), user("sure?"), says("yes")],
        "rejected": [says(str(n))],
    }
    for n in range(20)
]
TEXTS = [{"prompt": f"{n}+1", "chosen": str(n + 1), "rejected": str(n)} for n in range(20)]


@pytest.fixture(scope="module")
def model_of(tmp_path_factory):
    """A directory with a tiny model and the tokenizer of a family."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(family):
        where = tmp_path_factory.mktemp(family)
        tokenizer = tokenizer_of(family)
        ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
        sizes = {**GATED, "max_position_embeddings": 512, "vocab_size": len(tokenizer)}
        LlamaForCausalLM(LlamaConfig(**sizes, **ids)).save_pretrained(where)
        tokenizer.save_pretrained(where)
        return where

    return model


def words_of(tmp_path, rows, model):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return ("data=pairs", f"data.path={data}", "model=pretrained", f"model.pretrained={model}")


def numbers(tmp_path, name, *words):
    small = [w for w in SMALL if not w.startswith(("data", "sft.", "model."))]
    shared = (f"cache.dir={tmp_path / 'cache'}", "max_steps=2", "loss=spo")
    found = train(config(*small, *shared, *words), tmp_path / name)
    return {key: value for key, value in found.items() if key != "seconds"}


def test_answers_of_several_turns_from_a_file_to_the_numbers(tmp_path, model_of):
    words = words_of(tmp_path, ROWS, model_of("chatml"))
    first = numbers(tmp_path, "first", *words)
    assert numbers(tmp_path, "second", *words) == first  # tokens and reference from the cache
    assert numbers(tmp_path, "off", *words, "cache.enabled=false") == first
    streamed = ("data.stream=true", "data.chunk_rows=64")
    assert numbers(tmp_path, "streamed", *words, *streamed)["init"] == first["init"]
    whole = numbers(tmp_path, "whole", *words, "data.scored=all")
    # the user's words are among the tokens of "all"
    assert whole["init"]["logps/chosen"] < first["init"]["logps/chosen"] - 10
    assert whole["init"]["logps/rejected"] == first["init"]["logps/rejected"]


def test_text_as_turns_equals_the_messages(tmp_path, model_of):
    model = model_of("chatml")
    words = words_of(tmp_path, TEXTS, model)
    plain = numbers(tmp_path, "plain", *words)
    turned = numbers(tmp_path, "turned", *words, "data.chat=true", "data.system=Add.")
    system = {"role": "system", "content": "Add."}
    rows = [
        {
            "prompt": [system, user(row["prompt"])],
            "chosen": [says(row["chosen"])],
            "rejected": [says(row["rejected"])],
        }
        for row in TEXTS
    ]
    # the same prompts are held out as of text: split by hand
    names = ("train", "held_out")
    task = load(config(*words).data)
    for name in names:
        prompts = {row["prompt"] for row in getattr(task, name)}
        some = [row for row in rows if row["prompt"][1]["content"] in prompts]
        text = "".join(json.dumps(row) + "\n" for row in some)
        (tmp_path / f"{name}.jsonl").write_text(text)
    train_, held = (f"{tmp_path}/{name}.jsonl" for name in names)
    given = (*words, f"data.path={train_}", f"data.eval_path={held}")
    assert numbers(tmp_path, "messages", *given) == turned
    assert plain["init"] != turned["init"]


def test_the_judge_of_a_likelihood_reads_turns(tmp_path, model_of):
    from spo_lightning.data.encode import encode_texts
    from spo_lightning.judges.local import Asked, likelihood
    from spo_lightning.models.policy import opened
    from spo_lightning.records.progress import silent

    cfg = config(*words_of(tmp_path, ROWS, model_of("chatml")))
    policy = opened(cfg.model.pretrained, cfg.model, "cpu")
    asked = Asked(None, policy, None, nullcontext, silent(), 4, 512)  # type: ignore[arg-type]
    row = {"prompt": [user("1+1")]}
    (found,) = likelihood(asked, model=None, per_token=False)([row], ["2"])
    (pair,) = encode_texts(
        [{**row, "completion": [says("2")]}],
        policy.tokenizer,
        max_length=512,
        scored="assistant",
    )
    assert found == pytest.approx(slow_logps(policy.lm, pair).sum().item(), abs=1e-3)


@pytest.mark.parametrize(
    "family, rows, word, fragment",
    [
        ("gemma", TEXTS, "data.chat=true data.system=Add.", "System role not supported"),
        ("chatml", TEXTS, "data.system=Add.", "set data.chat=true"),
        (
            "gemma",
            [{**ROWS[4], "chosen": [says("a", weight=2)]}],
            "",
            "row 1: a message has weight",
        ),
    ],
)
def test_refusals_in_one_line(tmp_path, model_of, family, rows, word, fragment):
    words = words_of(tmp_path, rows, model_of(family))
    with pytest.raises(UserError) as caught:
        numbers(tmp_path, "out", *words, *word.split(), "data.eval_fraction=0")
    assert fragment in str(caught.value) and "\n" not in str(caught.value)


def test_a_run_says_once_that_text_stays_text(tmp_path, model_of, caplog):
    words = words_of(tmp_path, TEXTS, model_of("chatml"))
    with caplog.at_level("INFO"):
        numbers(tmp_path, "plain", *words)
    told = [line for line in caplog.messages if "stay text" in line]
    assert len(told) == 1 and told[0].startswith("20 rows of text stay text")
    assert "0% of them carry its marks" in told[0] and "data.chat=true" in told[0]
    caplog.clear()
    with caplog.at_level("INFO"):
        numbers(tmp_path, "turned", *words, "data.chat=true")
    assert not [line for line in caplog.messages if "stay text" in line]


def test_a_rewriting_template_ends_the_run(tmp_path, model_of):
    thought = [{**row, "chosen": [says("<think>x</think>a"), *row["chosen"][1:]]} for row in ROWS]
    words = words_of(tmp_path, thought, model_of("qwen3"))
    with pytest.raises(UserError, match=r"row \d+: the chat template writes turn 2 otherwise"):
        numbers(tmp_path, "out", *words)
    assert numbers(tmp_path, "all", *words, "data.scored=all")["init"]
