"""Bad input: one line on stderr that names the culprit, the right exit code, nothing half-written.

What stays in the run directory is train.log and status.json, which says ``failed`` and why.
"""

import json
import os
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import pytest
from conftest import SMALL, Fork, command, forked
from safetensors.torch import save_file

LEFT = {"train.log", "status.json"}


@dataclass(frozen=True)
class Case:
    """Words of the command line, a fragment of the one line, the exit code."""

    name: str
    words: tuple[str, ...]
    says: str
    code: int = 2
    slow: bool = False  # another case of the default suite takes the same path


GOOD = {"prompt": "2+2=", "chosen": "4", "rejected": "5"}
TURN = [{"role": "user", "content": "Hi"}]
SAID = [{"role": "assistant", "content": "Hello"}]
CHAT = {"prompt": TURN, "chosen": SAID, "rejected": [{"role": "assistant", "content": "No"}]}
# name -> the rows of <name>.jsonl, or its bytes
FILES = {
    "good": [{**GOOD, "prompt": f"{n}+1="} for n in range(12)],
    "empty": b"",
    "latin": json.dumps({**GOOD, "chosen": "caf\u00e9"}, ensure_ascii=False).encode("latin-1"),
    "broken": b"\n".join([json.dumps(GOOD).encode()] * 6 + [b'{"prompt": "2+2=", ']),
    "field": [GOOD, {"prompt": "2+2=", "chosen": "4"}],
    "type": [GOOD, {**GOOD, "chosen": 4}],
    "identical": [{**GOOD, "rejected": "4"}] * 3,
    "hollow": [{**GOOD, "chosen": ""}] * 3,
    "one_hollow": [{**GOOD, "prompt": f"{n}+1=", "chosen": "4" * (n > 0)} for n in range(12)],
    "long": [{**GOOD, "prompt": "2+2=" * 10}] * 3,
    "chat": [CHAT] * 3,
    "role": [{**CHAT, "prompt": [{"role": "wizard", "content": "Hi"}]}],
    "kto": [{"prompt": "2+2=", "completion": "4", "label": True}] * 3,
    "scalar": b"3\n",
    "unasked": [{"prompt": "2+2="}, {"question": "2+2="}],
    "texts": [{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "answer": "4"}],
    "typed_texts": [{"prompt": "2+2=", "completion": "4"}, {"prompt": "2+2=", "completion": 4}],
    "long_texts": [{"prompt": "2+2=" * 10, "completion": "4"}] * 3,
}


def rows(name: str, *more: str) -> tuple[str, ...]:
    return ("data=pairs", f"data.path={name}.jsonl", "data.eval_fraction=0", *more)


