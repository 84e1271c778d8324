"""Every yaml: documented, composes, trains three steps, and trains to parameters of its own."""

import hashlib
import json
import random

import pytest
import torch
import yaml
from fitting import config
from pairs import CONF
from tiny import policy

from spo_lightning.config import knobs
from spo_lightning.train import train

TRAIN = [
    "batch_size=8",
    "micro_batch_size=4",
    "max_steps=3",
    "log.every_n_steps=1",
    "eval.every_n_steps=0",
    "eval.max_rows=4",
    "eval.max_new_tokens=3",
    "checkpoint.every_n_steps=0",
    "checkpoint.monitor=null",
    "sft.max_steps=0",
]
SLIPS = ["data=slips", "data.sft_rows=0", "data.prompts=16", "data.eval_prompts=4"]
LLAMA = [
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1",
]
# those of images have runs of their own in tests/run/test_image_runs.py
IMAGES = ("shapes", "images", "diffusion", "diffusion_shapes")
SEVERAL = ("ddp", "fsdp", "fsdp_hybrid")  # processes
PLAIN = ["optimizer=sgd", "optimizer.lr=0.5", "hardware=cpu"]


def options(group):
    return sorted(path.stem for path in (CONF / group).glob("[!_]*.yaml"))


def hashed(directory):
    weights = (directory / "model" / "model.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest()


def trained(tmp_path, *overrides):
    """Three steps; the hash of the parameters."""
    cfg = config(*TRAIN, *overrides, f"cache.dir={tmp_path / 'cache'}")
    directory = tmp_path / f"run-{len(list(tmp_path.glob('run-*')))}"
    numbers = train(cfg, directory)
    assert numbers["steps"] == 3
    rows = (directory / "metrics.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["step", "1", "2", "3"]
    assert json.loads((directory / "status.json").read_text())["state"] == "finished"
    return hashed(directory)


def assert_all_differ(table):
    alike = {}
    for name, value in table.items():
        alike.setdefault(value, []).append(name)
    assert all(len(names) == 1 for names in alike.values()), [*alike.values()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    where = tmp_path_factory.mktemp("checkpoint")
    policy("llama", dtype="float32", num_hidden_layers=1).save(where, merge=False, card="")
    return where


def test_losses_train_apart(tmp_path):
    shared = (*SLIPS, *LLAMA, *PLAIN, "micro_batch_size=8")  # some need the whole batch
    parts = ("loss.parts.dpo.weight=1", "loss.parts.sft.weight=0.1")
    table = {}
    # rows with scores, with sentences and with a reference's answers have tests of their own
    for loss in (loss for loss in options("loss") if loss not in ("odpo", "aspo", "xpo")):
        more = parts if loss == "mixture" else ()
        table[loss] = trained(tmp_path, f"loss={loss}", *shared, *more)
    for kind in options("loss/divergence"):
        if kind != "reverse_kl":
            table[kind] = trained(tmp_path, f"loss/divergence={kind}", *shared)
    for key in ("loss.wpo=true", "loss.ld_alpha=0.5"):
        table[key] = trained(tmp_path, "loss=dpo", *shared, key)
    table["start"] = start(tmp_path)
    assert_all_differ(table)


def test_odpo_trains_on_rows_with_scores(tmp_path):
    scores = [{"margin": 0.5}, {"score_chosen": 3, "score_rejected": 1}]
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a - b), **scores[a % 2]}
        for a, b in ((a, a % 7 + 1) for a in range(24))
    ]
    write(tmp_path / "scored.jsonl", rows)
    where = ["data=pairs", f"data.path={tmp_path / 'scored.jsonl'}", *LLAMA, *PLAIN]
    alike = [trained(tmp_path, f"loss={loss}", *where) for loss in ("odpo", "dpo")]
    assert alike[0] != alike[1]


