"""Held-out numbers: text metrics, win rate, generation, a run without steps, the saved model."""

import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fitting import config
from tiny import lora, policy, random_pairs, slow_logps

from spo_lightning.data.tasks.slips import slips
from spo_lightning.errors import UserError
from spo_lightning.evaluation.held_out import shown, text_numbers
from spo_lightning.evaluation.text_metrics import ExactMatch, Rouge
from spo_lightning.models import policy as policies
from spo_lightning.models.generate import Decoding, answered, answers
from spo_lightning.records.progress import silent
from spo_lightning.train import train

WORDS = ["the", "cat", "sat", "on", "a", "mat", "ran", "12", "o'clock", "Cats,", "running."]


def test_exact_match_by_hand():
    found = ExactMatch(keep_in_memory=True).compute(
        predictions=["12", "7", "", "a b"], references=["12", "8", "", "a  b"]
    )
    assert found == {"exact_match": 0.5}


def test_rouge_by_hand():
    found = Rouge(keep_in_memory=True).compute(
        predictions=["the cat sat", "mat the on"], references=["the cat ran", "on the mat today"]
    )
    # unigrams 2 of 3 and 2 of 3; then 3 of 3 and 3 of 4: F = 2/3 and 6/7
    assert found["rouge1"] == pytest.approx((2 / 3 + 6 / 7) / 2, abs=1e-12)
    # bigrams 1 of 2 and 1 of 2; then none
    assert found["rouge2"] == pytest.approx(0.25, abs=1e-12)
    # longest common subsequence 2; then 1: precision 1/3, recall 1/4
    assert found["rougeL"] == pytest.approx((2 / 3 + 2 / 7) / 2, abs=1e-12)


def test_rouge_equals_rouge_score():
    from rouge_score.rouge_scorer import RougeScorer

    chance = random.Random(0)
    texts = [" ".join(chance.choices(WORDS, k=chance.randint(0, 12))) for _ in range(80)]
    predictions, references = texts[:40], texts[40:]
    found = Rouge(keep_in_memory=True).compute(predictions=predictions, references=references)
    scorer = RougeScorer(list(found), use_stemmer=False)
    for kind, value in found.items():
        expected = [
            scorer.score(target=r, prediction=p)[kind].fmeasure
            for p, r in zip(predictions, references)
        ]
        assert value == pytest.approx(sum(expected) / 40, abs=1e-9)
        assert 0 < value < 1


def test_text_numbers_follow_what_the_data_has():
    task = slips(
        path=None,
        eval_path=None,
        eval_fraction=0.1,
        max_rows=None,
        seed=0,
        operations=2,
        digits=1,
        sft_rows=0,
        prompts=8,
        eval_prompts=4,
    )
    rows = task.held_out
    right = [row["chosen"] for row in rows]
    assert text_numbers(task, rows, right) == {"exact_match": 1.0}
    one_wrong = [rows[0]["rejected"], *right[1:]]
    assert text_numbers(task, rows, one_wrong) == {"exact_match": 0.75}
    assert text_numbers(task, [{"prompt": "x", "chosen": "y"}], ["y"]) == {}
    turns = [{"role": "assistant", "content": "y"}, {"role": "user", "content": "z"}]
    summed = text_numbers(replace(task, summary=True), [{"chosen": turns}], ["y"])
    assert summed["rouge1"] == 1.0  # the assistant's words alone, and no name of a role


def test_messages_are_shown_as_one_text():
    assert shown([{"role": "user", "content": "hi"}]) == "user: hi"
    call = {"role": "assistant", "tool_calls": [{"name": "add"}]}
    assert shown([call]) == 'assistant: [{"name": "add"}]'


def decoding(size, temperature=0.0, seed=0):
    return Decoding(12, size, (), temperature, seed)


ROWS = [{"prompt": "".join(random.Random(n).choices("abc 12+=", k=n + 1))} for n in range(9)]


@pytest.mark.parametrize("family", ["llama-grouped", "gpt2"])
def test_greedy_answers_in_batches_are_the_answers_one_by_one(family):
    made = policy(family)
    batched = answers(made, ROWS, decoding(4), silent(), "")
    assert batched == answers(made, ROWS, decoding(1), silent(), "")
    assert batched == [by_hand(made, row["prompt"]) for row in ROWS]
    assert len(set(batched)) > 1


@torch.no_grad()
def by_hand(made, prompt):
    ids = made.tokenizer(prompt)["input_ids"]
    start = len(ids)
    while len(ids) < start + 12:
        ids.append(made.lm(input_ids=torch.tensor([ids])).logits[0, -1].argmax().item())
        if ids[-1] == made.tokenizer.eos_token_id:
            break
    return made.tokenizer.decode(ids[start:], skip_special_tokens=True)


def test_an_answer_near_the_end_of_the_context_is_not_cut_by_whom_it_stands_beside():
    made = policy("llama-grouped", max_position_embeddings=32)
    rows = [{"prompt": "ab" * n} for n in (5, 10, 11, 13, 16, 20)]
    batched = answers(made, rows, decoding(6), silent(), "")
    assert batched == answers(made, rows, decoding(1), silent(), "")
    assert len({*map(len, batched)}) > 2 and batched[-2:] == ["", ""]