MIXED = ("loss=mixture", "data=slips")
DATA = [
    Case("missing file", rows("absent"), "absent.jsonl: no such file"),
    Case("empty file", rows("empty"), "empty.jsonl: the file is empty"),
    Case("not utf-8", rows("latin"), "latin.jsonl:1: not utf-8"),
    Case("broken json", rows("broken"), "broken.jsonl:7: broken JSON"),
    Case("not an object", rows("scalar"), "scalar.jsonl:1: a number, not an object"),
    Case("missing field", rows("field"), "field.jsonl, row 2: no field 'rejected'"),
    Case("wrong type", rows("type"), "type.jsonl, row 2: 'chosen' is a number", slow=True),
    Case("unknown role", rows("role"), "row 1: 'prompt', turn 1 has the unknown role 'wizard'"),
    Case("KTO rows of one label", rows("kto"), "kto.jsonl: no row becomes a pair; Rows that"),
    Case("system turn of texts", rows("good", "data.system=Add."), "set data.chat=true"),
    Case("turns of turns", rows("chat", "data.chat=true"), "data.chat=true has no effect"),
    Case(
        "a row without a prompt",
        rows("good", "eval.prompts=unasked.jsonl"),
        "unasked.jsonl, row 2: no 'prompt': add one",
    ),
    Case("split of a file", rows("good", "data.split=test"), "data.split=test has no effect"),
    Case("no path", ("data=pairs",), "data.path is not set"),
    Case("eval_path alone", ("data=slips", "data.eval_path=good.jsonl"), "data.eval_path"),
    Case(
        "idle eval_fraction",
        rows("good", "data.eval_path=good.jsonl"),
        "data.eval_fraction has no effect: data.eval_path is set",
        slow=True,
    ),
    Case(
        "own texts of pairs",
        rows("good", "data.sft=own"),
        "data.sft=own: pairs has no SFT rows of its own: name a file",
        slow=True,
    ),
    Case("missing texts", ("data=slips", "data.sft=absent.jsonl"), "absent.jsonl: no such file"),
    Case(
        "texts without completion",
        ("data=slips", "data.sft=texts.jsonl"),
        "texts.jsonl, row 2: no field 'completion'",
    ),
    Case(
        "texts of a wrong type",
        rows("good", "data.sft=typed_texts.jsonl"),
        "typed_texts.jsonl, row 2: 'completion' is a number",
        slow=True,
    ),
    Case(
        "no own texts",
        ("data=slips", "data.sft=own", "data.sft_rows=0"),
        "data.sft=own: no SFT row is left",
        slow=True,
    ),
    Case(
        "wrong kind of texts",
        ("data=slips", "data.sft=5"),
        "data.sft=5: give str or list or null",
        slow=True,
    ),
    Case("wrong kind of a data key", ("data=slips", "data.prompts=many"), "data.prompts=many"),
]
# seen once rows are tokens, so after the heavy imports
TOKENS = [
    Case("identical pairs", rows("identical"), "none of 3 pairs survives"),
    Case("empty answers", rows("hollow"), "a response is empty: 3", slow=True),
    Case(
        "strict",
        rows("one_hollow", "data.strict=true"),
        "is empty: correct or remove the row",
        slow=True,
    ),
    Case(
        "long prompts",
        rows("long", "max_length=20"),
        "fills max_length: 3",
        slow=True,
    ),
    Case("no chat template", rows("chat"), "no chat template"),
    Case("texts as turns", rows("good", "data.chat=true"), "no chat template", slow=True),
    Case(
        "long texts",
        rows("good", "data.sft=long_texts.jsonl", "max_length=20"),
        "data.sft=long_texts.jsonl: no row has a prompt and a completion that fit max_length",
        slow=True,
    ),
]
KNOBS = [
    Case("unknown key", ("loss.betaa=1",), "loss.betaa"),
    Case("unknown top key", ("max_step=3",), "max_step", slow=True),
    Case("unknown option", ("loss=nope",), "Could not find 'loss/nope'"),
    Case("unknown nested option", ("loss=spo", "solver/phi=nope"), "solver/phi/nope", slow=True),
    Case("unknown group", ("+los=dpo",), "los is no setting of this command"),
    Case("key of another option", ("solver.weight=3", "loss=dpo", "solver=none"), "solver.weight"),
    Case("added key", ("+sft.foo=1",), "sft.foo is no setting of this command"),
    Case("removed key", ("~max_steps",), "~max_steps removes what is read"),
    Case("idle alpha", ("model.lora.alpha=3",), "model.lora.alpha has no effect: model.lora.rank"),
    Case(
        "idle config",
        ("model.pretrained=x", "model.config.hidden_size=32"),
        "model.config.hidden_size has no effect",
    ),
    Case(
        "idle limit",
        ("eval.tasks_limit=3",),
        "eval.tasks_limit has no effect: eval.tasks names none",
        slow=True,
    ),
    Case("idle epochs", ("epochs=2",), "epochs has no effect: max_steps is set", slow=True),
    Case("idle warm start", ("sft.max_steps=0", "sft.lr=1e-3"), "sft.lr has no effect", slow=True),
    Case(
        "idle texts",
        ("data=slips", "data.sft=own", "loss=dpo", "solver=none"),
        "data.sft has no effect: no lower level reads it",
        slow=True,
    ),
    Case(
        "weight of a barrier",
        ("solver/phi=linear", "solver/schedule=barrier", "solver.weight=2"),
        "solver.weight has no effect: solver/schedule=barrier finds it",
    ),
    Case(
        "idle products",
        ("loss=dpo", "solver=unrolled", "solver/apply=hypergradient", "solver/hvp=exact"),
        "solver.hvp has no effect: only solver/apply=hypergradient with solver.apply.order=second",
        slow=True,
    ),
    Case(
        "products without a pull back",
        ("loss=dpo", "solver=unrolled", "solver.hvp.size=0.01"),
        "solver.hvp.size has no effect",
        slow=True,
    ),
    Case("not a number", ("max_steps=abc",), "max_steps=abc: it must be a whole number"),
    Case("not whole", ("batch_size=1.5",), "batch_size=1.5: it must be a whole number", slow=True),
    Case("infinite", ("max_steps=inf",), "max_steps=inf: it must be finite", slow=True),
    Case("no number", ("loss.beta=nan",), "loss.beta=nan: it must be finite", slow=True),
    Case("negative beta", ("loss.beta=-1",), "loss.beta=-1: it must be above 0"),
    Case(
        "a word for a batch",
        ("batch_size=abc",),
        "batch_size=abc: it must be a whole number",
        slow=True,
    ),
    Case("no batch", ("batch_size=0",), "batch_size=0: it must be at least 1", slow=True),
    Case(
        "not scored",
        ("data.scored=user",),
        "data.scored=user: it must be assistant or all",
        slow=True,
    ),
    Case("negative seed", ("seed=-1",), "seed=-1: it must be at least 0", slow=True),
    Case(
        "absent library",
        ("optimizer._target_=absent_library.AdamW",),
        "absent_library.AdamW needs absent_library: pip install absent_library",
    ),
    Case(
        "unknown to the optimizer",
        ("+optimizer.foo=1",),
        "unexpected keyword argument 'foo'; see conf",
    ),
    Case(
        "two ways to step",
        ("+optimizer.foreach=true",),
        "`fused` and `foreach` cannot be",
        slow=True,
    ),
    Case("negative decay", ("optimizer.weight_decay=-1",), "optimizer.weight_decay=-1", slow=True),
    Case("not a list", ("eval.stop=abc",), "eval.stop=abc: it must be a list", slow=True),
    Case("not a boolean", ("data.strict=maybe",), "data.strict=maybe: it must be true or false"),
    Case("not settings", ("sft=5",), "sft=5: it must be settings", slow=True),
    Case("no text", ("cache.dir=null",), "cache.dir=null: it must be text", slow=True),
    Case("half precision", ("hardware.precision=16-mixed",), "fp16 needs loss scaling"),
    Case(
        "a policy that would not be its reference",
        ("hardware.precision=bf16-true",),
        "set model.dtype=bfloat16 too",
    ),
    Case("bfloat16 that nobody has", ("optimizer.bf16=master",), "optimizer.bf16 has no effect"),
    Case(
        "adapters are in float32",
        ("optimizer.bf16=master", "model.dtype=bfloat16", "model.lora.rank=2"),
        "adapters train, which are in float32",
        slow=True,
    ),
    Case(
        "unknown rounding",
        ("optimizer.bf16=up", "model.dtype=bfloat16"),
        "optimizer.bf16=up: it must be stochastic, master or plain",
        slow=True,
    ),
    Case(
        "inner steps that bfloat16 rounds away",
        ("solver=unrolled", "model.dtype=bfloat16"),
        "solver.lower_lr=0.1 is of steps that the solver takes on the weights itself",
    ),
    Case("the logarithm of 0", ("loss=exo_pair", "loss.label_smoothing=0"), "has no logarithm"),
    Case(
        "the same of dmpo",
        ("loss=dmpo", "loss.alpha=0"),
        "alpha=0: give above 0, which has no logarithm",
    ),
    Case("more flipped than not", ("loss=dmpo", "loss.alpha=0.5"), "alpha=0.5: give above 0"),
    Case("unknown strategy", ("hardware.strategy=foo",), "auto or ddp"),
    Case("a strategy without its keys", ("hardware.strategy=fsdp",), "hardware=fsdp"),
    Case(
        "spread and compiled",
        ("hardware=fsdp", "hardware.compile=true"),
        "hardware.compile=True does not go with hardware=fsdp",
        slow=True,
    ),
    Case("more devices than pairs", ("hardware=ddp", "batch_size=1"), "gives no pair"),
    Case("no equals sign", ("loss.beta",), "loss.beta", slow=True),
    Case("open bracket", ("loss.beta=[",), "loss.beta=["),
    Case("unknown interpolation", ("seed=${nope}",), "nope"),
    Case("no checkpoint named", ("model=pretrained",), "model.pretrained is not set"),
    Case("spo with no solver", ("loss=spo", "solver=none"), "use loss=dpo"),
    Case(
        "compiled twice",
        ("model.attention=flex", "hardware.compile=true"),
        "hardware.compile=True does not go with model.attention=flex",
    ),
    Case(
        "flex on a CPU", ("model.attention=flex", "hardware=cpu"), "no backward there", slow=True
    ),
    Case(
        "flex looked through",
        ("model.attention=flex", "diagnostics.evolution.every_n_steps=1"),
        "diagnostics.evolution.every_n_steps=1 does not go with model.attention=flex",
        slow=True,
    ),
    Case(
        "quantised from nothing",
        ("model.quantize=nf4", "model.lora.rank=2"),
        "model.pretrained=null does not go with model.quantize=nf4: a model that is built here",
    ),
    Case("no such bits", ("model.quantize=fp4",), "it must be nf4, int8 or null", slow=True),
    Case(
        "idle double quantisation",
        ("model.double_quantization=false",),
        "model.double_quantization has no effect: only model.quantize=nf4",
        slow=True,
    ),
    Case("run directory in a file", ("hydra.run.dir=good.jsonl/run",), "cannot write"),
]
WHOLE = ("loss=aot", "data=slips")
KNOBS += [
    Case(
        "one answer to every prompt",
        (
            *("hardware=cpu", "max_steps=1", "eval.max_new_tokens=4", "sft.max_steps=0"),
            *("data.temperature=1e-3", "data.prompts=9", "data.eval_prompts=2"),
        ),
        "the judge likes all samples of every one of 9 prompts alike",
    ),
    Case(
        "a whole batch in parts",
        (*WHOLE, "micro_batch_size=8"),
        "needs all pairs of an outer step at once, and micro_batch_size=8 is less than "
        "batch_size=32",
    ),
    Case(
        "a whole batch by tokens",
        (*WHOLE, "data.tokens_per_batch=512"),
        "tokens_per_batch is",
        slow=True,
    ),
    Case("tokens in a word", ("data.tokens_per_batch=all",), "at least 2, auto (as many as fit)"),
    Case("a whole batch over devices", (*WHOLE, "hardware=ddp"), "hardware.devices="),
    Case(
        "a weight without similarities",
        ("loss=aspo", "loss.alpha=0.5"),
        "loss.alpha=0.5 weighs similarities, and there are none",
    ),
    Case(
        "similarities without a weight",
        ("loss=aspo", "loss.similarity=mine.near"),
        "loss.similarity has no effect: loss.alpha is 0",
        slow=True,
    ),
    Case("a pilot of no tokens", ("loss=sgdpo", "loss.r1=0"), "loss.r1", slow=True),
    Case(
        "half of the labels",
        ("loss=robust", "loss.label_smoothing=0.5"),
        "and below 0.5",
        slow=True,
    ),
    Case("weights of sorted pairs", ("loss=aot", "loss.wpo=true"), "loss.wpo", slow=True),
    Case(
        "a divergence without ratios",
        ("loss=simpo", "loss/divergence=js"),
        "loss/divergence",
        slow=True,
    ),
    Case(
        "a key of a part that does not count",
        ("loss=mixture", "loss.parts.dpo.weight=1", "loss.parts.ipo.beta=0.2"),
        "loss.parts.ipo.beta has no effect: loss.parts.ipo.weight is 0",
    ),
    Case(
        "a part of labels",
        (*MIXED, "loss.parts.kto.weight=1"),
        "one answer and a label, and",
        slow=True,
    ),
    Case("a part of a batch", (*MIXED, "loss.parts.aot.weight=1"), "needs all pairs of a step"),
    Case(
        "a part of sentences",
        (*MIXED, "loss.parts.aspo.weight=1"),
        "it reads sentences, which",
        slow=True,
    ),
    Case(
        "a part of rewards",
        (*MIXED, "loss.parts.reward.weight=1"),
        "the rewards of a head",
        slow=True,
    ),
    Case(
        "a part of questions",
        (*MIXED, "loss.parts.ranker.weight=1"),
        "it reads questions",
        slow=True,
    ),
]
# the constructors of losses, solvers and models refuse these: torch is imported first
BUILT = [
    Case("a mixture of nothing", ("loss=mixture", "data=slips"), "give some part a weight"),
    Case("lengths of means", ("loss=simpo", "loss.ld_alpha=0.5"), "loss.ld_alpha", slow=True),
    Case(
        "no scores",
        rows("good", "loss=odpo"),
        "train, row 1: no score, and this loss needs one above 0: give margin",
        slow=True,
    ),
    Case("no side", rows("good", "loss=xpo"), "no training row says which answer", slow=True),
    Case("added key of a loss", ("+loss.betaa=1",), "betaa"),
    Case("added key of a solver", ("+solver.x=1",), "'x'", slow=True),
    Case(
        "inert margin",
        ("solver/phi=linear", "solver.margin=0.1"),
        "solver.margin=0.1 has no effect with solver/phi=linear",
    ),
    Case(
        "inert value", ("solver/phi=linear", "solver/value=running_min"), "running_min", slow=True
    ),
    Case(
        "dual with a hinge",
        ("solver/schedule=dual",),
        "a weight that follows the violation (solver/schedule=dual, barrier) prices it by itself",
    ),
    Case(
        "inner value of a linear price",
        ("solver/phi=linear", "solver/value=inner"),
        "solver/value=inner has no effect with solver/phi=linear",
        slow=True,
    ),
    Case(
        "unknown order",
        ("loss=dpo", "solver=unrolled", "solver/apply=hypergradient", "solver.apply.order=third"),
        "solver.apply.order must be first or second, not third",
        slow=True,
    ),
    Case(
        "negative gamma",
        ("loss=dpo", "solver=implicit", "solver.gamma=-1"),
        "solver.gamma must be above 0, not -1",
        slow=True,
    ),
    Case("negative weight", ("solver.weight=-1",), "solver.weight", slow=True),
    Case("unknown dtype", ("model.dtype=float8",), "model.dtype=float8"),
    Case("no such directory", ("model.pretrained=./absent",), "no such checkpoint: absent"),
    Case("no config.json", ("model.pretrained=./hollow",), "it has no config.json"),
    Case(
        "no such reference", ("model.reference=./absent",), "no such checkpoint: absent", slow=True
    ),
    Case("not in the cache", ("model=pretrained", "model.pretrained=no/such"), "HF_HUB_OFFLINE"),
    Case(
        "no weights",
        ("model=pretrained", "model.pretrained=./weightless"),
        "does not load",
        slow=True,
    ),
    Case("another family", ("model=gpt2", "model.pretrained=./llama"), "not gpt2", slow=True),
    Case("heads", ("model.config.hidden_size=33",), "model.config does not build"),
    Case(
        "targets",
        ("model.lora.rank=2", "model.lora.targets=nope"),
        "model.lora.targets=nope",
        slow=True,
    ),
    Case("no such ckpt_path", ("ckpt_path=absent.ckpt",), "ckpt_path=absent.ckpt: no such file"),
    Case(
        "no checkpoint of ours",
        ("ckpt_path=good.jsonl",),
        "good.jsonl: no whole checkpoint of ours",
        slow=True,
    ),
]
ALL = [*DATA, *TOKENS, *KNOBS, *BUILT]
BASE = ("hardware=cpu", "max_steps=2", "cache.dir=cache")