def test_xpo_turns_from_the_references_answers(tmp_path):
    rows = [
        {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a - b), **side}
        for a, b in ((a, a % 7 + 1) for a in range(24))
        for side in ({"reference_side": ("chosen", "rejected")[a % 2]} if a % 3 else {},)
    ]
    write(tmp_path / "sides.jsonl", rows)
    where = ["data=pairs", f"data.path={tmp_path / 'sides.jsonl'}", *LLAMA, *PLAIN]
    strong, none, dpo = (
        trained(tmp_path, *words, *where)
        for words in (["loss=xpo", "loss.alpha=0.5"], ["loss=xpo", "loss.alpha=0"], ["loss=dpo"])
    )
    assert none == dpo and strong != dpo


def test_aspo_trains_on_sentences(tmp_path, monkeypatch):
    pytest.importorskip("pysbd")
    (tmp_path / "mine_of_aspo.py").write_text("def near(prompt, text):\n    return len(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    rows = [
        {"prompt": f"{a}?", "chosen": f"It is {a}. Is it? Yes, it is.", "rejected": f"No. {a}."}
        for a in range(24)
    ]
    write(tmp_path / "sentences.jsonl", rows)
    where = ["data=pairs", f"data.path={tmp_path / 'sentences.jsonl'}", *LLAMA, *PLAIN]
    near = ["loss=aspo", "loss.similarity=mine_of_aspo.near", "loss.alpha=0.5"]
    words = (["loss=dpo"], ["loss=aspo"], ["loss=aspo", "loss.of_rewards=true"], near)
    assert_all_differ({" ".join(some): trained(tmp_path, *some, *where) for some in words})


def start(tmp_path):
    where = tmp_path / "start"
    cfg = config(*TRAIN, *SLIPS, *LLAMA, *PLAIN, "max_steps=0", f"cache.dir={tmp_path / 'cache'}")
    train(cfg, where)
    return hashed(where)


def solvers():
    """Every solver, and every option of its nested groups in place of the default."""
    found = {name: [f"solver={name}"] for name in options("solver")}
    for owner in options("solver"):
        text = yaml.safe_load((CONF / "solver" / f"{owner}.yaml").read_text())
        for entry in text.get("defaults", []):
            for group, default in entry.items() if isinstance(entry, dict) else ():
                for option in options(f"solver/{group}"):
                    if option != default:
                        choice = f"solver/{group}={option}"
                        found[f"{owner} {choice}"] = [f"solver={owner}", choice]
    return found


def test_every_nested_solver_option_is_reached():
    groups = [path for path in (CONF / "solver").iterdir() if path.is_dir()]
    reached = {text for overrides in solvers().values() for text in overrides}
    for group in groups:
        missing = [
            o for o in options(f"solver/{group.name}") if f"solver/{group.name}={o}" not in reached
        ]
        assert len(missing) == 1, (group.name, missing)  # the default


SECOND = ["solver/apply=hypergradient", "solver.apply.order=second"]
NEEDS = {  # what an option asks for besides itself
    "dual": ["solver/phi=linear", "solver.margin=0.01"],
    "barrier": ["solver/phi=linear", "solver.margin=1", "solver.schedule.rate=10"],
    "preconditioned": ["solver.lower_lr=1e-4"],
}


def test_solvers_train_apart(tmp_path):
    table = {}
    for name, overrides in solvers().items():
        option = name.rpartition("=")[2]
        if option in NEEDS:
            overrides = [*overrides, *NEEDS[option]]
        elif name.startswith("penalty") and "phi" not in name:
            # every violation has a slope of its own, whichever side of the border it is on
            overrides = [*overrides, "solver/phi=softplus", "solver.margin=0.01"]
        if "hvp" not in name:  # another way to the same product
            table[name] = trained(tmp_path, *SLIPS, *LLAMA, *PLAIN, "loss=dpo", *overrides)
    assert_all_differ(table)


