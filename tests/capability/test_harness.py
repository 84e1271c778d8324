"""lm-evaluation-harness on the policy in memory: its own numbers, to the last digit."""

import json
import random
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import SMALL, command, environment
from fitting import config
from tiny import lora, policy

from spo_lightning.capability import harness
from spo_lightning.capability.choices import Choices
from spo_lightning.errors import UserError
from spo_lightning.models import policy as policies
from spo_lightning.records.progress import silent

pytest.importorskip("lm_eval", reason="needs the extra lm-eval")

CHOICE = {
    "task": "sums",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
}
WRITTEN = {
    "task": "words",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{choices[answer]}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "metric_list": [{"metric": "exact_match", "ignore_case": True}],
}
WHOLE = {
    "task": "perplexity",
    "output_type": "loglikelihood_rolling",
    "doc_to_text": "",
    "doc_to_target": "{{question}}",
    "metric_list": [{"metric": "byte_perplexity"}],
}


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A directory with three tasks of one file."""
    place = tmp_path_factory.mktemp("tasks")
    chance = random.Random(0)
    rows = []
    for _ in range(24):
        a, b = chance.randrange(10), chance.randrange(10)
        choices = [str(a + b + slip) for slip in (0, 1, -1, 10)]
        rows.append({"question": f"{a}+{b}=", "choices": choices, "answer": 0})
    file = place / "sums.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}}
    for task in (CHOICE, WRITTEN, WHOLE):
        text = yaml.safe_dump({**task, **data, "test_split": "test"})
        (place / f"{task['task']}.yaml").write_text(text)
    return place


def asked(path, *names, limit=None):
    tasks = [f"eval.tasks=[{','.join(names)}]", f"eval.tasks_path={path}"]
    return config(
        *tasks, "eval.tasks_batch_size=4", *([f"eval.tasks_limit={limit}"] if limit else [])
    )


def theirs(directory, path, *names, limit=None):
    """The numbers of the harness on a saved model, and the items' own."""
    import lm_eval

    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(directory), "dtype": "float32"},
        tasks=list(names),
        task_manager=harness.manager(names, str(path)),
        limit=limit,
        batch_size=4,
        device="cpu",
    )
    return found["results"], found["samples"]


@pytest.mark.parametrize("adapted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_numbers_of_the_policy_in_memory_are_those_of_the_saved_model(tasks, tmp_path, adapted):
    names = ("sums", "words", "perplexity")
    made = policy("llama-grouped", dtype="float32")
    made = lora(made) if adapted else made
    for name, value in made.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.1, generator=torch.Generator().manual_seed(2))
    made.lm.train()
    torch.manual_seed(5)
    after = torch.rand(1)
    torch.manual_seed(5)
    numbers, items = harness.results(asked(tasks, *names), made, silent())
    assert torch.rand(1) == after and made.lm.training
    made.save(tmp_path / "model", merge=False, card="")
    found, samples = theirs(tmp_path / "model", tasks, *names)
    told = {
        f"tasks/{task}/{key.removesuffix(',none')}": value
        for task in names
        for key, value in found[task].items()
        if "," in key and value != "N/A"
    }
    assert numbers.keys() == told.keys()
    for name, value in told.items():  # adapters are merged in the saved one, which rounds
        assert numbers[name] == (pytest.approx(value, rel=1e-5) if adapted else value)
    assert items["tasks/sums/acc"] == [row["acc"] for row in samples["sums"]]
    assert 0 < numbers["tasks/sums/acc"] < 1 and numbers["tasks/sums/acc_stderr"] > 0
    assert {"tasks/sums/acc", "tasks/sums/acc_norm", "tasks/words/exact_match"} == items.keys()