def _write_models(home: Path) -> None:
    config = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 258}
    (home / "hollow").mkdir()
    for name in ("llama", "weightless"):
        (home / name).mkdir()
        (home / name / "config.json").write_text(json.dumps(config))
    import torch

    save_file({"x": torch.zeros(1)}, home / "llama" / "model.safetensors")
    from spo_lightning.models.policy import byte_tokenizer

    for name in ("llama", "weightless"):
        byte_tokenizer().save_pretrained(home / name)


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("bad")
    for name, content in FILES.items():
        if isinstance(content, list):
            content = "".join(json.dumps(row) + "\n" for row in content).encode()
        (home / f"{name}.jsonl").write_bytes(content)
    _write_models(home)
    return home


def _base(case: Case) -> tuple[str, ...]:
    """Settings of a small run; what the case sets itself, or makes idle, is left out."""
    if case in TOKENS or case in BUILT:
        return (*BASE, "data=slips", *(["sft.max_steps=0"] if "sft" not in str(case) else []))
    return ()


def begin(home: Path, case: Case):
    place = home / "runs" / case.name.replace(" ", "_")
    own = any("hydra.run.dir" in word for word in case.words)
    where = () if own else (f"hydra.run.dir={place}",)
    given = [*_base(case), *case.words, *where]
    if case in TOKENS:  # the case names its data itself
        given = [word for word in given if word not in ("data=slips",)]
    return Fork.begin(home, *given), place


