"""Adapters on a quantised base all the way round: trained, stopped, measured, merged."""

from pathlib import Path

import pytest
import torch
from checkpoints import whole
from conftest import forked
from safetensors.torch import load_file
from test_round_trip import ALONE, TRAIN, agree, losses, measured, ran, trained

pytest.importorskip("bitsandbytes")
MODEL = Path(__file__).resolve().parents[3] / "shared/models/stories260k"
NF4 = ("model.quantize=nf4", "model.lora.rank=4")
TWO = ("hardware=ddp", "hardware.accelerator=cpu", "hardware.devices=2")


def test_all_weights_do_not_train_in_four_bits(tmp_path):
    whole(tmp_path / "base")
    words = ("model.pretrained=base", "model.quantize=nf4", "max_steps=1", "hydra.run.dir=run")
    done = forked(tmp_path, *TRAIN, *words)
    assert done.code == 2 and done.err.count("\n") == 1
    assert "such do not train: set model.lora.rank" in done.err


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
def test_round_trip_in_four_bits(tmp_path):
    base = f"model.pretrained={MODEL}"
    first = trained(tmp_path, "first", base, *NF4, "max_steps=20")
    assert first["init"]["displacement/chosen"] == 0
    assert first["final"]["logps/chosen"] > first["init"]["logps/chosen"]
    held = measured(tmp_path, "first/model", f"reference={MODEL}")
    agree(held, first["final"], [*ALONE, "rewards/margins", "displacement/chosen"])

    # stopped and gone on with it is the same run, bit for bit
    trained(tmp_path, "parts", base, *NF4, "max_steps=10")
    ran(tmp_path, "train", "hydra.run.dir=parts", "ckpt_path=last", "max_steps=20")
    weights = [tmp_path / run / "model/adapter_model.safetensors" for run in ("first", "parts")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert losses(tmp_path, "first") == losses(tmp_path, "parts")

    # the full base's numbers are others, in a cache that both share
    full = trained(tmp_path, "full", base, "model.lora.rank=4", "max_steps=1")
    rounded = abs(full["init"]["logps/chosen"] - first["init"]["logps/chosen"])
    assert rounded > 0.1

    ran(tmp_path, "export", "checkpoint=first/model", "output=merged")
    assert not (tmp_path / "merged/quantization.json").exists()
    merged = measured(tmp_path, "merged")
    for name in ALONE:
        assert merged[name] == pytest.approx(first["final"][name], rel=1e-4, abs=1e-4), name

    again = trained(tmp_path, "again", "model.pretrained=first/model", "max_steps=1")
    agree(again["init"], first["final"], ALONE)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.skipif(not MODEL.exists(), reason="needs ../shared, which is absent")
@pytest.mark.parametrize("bits", ["nf4", "int8"])
def test_two_processes_equal_one(tmp_path, bits):
    words = (f"model.pretrained={MODEL}", f"model.quantize={bits}", "model.lora.rank=4")
    words = (*words, "batch_size=7", "eval.batch_size=3", "max_steps=10")
    one = trained(tmp_path, "one", *words)
    two = trained(tmp_path, "two", *words, *TWO)
    for when in ("init", "final"):
        agree(two[when], one[when], one[when])
    assert losses(tmp_path, "two") == pytest.approx(losses(tmp_path, "one"), rel=1e-5)
    assert one["final"]["nll/chosen"] < one["init"]["nll/chosen"] - 0.1
    paths = [tmp_path / run / "model/adapter_model.safetensors" for run in ("one", "two")]
    mine, theirs = map(load_file, paths)
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-5)