@pytest.mark.parametrize("name", ["llama-grouped", "gemma2"])
def test_choices_of_one_question_are_read_together(name):
    """Every log-probability and every greedy answer is the harness's own model's."""
    from lm_eval.models.huggingface import HFLM

    made, chance = policy(name, dtype="float64", initializer_range=0.1), random.Random(3)
    lm: Any = made.lm
    model: Any = HFLM(pretrained=lm, tokenizer=made.tokenizer, batch_size=3)

    def some(most):
        return [chance.randrange(256) for _ in range(chance.randint(1, most))]

    asked = [(("", ""), question, some(9)) for question in map(some, [30] * 6) for _ in range(4)]
    places = slice(0, None, 4)  # of which the first is what the model would say
    for _, question, choice in asked[places]:
        for place in range(len(choice)):
            ids = torch.tensor([question + choice[:place]])
            choice[place] = int(lm(input_ids=ids).logits[0, -1].argmax())
    asked += [asked[0], (("", ""), some(30), some(5)), (("", ""), some(300) + [1] * 250, [5, 6])]
    asked += [(None, [0], some(9)), (None, [0], some(9))]
    own = model._loglikelihood_tokens
    left = []

    def counted(requests, **how):
        left.extend(requests)
        return own(requests, **how)

    chance.shuffle(asked)
    expected = own(asked, disable_tqdm=True)
    model._loglikelihood_tokens = counted
    found = Choices(model)(asked, disable_tqdm=True)
    assert len(left) == 4  # one choice, one too long, two whole texts
    assert [best for _, best in found] == [best for _, best in expected]
    assert 6 <= sum(best for _, best in found) < len(found)
    for (mine, _), (theirs, _) in zip(found, expected):
        assert mine == pytest.approx(theirs, abs=1e-5)
    told: dict = {}  # a choice that stands twice is a tie
    for (_, question, choice), score in zip(asked, found):
        assert told.setdefault((*question, None, *choice), score) == score


def test_the_limit_is_of_each_task(tasks):
    made = policy("llama", dtype="float32")
    items = harness.results(asked(tasks, "sums", limit=5), made, silent())[1]
    assert len(items["tasks/sums/acc"]) == 5


def test_what_is_refused(tasks, tmp_path, monkeypatch):
    # named files, as datasets looks through the whole working directory without them
    lost = {"dataset_path": "json", "dataset_kwargs": {"data_files": str(tmp_path / "no.json")}}
    broken = yaml.safe_dump({**CHOICE, "task": "lost", **lost})
    (tmp_path / "lost.yaml").write_text(broken)
    (tmp_path / "empty").mkdir()
    cases = [
        (asked(tmp_path / "absent", "sums"), "eval.tasks_path=.*absent: no such directory"),
        (asked(tmp_path / "empty", "sums"), "eval.tasks_path=.*empty: no task in it"),
        (asked(tmp_path, "lost"), "eval.tasks: lost: "),
    ]
    for cfg, says in cases:
        with pytest.raises(UserError, match=says):
            harness.check(cfg)
    known = SimpleNamespace(all_tasks=["arc_easy", "sums"])
    monkeypatch.setattr(harness, "index", lambda *_: known)  # all take half a minute
    with pytest.raises(UserError, match="no task 'arc_eazy': did you mean arc_easy?"):
        harness.manager(["arc_eazy"], None)
    monkeypatch.undo()
    harness.index.cache_clear()
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match="pip install 'spo-lightning\\[lm-eval\\]'"):
        harness.manager(["arc_easy"], None)