@pytest.mark.parametrize("solver", [["solver=implicit"], ["solver=unrolled", *SECOND]])
def test_products_are_ways_to_the_same_parameters(tmp_path, solver):
    auto, exact, rough = (
        trained(tmp_path, *SLIPS, *LLAMA, *PLAIN, "loss=dpo", *solver, f"solver/hvp={hvp}")
        for hvp in ("auto", "exact", "finite_difference")
    )
    assert auto == exact != rough


def test_optimizers_train_apart(tmp_path):
    shared = (*SLIPS, *LLAMA, "hardware=cpu")
    table = {
        name: trained(tmp_path, f"optimizer={name}", *shared) for name in options("optimizer")
    }
    assert table.pop("paged_adamw_8bit") == table["adamw_8bit"]  # pages are a GPU's
    assert_all_differ(table)


@pytest.mark.parametrize("name", [it for it in options("model") if it not in IMAGES])
def test_models_train(tmp_path, checkpoint, name):
    preset = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())
    if "pretrained" in preset:
        sizes = [f"model.pretrained={checkpoint}"]
    elif name == "gpt2":
        sizes = ["model.config.n_embd=32", "model.config.n_layer=1"]
    else:
        sizes = LLAMA
    trained(tmp_path, f"model={name}", *sizes, *SLIPS, *PLAIN)


def test_diagnostics_train_to_the_same_parameters(tmp_path):
    """Each on its own, beside none at all; the command line knows every one."""
    shared = (*SLIPS, *LLAMA, *PLAIN, "loss=dpo", "eval.every_n_steps=1")
    names = tuple(config().diagnostics)
    assert names == knobs.DIAGNOSTICS
    off = [f"diagnostics.{name}.every_n_steps=0" for name in names]
    found = {trained(tmp_path, *shared, *off)}
    for name in names:
        found.add(trained(tmp_path, *shared, *off, f"diagnostics.{name}.every_n_steps=1"))
    assert len(found) == 1


