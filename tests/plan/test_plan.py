"""The plan: what it counts is what a real step holds, and what it says of models nobody has."""

import json

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from tiny import CONFIGS

from spo_lightning.command import CONF
from spo_lightning.config.build import built
from spo_lightning.config.knobs import Given
from spo_lightning.data.batch import Pair, collate
from spo_lightning.errors import UserError
from spo_lightning.models.device import precision_of
from spo_lightning.models.policy import adapt, of_config
from spo_lightning.models.scorer import Scorer
from spo_lightning.plan import __main__ as command
from spo_lightning.plan.changes import changes
from spo_lightning.plan.memory import Alive
from spo_lightning.plan.shape import config_of, shape_of
from spo_lightning.plan.sums import of_optimizer, planned, run_of
from spo_lightning.plan.theta import copies_of

GIB = 2**30
PROMPT, COMPLETION = 40, 24
BASE = (f"plan.prompt={PROMPT}", f"plan.completion={COMPLETION}", "loss=dpo", "hardware=cpu")
BIG = ("hardware.precision=bf16-true", "loss=dpo")
NO_WORDS = Given([], {}, OmegaConf.create())
FSDP = {"hardware.strategy": "fsdp", "hardware.devices": 8}


def config(*words, **more):
    with initialize_config_dir(CONF, version_base="1.3"):
        found = compose("plan", list(words))
    for key, value in more.items():
        OmegaConf.update(found, key, value, force_add=True)
    return found


def plan(*words, **more):
    return planned(run_of(config(*words, **more)))


def tiny(name):
    """Words that make one of ``tiny.CONFIGS``, with four blocks and wide enough to be seen."""
    shape = {**CONFIGS[name], "tie_word_embeddings": name == "llama"}
    wide = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}
    if name == "gpt2":
        wide = {"n_embd": 64, "n_layer": 4}
    elif "head_dim" in shape:
        wide["head_dim"] = 16
    shape |= wide
    return ["model=llama", *(f"++model.config.{key}={value}" for key, value in shape.items())]


def pairs_of(count):
    """Of the plan's lengths; no two share a prompt."""
    return collate(
        [
            Pair((row % 250, *(0,) * (PROMPT - 1)), (1,) * COMPLETION, (2,) * COMPLETION, row=row)
            for row in range(count)
        ],
        0,
    )


def held_by_a_step(cfg, count, parts):
    """Bytes of all tensors that a real step makes, at their peak."""
    policy = of_config(cfg, "cpu")
    if cfg.model.lora.rank:
        policy = adapt(policy, **cfg.model.lora, seed=0)
    if cfg.hardware.activation_checkpointing:
        policy.lm.gradient_checkpointing_enable({"use_reentrant": False})
    policy.lm.train()
    scorer, batch = Scorer(policy.lm, True), pairs_of(count)
    _ = batch.packed.tree.lengths
    alive = Alive([*scorer.parameters(), *scorer.buffers()])
    with alive, precision_of(cfg.hardware, "cpu")():
        for _ in range(parts):
            scorer(batch).logps.sum().backward()
    return alive.peak


USUAL = [("llama", ()), ("llama", ("hardware.precision=bf16-mixed",))]
OTHERS = [
    ("llama", ("hardware.activation_checkpointing=true",)),
    ("llama-grouped", ("model.lora.rank=4",)),
    ("qwen2", ("model.dtype=bfloat16", "hardware.precision=bf16-true")),
    ("gpt2", ()),
    ("gemma2", ()),
]


@pytest.mark.parametrize(
    ("name", "words"),
    [*USUAL, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)],
)
@pytest.mark.parametrize(("micro", "parts"), [(12, 1), (2, 2)])
def test_what_is_reckoned_is_what_a_real_step_holds(name, words, micro, parts):
    cfg = config(
        *(*BASE, *tiny(name), *words, f"micro_batch_size={micro}", f"batch_size={micro * parts}")
    )
    counted = held_by_a_step(cfg, micro, parts)
    step = planned(run_of(cfg)).stages["training"]
    assert step["gradients"] + step["activations"] == pytest.approx(counted, rel=0.08)