@pytest.fixture(scope="module")
def ended(home, request):
    """Every selected case, two at a time."""
    selected = [getattr(item, "callspec", None) for item in request.session.items]
    cases = [spec.params["case"] for spec in selected if spec and "case" in spec.params]
    cases = [case for case in cases if case in ALL]
    begun = ((case.name, *begin(home, case)) for case in cases)
    # the next one has begun before a pair is handed out
    two = pairwise(chain(begun, [None]))
    return {name: (fork.end(), place) for (name, fork, place), _ in two}


def marked(case: Case):
    return pytest.param(case, id=case.name, marks=[pytest.mark.slow] if case.slow else [])


@pytest.mark.parametrize("case", map(marked, ALL))
def test_one_line(ended, case):
    done, place = ended[case.name]
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("error: ") and case.says in lines[0]
    assert done.code == case.code
    assert not place.exists() or {path.name for path in place.iterdir()} <= LEFT
    if (place / "status.json").exists():
        status = json.loads((place / "status.json").read_text())
        assert status["state"] == "failed" and case.says in status["error"]


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_no_gpu(home):
    done = forked(home, "hardware=gpu", "data=slips", "hydra.run.dir=runs/gpu")
    assert done.code == 2 and done.err.count("\n") == 1 and "use hardware=cpu" in done.err