@pytest.mark.parametrize("name", options("logger"))
def test_loggers_train(tmp_path, name, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    if name == "tensorboard":
        pytest.importorskip("tensorboard")
    trained(tmp_path, f"logger={name}", *SLIPS, *LLAMA, *PLAIN)
    if name != "csv":
        assert [path for path in (tmp_path / "run-0" / name).rglob("*") if path.is_file()]


def hardware():
    slow = dict.fromkeys(SEVERAL, [pytest.mark.slow])
    slow["gpu"] = [pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
    return [pytest.param(name, marks=slow.get(name, [])) for name in options("hardware")]


@pytest.mark.parametrize("name", hardware())
def test_hardware_trains(tmp_path, name):
    processes = ["hardware.accelerator=cpu"] if name in SEVERAL else []
    trained(tmp_path, f"hardware={name}", *processes, *SLIPS, *LLAMA, *PLAIN[:2])


@pytest.mark.parametrize("name", options("hardware"))
def test_hardware_composes(name):
    assert config(f"hardware={name}").hardware.devices >= 1


@pytest.mark.parametrize("precision", ["64-true", "bf16-true", "bf16-mixed"])
def test_precisions_train(tmp_path, precision):
    dtype = {"64-true": "float64", "bf16-true": "bfloat16", "bf16-mixed": "float32"}[precision]
    how = [f"hardware.precision={precision}", f"model.dtype={dtype}"]
    trained(tmp_path, *how, *SLIPS, *LLAMA, *PLAIN)


def own_rows(path, name):
    """Files in the form that the source reads, and the overrides that name them."""
    chance = random.Random(0)
    sums = [(a, chance.randint(2, 9)) for a in range(24)]
    if name == "pairs":
        rows = [
            {"prompt": f"{a}+{b}=", "chosen": str(a + b), "rejected": str(a + b + 1)}
            for a, b in sums
        ]
        write(path / "pairs.jsonl", rows)
        return [f"data.path={path / 'pairs.jsonl'}"]
    if name == "gsm8k":
        from spo_lightning.data.tasks.gsm8k import MODELS, SOLUTIONS, WORKED

        rows = []
        for a, b in sums:
            solved = {
                model: {"solution": f"A: {a + b + n}", "is_correct": n == 0}
                for n, model in enumerate(MODELS)
            }
            truth = {"question": f"{a} and {b}?", "ground_truth": f"#### {a + b}"}
            rows.append({**truth, **solved})
        write(path / SOLUTIONS, rows)
        write(
            path / WORKED, [{"question": r["question"], "answer": r["ground_truth"]} for r in rows]
        )
        return [f"data.path={path}"]
    if name == "stories":
        stories = [" ".join(chance.choices(["one", "two", "three"], k=30)) for _ in range(60)]
        (path / "stories.txt").write_text("<|endoftext|>".join([*stories, ""]))
        return [
            f"data.path={path / 'stories.txt'}",
            "data.opening_words=8",
            "data.continuation_words=16",
        ]
    if name == "mixture":
        small = ("sft_rows=0", "prompts=16", "eval_prompts=4")
        return [f"data.sources.{part}.{key}" for part in ("short", "long") for key in small]
    return ["data.sft_rows=0", "data.prompts=16", "data.eval_prompts=4"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", [it for it in options("data") if it not in IMAGES])
def test_data_trains(tmp_path, name):
    source = tmp_path / "source"
    source.mkdir()
    trained(tmp_path, f"data={name}", *own_rows(source, name), *LLAMA, *PLAIN)


# those with a study train no language model: test_tabular.py and test_quadratic.py run them
TEXTS = [n for n in options("experiment") if n not in IMAGES]
TRAINING = [n for n in TEXTS if config(f"experiment={n}").study is None]


@pytest.mark.parametrize("name", TRAINING)
def test_experiments_compose_and_train(tmp_path, name):
    composed = config(f"experiment={name}")
    assert composed.max_steps != 0
    sizes = [] if composed.model.config.get("model_type") == "gpt2" else LLAMA
    trained(tmp_path, f"experiment={name}", *sizes, *SLIPS)  # which has pairs from the start


def leaves(node, key=""):
    """Keys with their lines; a mapping that is not empty has its own."""
    if isinstance(node, yaml.MappingNode):
        for name, value in node.value:
            if name.value in ("defaults", "hydra") or name.value.startswith("_"):
                continue
            yield from (
                leaves(value, name) if under(value) else [(name.value, name.start_mark.line)]
            )


def under(value):
    return isinstance(value, yaml.MappingNode) and value.value


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONF))
)
def test_every_key_is_explained(path):
    text = path.read_text()
    lines = text.splitlines()
    root = yaml.compose(text)
    silent = []
    for name, line in leaves(root):
        above = lines[line - 1].lstrip() if line else ""
        if "#" not in lines[line] and not above.startswith("#"):
            silent.append(name)
    assert not [name for name in silent if not exempt(path, name)], silent


def exempt(path, name):
    # an option of experiment/ sets keys that are explained where they are declared; an empty
    # `config` of a preset says that there is nothing to build; model_type names the family; the
    # weights of a mixture's parts are explained above all of them
    weight = path.name == "mixture.yaml" and name == "weight"
    return weight or path.parent.name == "experiment" or name in ("config", "model_type")


def test_a_mixture_can_have_every_loss():
    parts = config("loss=mixture").loss.parts
    assert sorted({*parts, "mixture", "spo"}) == options("loss")  # spo is dpo and its solver


@pytest.mark.parametrize(
    "word", ["checkpoint.monitor=null", "clip_norm=null", "eval.max_rows=null"]
)
def test_null_is_taken_where_the_yaml_offers_it(word):
    knobs.check(config(word), knobs.Given([word.partition("=")[0]], {"loss": "spo"}, config()))