@pytest.mark.parametrize("name", [*CONFIGS])
def test_blocks_add_up(name):
    """From two blocks and three to four, with the byte-level tokenizer's 258 tokens."""
    cfg = config(*BASE, *tiny(name))
    lm = of_config(cfg, "cpu").lm
    found = shape_of(cfg)
    assert found.size.weights == sum(p.numel() for p in lm.parameters())
    assert found.size.bytes == 4 * found.size.weights == 4 * found.size.trained
    assert found.ends == lm.get_input_embeddings().weight.numel()
    assert found.tied == (lm.get_input_embeddings().weight is lm.get_output_embeddings().weight)
    adapted = shape_of(config(*BASE, *tiny(name), "model.lora.rank=4"))
    policy = adapt(of_config(cfg, "cpu"), **{**cfg.model.lora, "rank": 4}, seed=0)
    learns = [p.numel() for p in policy.lm.parameters() if p.requires_grad]
    assert (adapted.size.weights, adapted.size.trained) == (found.size.weights, sum(learns))


@pytest.mark.parametrize(
    ("model", "weights"),  # as published: 8.03, 70.6 and 406 billion
    [
        ("llama3-8b", 8_030_261_248),
        ("llama3-70b", 70_553_706_496),
        ("llama3.1-405b", 405_853_388_800),
    ],
)
def test_models_that_nobody_has_here(model, weights):
    """None of their weights is loaded; by hand: 2 bytes a weight, two moments in float32."""
    short = ("micro_batch_size=1", "eval.batch_size=1", "plan.prompt=16", "plan.completion=8")
    whole = plan(f"model={model}", *BIG, *short).stages["training"]
    assert whole["weights"] == whole["gradients"] == 2 * weights
    assert whole["optimizer"] == 8 * weights
    four = plan(f"model={model}", *BIG, *short, "model.lora.rank=16", "model.quantize=nf4")
    shape = shape_of(config(f"model={model}", *BIG))
    ends, adapters = 2 * 128256 * shape.width, four.stages["training"]["gradients"]
    # a scale of 8 bits for 64 weights, and one of 32 for 256 of those
    by_hand = shape.size.matrices * (0.5 + (1 + 4 / 256) / 64) + 2 * ends + adapters
    assert four.stages["training"]["weights"] == pytest.approx(by_hand, rel=1e-3)
    assert adapters < 0.05 * weights


@pytest.mark.slow
def test_many_pairs_are_as_if_each_were_counted():
    words = (*BASE, *tiny("llama"), "batch_size=12")
    many = plan(*words, "micro_batch_size=12").stages["training"]["activations"]
    few = [plan(*words, f"micro_batch_size={n}").stages["training"]["activations"] for n in (2, 4)]
    assert many == pytest.approx(few[1] + 4 * (few[1] - few[0]), rel=0.05)


@pytest.mark.parametrize(
    ("words", "during", "kept", "passes"),
    [
        (("solver=none",), 0, 0, 1),
        (("solver=penalty",), 0, 0, 1),
        # the shadow, and theta while the parameters hold the shadow
        (("solver=penalty", "solver/value=inner"), 2, 1, 2),
        # the first slope, theta', and theta while the parameters hold theta'
        (("solver=unrolled",), 3, 0, 2),
        (("solver=penalty", "solver/phi=linear", "solver/schedule=barrier"), 1, 0, 2),
    ],
)
def test_a_solver_says_what_it_holds(words, during, kept, passes):
    found = copies_of(built(config("loss=dpo", *words).solver))
    assert (found.during, found.kept, found.passes) == (during, kept, passes)


def test_an_optimizer_is_measured():
    kept = {
        name: of_optimizer(config(f"optimizer={name}"), torch.float32)
        for name in ("adamw", "sgd", "rmsprop")
    }
    assert kept == {"adamw": 8, "sgd": 0, "rmsprop": 4}
    assert of_optimizer(config("optimizer.bf16=master"), torch.bfloat16) == 12