def test_a_start_is_asked_once_for_all_runs(tasks, tmp_path, monkeypatch):
    """What another start, other questions or no cache are asked is asked anew."""
    import lm_eval

    place = tmp_path / "tasks"
    shutil.copytree(tasks, place)
    file = place / "sums.yaml"
    file.write_text(file.read_text("utf-8").replace(str(tasks), str(place)))
    cfg = asked(place, "sums", limit=5)
    cfg.cache.dir = str(tmp_path / "cache")
    made = policy("llama-grouped", dtype="float32")
    found = harness.results(cfg, made, silent(), start=True)
    whole, calls = lm_eval.simple_evaluate, []

    def counted(**how):
        calls.append(how["tasks"])
        return whole(**how)

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    assert harness.results(cfg, made, silent(), start=True) == found and not calls
    rows = [json.loads(line) for line in (place / "sums.jsonl").read_text("utf-8").splitlines()]
    rows[0]["question"] = "9+9="
    (place / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    harness.results(cfg, made, silent(), start=True)
    assert len(calls) == 1
    with torch.no_grad():
        next(made.lm.parameters()).add_(0.1)
    harness.results(cfg, made, silent(), start=True)
    assert len(calls) == 2
    harness.results(cfg, made, silent())
    assert len(calls) == 3


SHARED = Path(__file__).parents[3] / "shared"
IFEVAL, STORIES = SHARED / "data/ifeval/input_data.jsonl", SHARED / "models/stories260k"


def by_its_command_line(tmp_path, model, names, path, *words):
    """What ``lm_eval`` prints of a saved model, as a process of its own."""
    line = ("--model", "hf", "--model_args", f"pretrained={model}", "--device", "cpu")
    line += ("--tasks", names, "--include_path", path, "--output_path", "out", *words)
    own = command(tmp_path, *line, module=("-m", "lm_eval"), timeout=500, **environment())
    assert own.code == 0, own.err
    (file,) = (tmp_path / "out").rglob("results_*.json")
    return json.loads(file.read_text("utf-8"))["results"]


@pytest.mark.slow
@pytest.mark.skipif(not IFEVAL.is_file(), reason="needs shared/data/ifeval")
def test_ifeval_without_a_network_is_the_command_line_s(tmp_path):
    """Its prompts from a file, its checks from the harness, its sentences from NLTK's data; two of
    its 40 prompts ask for a letter that is none, for which one is drawn."""
    import lm_eval
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        pytest.skip("needs NLTK's punkt_tab, see docs/capability.md")
    task = {
        "include": str(Path(lm_eval.__path__[0]) / "tasks/ifeval/ifeval.yaml"),
        "task": "ifeval_here",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"train": str(IFEVAL)}},
        "generation_kwargs": {"until": [], "do_sample": False, "max_gen_toks": 24},
    }
    (tmp_path / "ifeval_here.yaml").write_text(yaml.safe_dump(task))
    made = policies.load(
        pretrained=str(STORIES),
        revision=None,
        trust_remote_code=False,
        dtype="float32",
        attention="auto",
        config={},
        seed=0,
    )
    numbers, items = harness.results(asked(tmp_path, "ifeval_here", limit=40), made, silent())
    words = ("--limit", 40, "--batch_size", 4)
    found = by_its_command_line(tmp_path, STORIES, "ifeval_here", tmp_path, *words)["ifeval_here"]
    for kind in ("prompt_level_strict_acc", "inst_level_strict_acc"):
        for name in (kind, kind.replace("strict", "loose")):
            assert numbers[f"tasks/ifeval_here/{name}"] == found[f"{name},none"], name
    assert 0 < numbers["tasks/ifeval_here/inst_level_strict_acc"] < 1
    assert len(items["tasks/ifeval_here/prompt_level_strict_acc"]) == 40


@pytest.mark.slow
def test_a_run_gives_what_the_harness_command_line_gives_of_its_saved_model(tasks, tmp_path):
    words = (*SMALL, "loss=dpo", "max_steps=3", "optimizer.lr=1e-2", "report.enabled=false")
    asked = ("eval.tasks=[sums,words]", f"eval.tasks_path={tasks}", "eval.tasks_batch_size=4")
    done = command(tmp_path, *words, *asked, "hydra.run.dir=run", timeout=300)
    assert done.code == 0 and not done.err, done.err
    numbers = json.loads((tmp_path / "run/metrics.json").read_text("utf-8"))
    assert {"tasks/sums/acc", "tasks/words/exact_match"} <= numbers["paired"].keys()
    found = by_its_command_line(tmp_path, "run/model", "sums,words", tasks, "--batch_size", 4)
    for task, key in (("sums", "acc"), ("sums", "acc_norm"), ("words", "exact_match")):
        for name in (key, f"{key}_stderr"):
            assert numbers["final"][f"tasks/{task}/{name}"] == found[task][f"{name},none"]