def test_directory_without_permission(home):
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    closed = home / "closed"
    closed.mkdir(mode=0o500)
    done = command(home, "data=slips", f"hydra.run.dir={closed / 'run'}")
    assert done.code == 2 and done.err.count("\n") == 1 and "cannot write" in done.err


def test_dropped_pairs_are_counted(home, cache):
    words = ["data=pairs", "data.path=one_hollow.jsonl", "hydra.run.dir=runs/counted", cache]
    small = [word for word in SMALL if not word.startswith(("data", "sft"))]
    done = forked(home, *small, *words, "max_steps=0", "data.eval_fraction=0.2")
    assert (done.code, done.err) == (0, "")
    assert "dropped/empty 1" in done.out


@pytest.mark.slow
def test_a_series_that_diverges(home, cache):
    words = ["loss=dpo", "solver=implicit", "solver/solve=neumann", "solver.gamma=1000"]
    done = command(home, *SMALL, cache, *words, "max_steps=2", "hydra.run.dir=runs/diverges")
    assert done.code == 1
    (line,) = done.err.splitlines()
    assert "Neumann series: gamma |H| is at least" in line and "or use solver/solve=cg" in line
    status = json.loads((home / "runs/diverges/status.json").read_text())
    assert (status["state"], status["error"]) == ("failed", line.removeprefix("error: "))


@pytest.mark.slow
def test_a_sweep_finishes_the_other_jobs(home, cache):
    done = command(home, "-m", "seed=0,-1,1.5", *SMALL, cache, "max_steps=1", "hydra.sweep.dir=s")
    assert done.code == 3
    first, second = done.err.splitlines()
    assert first.startswith("job 1 (seed=-1)") and first.endswith("it must be at least 0")
    assert second.startswith("job 2 (seed=1.5)") and second.endswith("a whole number")
    assert json.loads((home / "s/0/status.json").read_text())["state"] == "finished"
    assert "it must be at least 0" in (home / "s/1/train.log").read_text()
    assert not list((home / "s/1").glob("*.json"))


def test_a_sweep_that_does_not_compose_runs_nothing(home):
    done = command(home, "-m", "loss=dpo,nope", *SMALL, "hydra.sweep.dir=never")
    assert done.code == 2 and done.err.count("\n") == 1 and "loss/nope" in done.err
    assert not (home / "never/0").exists()