def writes_letters():
    """A policy whose greedy answers are small letters."""
    made = policy("llama-grouped")
    for token in range(made.lm.lm_head.weight.shape[0]):
        if not re.fullmatch("[a-z]", made.tokenizer.decode([token])):
            made.lm.lm_head.weight.data[token] = 0
    return made


@pytest.mark.parametrize("size", [1, 4])
def test_texts_of_several_tokens_end_an_answer_in_a_batch_too(size):
    made = writes_letters()
    whole = answered(made, ROWS, decoding(4), silent(), "")
    stop = whole[0].text[5:7], whole[1].text[3:6]
    found = answered(made, ROWS, replace(decoding(size), stop=stop), silent(), "")
    for one, before in zip(found, whole):
        places = [before.text.find(text) for text in stop]
        end = min((place for place in places if place >= 0), default=None)
        assert one.text == before.text[:end] and one.cut == (end is None)
    assert {one.cut for one in found} == {True, False}


@pytest.mark.parametrize("stop", ["", 5])
def test_what_ends_an_answer_is_a_text(stop):
    with pytest.raises(UserError, match="eval.stop: .* is no text"):
        answers(policy(), ROWS, replace(decoding(4), stop=(stop,)), silent(), "")


def test_samples_follow_their_seed():
    made = policy("llama-grouped")
    one = answers(made, ROWS, decoding(4, 1.0, 5), silent(), "")
    torch.manual_seed(99)
    assert answers(made, ROWS, decoding(4, 1.0, 5), silent(), "") == one
    assert answers(made, ROWS, decoding(4, 1.0, 6), silent(), "") != one
    assert answers(made, ROWS, decoding(4), silent(), "") != one


TINY = [
    "data=slips",
    "data.sft_rows=0",
    "data.prompts=24",
    "data.eval_prompts=6",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1",
    "batch_size=8",
    "eval.max_new_tokens=4",
    "optimizer=sgd",
    "optimizer.lr=0.3",
    "hardware=cpu",
]


@pytest.mark.parametrize("data", ["slips", "arithmetic"])
def test_a_run_without_steps_ends_where_it_began(tmp_path, data):
    rest = [text for text in TINY if not text.startswith("data=")]
    given = [f"data={data}", "data.operations=1", "data.digits=1", f"cache.dir={tmp_path}"]
    numbers = train(config(*rest, *given, "max_steps=0"), tmp_path / "run")
    assert numbers["steps"] == 0
    assert numbers["final"] == numbers["init"]
    assert ("win_rate" in numbers["init"]) == (data == "arithmetic")
    if data == "slips":  # an untrained model's samples are all ties
        assert numbers["init"]["displacement/chosen"] == pytest.approx(0, abs=1e-5)


def test_the_saved_model_of_a_run_gives_the_runs_final_numbers(tmp_path):
    cfg = config(*TINY, "max_steps=3", f"cache.dir={tmp_path}", "loss=dpo")
    numbers = train(cfg, tmp_path / "run")
    again = config(
        *[text for text in TINY if not text.startswith("model.config")],
        "model=pretrained",
        f"model.pretrained={tmp_path / 'run' / 'model'}",
        "max_steps=0",
        f"cache.dir={tmp_path}",
    )
    found = train(again, tmp_path / "again")["init"]
    changed = [n for n in found if not n.startswith(("rewards", "displacement"))]
    assert {"nll/chosen", "logps/rejected", "entropy/top10"} <= set(changed)
    for name in changed:
        assert found[name] == pytest.approx(numbers["final"][name], rel=1e-6), name
    assert found["nll/chosen"] != pytest.approx(numbers["init"]["nll/chosen"], rel=1e-4)


def trained_adapters(made):
    adapted = lora(made)
    for name, value in adapted.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3, generator=torch.Generator().manual_seed(2))
    return adapted


def reopened(directory: Path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert list(directory.glob("*.safetensors")) and not list(directory.glob("*.bin"))
    AutoTokenizer.from_pretrained(directory)
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float64)


@torch.no_grad()
def same(lm, other):
    # merging adapters rounds: W x + B A x against (W + B A) x
    for pair in random_pairs(4):
        torch.testing.assert_close(
            slow_logps(lm, pair), slow_logps(other, pair), rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("family", ["llama-grouped", "gpt2"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_policy_reloads(tmp_path, family, tied):
    made = policy(family, tie_word_embeddings=tied)
    made.save(tmp_path / "full", merge=False, card="")
    same(reopened(tmp_path / "full"), made.lm)

    adapted = trained_adapters(made)  # the base was built here, so adapters are merged
    adapted.save(tmp_path / "merged", merge=False, card="")
    assert not (tmp_path / "merged" / "adapter_config.json").exists()
    same(reopened(tmp_path / "merged"), adapted.lm)
    with adapted.start():
        same(reopened(tmp_path / "full"), adapted.lm)  # saving left the base as it was


@pytest.mark.parametrize("merge", [False, True])
def test_adapters_of_a_checkpoint_reload(tmp_path, merge):
    policy().save(tmp_path / "base", merge=False, card="")
    base = policies.load(
        pretrained=str(tmp_path / "base"),
        revision=None,
        trust_remote_code=False,
        dtype="float64",
        attention="sdpa",
        config={},
        seed=0,
    )
    adapted = trained_adapters(base)
    adapted.save(tmp_path / "out", merge=merge, card="")
    assert (tmp_path / "out" / "adapter_config.json").exists() != merge
    same(reopened(tmp_path / "out"), adapted.lm)
