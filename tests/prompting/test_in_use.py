"""A prompt that was found, in use: by tiny models, as a turn or as text, with examples near."""

import json

import pytest
from chats import tokenizer_of
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf
from pairs import CONF
from tiny import GATED, policy

from spo_lightning.capability.prompted import Bank, under
from spo_lightning.errors import UserError
from spo_lightning.prompting.found import find
from spo_lightning.run.evaluation import evaluate
from spo_lightning.run.sampling import sample
from spo_lightning.world import ALONE

DATA = ("data=pairs", "data.path=rows.jsonl", "data.eval_path=held.jsonl", "hardware=cpu")
FEW = ("eval.max_new_tokens=4", "cache.dir=cache")
EXAMPLES = [{"prompt": f"{n}+1", "completion": str(n + 1)} for n in range(3)]


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A model that has a chat template, one that has none, and rows."""
    from transformers import LlamaConfig, LlamaForCausalLM

    room = tmp_path_factory.mktemp("room")
    tokenizer = tokenizer_of("chatml")
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    sizes = {**GATED, "num_hidden_layers": 1, "max_position_embeddings": 4096}
    made = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=len(tokenizer), **ids))
    made.save_pretrained(room / "chat")
    tokenizer.save_pretrained(room / "chat")
    policy(dtype="float32", num_hidden_layers=1).save(room / "plain", merge=False, card="")
    for name, first in (("rows", 0), ("held", 90)):
        rows = [
            {"prompt": f"{n}+1", "chosen": str(n + 1), "rejected": "0"}
            for n in range(first, first + 4)
        ]
        (room / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (room / "prompt.txt").write_text("Add.\n")
    (room / "examples.jsonl").write_text("".join(json.dumps(one) + "\n" for one in EXAMPLES))
    return room


@pytest.fixture(autouse=True)
def inside(room, monkeypatch):
    monkeypatch.chdir(room)


def composed(name, *words):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(name, [*DATA, *FEW, *words])


def evaluated(*words):
    return evaluate(composed("eval", "output=e.json", *words), ALONE)


def test_a_prompt_is_a_turn_and_examples_are_turns_before_the_question():
    row = {"prompt": "7+1", "chosen": "8", "rejected": "9"}
    found = under(row, "Add.", EXAMPLES[:1], turns=True)
    assert [(turn["role"], turn["content"]) for turn in found["prompt"]] == [
        ("system", "Add."),
        ("user", "0+1"),
        ("assistant", "1"),
        ("user", "7+1"),
    ]
    assert found["chosen"] == [{"role": "assistant", "content": "8"}]
    text = under(row, "Add.", EXAMPLES[:1], turns=False)
    assert text == row | {"prompt": "Add.\n\n0+1\n1\n\n7+1"}
    with pytest.raises(UserError, match="has a system turn of its own"):
        under(found, "Add.", (), turns=True)
    with pytest.raises(UserError, match="of prompts that are text"):
        under(found, "Add.", (), turns=False)


def test_eval_under_a_prompt_is_eval_with_that_system_turn():
    under_it = evaluated("checkpoint=chat", "system_prompt=prompt.txt")
    assert under_it == evaluated("checkpoint=chat", "data.chat=true", "data.system=Add.")
    without = evaluated("checkpoint=chat", "data.chat=true")
    assert under_it["logps/chosen"] != without["logps/chosen"]


def test_a_model_without_a_template_reads_it_as_text():
    with pytest.raises(UserError, match="no chat template .* set system_turn=false"):
        evaluated("checkpoint=plain", "system_prompt=prompt.txt")
    words = ("checkpoint=plain", "system_prompt=prompt.txt", "system_turn=false")
    under_it, without = evaluated(*words), evaluated("checkpoint=plain")
    assert under_it["logps/chosen"] != without["logps/chosen"]


def test_sample_asks_under_it_and_its_pairs_say_so():
    words = ("model=pretrained", "model.pretrained=chat", "samples=2", "judge=function")
    words += (f"judge.path={__name__}.letters", "system_prompt=prompt.txt")
    sample(composed("sample", *words), ALONE)
    with open("pairs.samples.jsonl", encoding="utf-8") as file:
        _, first, *_ = [json.loads(line) for line in file]
    assert first["row"]["prompt"][0] == {"role": "system", "content": "Add."}


@pytest.mark.parametrize("option", ["bm25", "embeddings"])
def test_the_nearest_example_stands_beside_the_question(option):
    pytest.importorskip("bm25s" if option == "bm25" else "transformers")
    node = OmegaConf.load(CONF / f"retrieval/{option}.yaml")
    near = instantiate(OmegaConf.merge(node, {"model": "chat"} if option == "embeddings" else {}))
    texts = ["a large whale in the sea", "how to add two numbers", "the weather of today"]
    rows = [{"prompt": text, "completion": "x"} for text in texts]
    found = Bank(rows, 2, near).nearest("how to add two numbers")
    assert len(found) == 2 and found[-1]["prompt"] == texts[1]
    if option == "bm25":
        assert near("zebra", texts) == [0, 0, 0]


def test_models_of_this_machine_search(tmp_path):
    """Tiny ones write nothing that can be read: the start is kept; a second try asks nothing."""
    words = ("prompt_search", "roles.base.model=chat", "roles.optimizer.model=chat")
    words += ("judge=function", f"judge.path={__name__}.letters", "search.depth=2")
    words += ("search.max_tokens=4", "search.actions=1")
    found = find(composed(*words), tmp_path / "run", {}, [], ALONE)
    assert [node["how"] for node in found["nodes"]] == ["start", "kept", "kept"]
    case = found["nodes"][0]["cases"][0]
    assert found["nodes"][0]["reward"] == len(case["answer"]) == case["score"]
    # of two steps whose question is another; the optimizer is asked anew once each time
    assert found["calls"]["base"]["calls"] == 3 and found["calls"]["optimizer"]["calls"] == 4
    log = (tmp_path / "run/calls.jsonl").read_text()
    assert json.loads(log.splitlines()[0])["asked"][0]["role"] == "system"
    again = find(composed(*words), tmp_path / "run", {}, [], ALONE)
    assert again["nodes"] == found["nodes"]
    assert (tmp_path / "run/calls.jsonl").read_text() == log
    plain = [word.replace("=chat", "=plain") for word in words]
    with pytest.raises(UserError, match="roles.base.model has no chat template"):
        find(composed(*plain), tmp_path / "other", {}, [], ALONE)
    with pytest.raises(UserError, match="roles.optimizer.model has no chat template"):
        find(composed(*plain, "system_turn=false"), tmp_path / "other", {}, [], ALONE)


def letters(row, text):
    return float(len(text))