def test_devices_that_share_weights():
    """By hand: an eighth of all, and a block, or the larger embedding or head, whole."""
    words = ("model=llama3-8b", *BIG, "batch_size=64", "micro_batch_size=8", "eval.batch_size=8")
    alone, shared = plan(*words), plan(*words, **FSDP)
    shape = shape_of(config(*words))
    assert shared.stages["training"]["optimizer"] == alone.stages["training"]["optimizer"] / 8
    assert shared.stages["training"]["gradients"] == alone.stages["training"]["gradients"] / 8
    assert shared.stages["training"]["weights"] == 2 * shape.size.weights / 8 + 2 * shape.ends
    assert shape.ends > shape.block.weights
    assert shared.stages["answers"]["copy for answers"] == alone.stages["training"]["weights"]
    parts = plan(*words, **FSDP | {"hardware.sharding": {"gather_for_answers": False}})
    assert "answers" not in parts.stages and parts.peak < alone.peak / 2


def test_gradients_of_devices_that_share_weights():
    """By hand, where tokens are few: a block's whole, and the embedding's as it is computed and as
    it is summed, but for the eighth of it that stands with the others."""
    few = ("batch_size=8", "micro_batch_size=1", "plan.prompt=8", "plan.completion=2")
    words = ("model=llama3-8b", "hardware.precision=bf16-true", *few)
    shape = shape_of(config(*words))
    whole = 2 * (shape.block.weights + shape.ends * (2 - 1 / 8))
    held = plan(*words, **FSDP).stages["training"]["activations"]
    assert held == pytest.approx(whole, rel=0.05)


def test_a_change_that_fits():
    words = ("model=llama3-8b", *BIG, "batch_size=64", "micro_batch_size=2", "eval.batch_size=8")
    found = changes(run_of(config(*words)), 80 * GIB)
    assert "model.lora.rank=16" in found and "micro_batch_size=1" not in found
    assert [name for name in found if "fsdp" in name] == ["hardware=fsdp hardware.devices=2"]
    assert all(peak <= 80 * GIB for peak in found.values())


def test_the_command(tmp_path, caplog):
    cfg = config(*BASE, *tiny("llama"), "plan.device_gib=0.001")
    with caplog.at_level("INFO"):
        found = command.work(cfg, tmp_path, NO_WORDS)
    assert json.loads((tmp_path / "plan.json").read_text()) == found
    assert not found["fits"] and "does not fit" in caplog.text
    rates = tmp_path / "bench.json"
    rates.write_text('{"rates": {"matrices": 1e9, "attention": 1e9, "optimizer": 1e9}}')
    cfg = config(*BASE, *tiny("llama"), f"plan.rates={rates}", "max_steps=-1", "plan.pairs=320")
    found = command.work(cfg, tmp_path, NO_WORDS)
    assert found["fits"] and found["seconds"] == 10 * found["seconds_per_step"]
    # by hand, from 6 operations a weight and token
    shape, tokens = shape_of(cfg), 32 * (PROMPT + 2 * (COMPLETION - 1))
    products = 6 * (shape.size.matrices * tokens + shape.ends * 64 * COMPLETION)
    assert found["products"] == products


def test_what_is_refused(tmp_path):
    cfg = config("model=pretrained", "model.pretrained=somebody/nothing")
    with pytest.raises(UserError, match="its config.json is not at hand"):
        config_of(cfg.model)
    OmegaConf.update(cfg, "model.shape", {"model_type": "llama", "hidden_size": "wide"})
    with pytest.raises(UserError, match=r"model\.shape: "):
        config_of(cfg.model)
    for words, told in {
        ("max_length=300",): "more than max_length",
        ("max_steps=0",): "nothing is planned",
        ("loss=reward",): "pairs of answers alone",
        ("hardware=ddp", "hardware.devices=64"): "gives no pair",
    }.items():
        with pytest.raises(UserError, match=told):
            command.refuse(config(*words))
    (tmp_path / "other.json").write_text("{}")
    cfg = config(*BASE, f"plan.rates={tmp_path}/other.json")
    with pytest.raises(UserError, match="is not a bench.json"):
        command.work(cfg, tmp_path, NO_WORDS)
