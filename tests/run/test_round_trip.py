"""Adapters all the way round: trained, measured, sampled from, trained on, exported, measured."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import REFUSALS, adapters, whole
from conftest import command, forked
from safetensors.torch import load_file

SHARED = Path(__file__).resolve().parents[3] / "shared"
MODEL = SHARED / "models/stories260k"
DATA = ("data=slips", "data.prompts=60", "data.eval_prompts=12")
SMALL = (*DATA, "hardware=cpu", "hardware.threads=1", "eval.max_new_tokens=4")
TRAIN = (
    *(*SMALL, "loss=spo", "batch_size=4", "optimizer.lr=1e-3", "log.every_n_steps=1"),
    *("eval.every_n_steps=0", "checkpoint.every_n_steps=10", "model=pretrained"),
)
ALONE = ("nll/chosen", "logps/chosen", "logps/rejected", "entropy/top10", "mass/top10")
SAME = {"rel": 1e-5, "abs": 1e-5}


def ran(cwd, name, *words):
    module = ("-m", f"spo_lightning.{name}")
    done = command(cwd, *words, module=module, timeout=600)
    assert done.code == 0, done.err
    return done


def trained(cwd, run, *words):
    ran(cwd, "train", *TRAIN, f"hydra.run.dir={run}", "report.enabled=false", *words)
    return json.loads((cwd / run / "metrics.json").read_text())


def measured(cwd, checkpoint, *words):
    ran(cwd, "eval", *SMALL, f"checkpoint={checkpoint}", *words)
    return json.loads((cwd / "eval.json").read_text())


def agree(some, others, names):
    for name in names:
        assert some[name] == pytest.approx(others[name], **SAME), name


def losses(cwd, run):
    lines = (cwd / run / "metrics.csv").read_text().splitlines()
    place = lines[0].split(",").index("train/loss")
    return [float(line.split(",")[place]) for line in lines[1:] if line.split(",")[place]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
def test_round_trip(tmp_path):
    fresh = (f"model.pretrained={MODEL}", "model.lora.rank=4")
    first = trained(tmp_path, "first", *fresh, "max_steps=20")
    assert first["init"]["displacement/chosen"] == 0
    assert abs(first["final"]["displacement/chosen"]) > 0.1
    held = measured(tmp_path, "first/model", f"reference={MODEL}")
    agree(held, first["final"], [*ALONE, "rewards/margins", "displacement/chosen"])

    ran(tmp_path, "sample", *SMALL, "checkpoint=first/model", "samples=2", "judge=likelihood",
        "prompts.max_rows=8")  # fmt: skip
    answers = [json.loads(line) for line in (tmp_path / "pairs.samples.jsonl").open()]
    assert len(answers) >= 8

    # the same adapters go on, and what they are compared with is where they were
    second = trained(tmp_path, "second", "model.pretrained=first/model", "max_steps=20")
    agree(second["init"], first["final"], ALONE)
    assert second["init"]["rewards/margins"] == second["init"]["displacement/chosen"] == 0
    moved = second["final"]["logps/chosen"] - first["final"]["logps/chosen"]
    assert second["final"]["displacement/chosen"] == pytest.approx(moved, rel=1e-4, abs=1e-3)
    ours = json.loads((tmp_path / "second/model/adapter_config.json").read_text())
    assert ours["base_model_name_or_path"] == str(MODEL) and ours["r"] == 4

    ran(tmp_path, "export", "checkpoint=second/model", "merge=true", "output=merged")
    assert not (tmp_path / "merged/adapter_config.json").exists()
    agree(measured(tmp_path, "merged", "reference=first/model"), second["final"],
          [*ALONE, "rewards/margins", "displacement/chosen"])  # fmt: skip

    # 40 in one go are 20 and 20 of the same run, and not 20 of a run and 20 of another
    whole = trained(tmp_path, "whole", *fresh, "max_steps=40")
    ran(tmp_path, "train", "hydra.run.dir=first", "ckpt_path=last", "max_steps=40")
    paths = [tmp_path / run / "model/adapter_model.safetensors" for run in ("whole", "first")]
    one, two = map(load_file, paths)
    assert one.keys() == two.keys() and all(one[name].equal(two[name]) for name in one)
    assert losses(tmp_path, "first") == losses(tmp_path, "whole")
    assert whole["final"]["logps/chosen"] != pytest.approx(second["final"]["logps/chosen"])


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
def test_going_on_with_adapters_after_a_stop(tmp_path):
    """A run that began with adapters resumes, and its reference stays where it began."""
    trained(tmp_path, "first", f"model.pretrained={MODEL}", "model.lora.rank=4", "max_steps=10")
    begun = ("model.pretrained=first/model",)
    trained(tmp_path, "whole", *begun, "max_steps=20")
    trained(tmp_path, "parts", *begun, "max_steps=10")
    ran(tmp_path, "train", "hydra.run.dir=parts", "ckpt_path=last", "max_steps=20")
    one, two = (json.loads((tmp_path / run / "metrics.json").read_text()) for run in
                ("whole", "parts"))  # fmt: skip
    assert one["final"] == two["final"] and one["init"] == two["init"]
    assert losses(tmp_path, "parts") == losses(tmp_path, "whole")


def test_rounding_of_bfloat16_is_idle_beside_the_adapters_of_a_checkpoint(tmp_path):
    adapters(whole(tmp_path / "base"), tmp_path / "adapters")
    words = ("model.pretrained=adapters", "model.dtype=bfloat16", "optimizer.bf16=master")
    done = forked(tmp_path, *TRAIN, *words, "max_steps=1", "hydra.run.dir=run")
    assert done.code == 2 and done.err.count("\n") == 1
    assert "optimizer.bf16=master has no effect: the checkpoint's adapters train" in done.err


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
def test_adapters_that_trl_wrote(tmp_path):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from peft import LoraConfig, PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    row = {"prompt": "Once upon a time", "chosen": " there was a cat.", "rejected": " no one."}
    how = {"max_steps": 2, "learning_rate": 1e-1, "use_cpu": True, "bf16": False}
    how |= {"report_to": [], "per_device_train_batch_size": 2, "gradient_checkpointing": False}
    trainer = trl.DPOTrainer(
        model=str(MODEL),
        args=trl.DPOConfig(output_dir=str(tmp_path / "trl"), **how),
        train_dataset=Dataset.from_list([row] * 8),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.1),
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "trl"))

    held = measured(tmp_path, "trl", f"reference={MODEL}")
    assert abs(held["displacement/chosen"]) > 1e-2
    base = AutoModelForCausalLM.from_pretrained(MODEL)
    merged = PeftModel.from_pretrained(base, tmp_path / "trl").merge_and_unload()
    merged.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    agree(measured(tmp_path, "theirs"), held, ALONE)

    on = trained(tmp_path, "on", "model.pretrained=trl", "max_steps=3")
    agree(on["init"], held, ALONE)
    assert on["init"]["displacement/chosen"] == 0
    ran(tmp_path, "export", "checkpoint=on/model", "output=ours")
    agree(measured(tmp_path, "ours"), on["final"], ALONE)
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(MODEL),
                                      tmp_path / "on/model")  # fmt: skip
    with torch.no_grad():
        ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
        ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
        torch.testing.assert_close(again(ids).logits, ours(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("case", REFUSALS, ids=lambda case: case.name)
def test_every_refusal_from_the_commands(case, tmp_path):
    """One line, exit code 2, nothing written."""
    case.make(tmp_path / case.at)
    before = {path.name for path in tmp_path.iterdir()}
    asked = {
        "eval": (f"checkpoint={case.at}", "data=slips", "hardware=cpu"),
        "export": (f"checkpoint={case.at}", "output=out"),
        "train": ("model=pretrained", f"model.pretrained={case.at}", "data=slips", "hardware=cpu",
                  "hydra.run.dir=run"),
    }  # fmt: skip
    for name, words in asked.items():
        done = command(tmp_path, *words, module=("-m", f"spo_lightning.{name}"), timeout=300)
        (line,) = done.err.splitlines()
        assert done.code == 2 and line.startswith("error: ") and case.says in line
    left = {path.name for path in tmp_path.iterdir()} - before
    assert left <= {"run"}
    if left:  # what a failed run leaves
        assert {path.name for path in (tmp_path / "run").iterdir()} <= {"train.log", "status.json"}
