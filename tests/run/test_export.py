"""A checkpoint is written whole or not at all, and nothing is written over."""

from pathlib import Path

import pytest
import torch
import yaml
from checkpoints import adapters, whole
from omegaconf import OmegaConf
from safetensors.torch import load_file

from spo_lightning.command import CONF
from spo_lightning.errors import UserError
from spo_lightning.run import export


def asked(**changes):
    cfg = yaml.safe_load((Path(CONF) / "export.yaml").read_text())
    return OmegaConf.create(cfg | changes)


@pytest.fixture
def model(tmp_path) -> Path:
    adapters(whole(tmp_path / "base"), tmp_path / "model")
    return tmp_path / "model"


def test_a_directory(model, tmp_path):
    output = tmp_path / "out"
    export.export(asked(checkpoint=str(model), output=str(output), dtype="bfloat16"))
    held = load_file(output / "model.safetensors")
    assert {value.dtype for value in held.values()} == {torch.bfloat16}
    assert (output / "tokenizer.json").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model", "out"}


@pytest.mark.parametrize(
    "changes, says",
    [
        ({"output": "base"}, "exists: name another"),
        ({"output": "no/such/out"}, "there is no directory"),
        ({"format": "onnx"}, "is not safetensors or gguf"),
        ({"format": "gguf"}, "writes one file, NAME.gguf"),
        ({"format": "gguf", "output": "out.gguf", "merge": False}, "does not go with format=gguf"),
        ({"format": "gguf", "output": "out.gguf", "dtype": "float64"}, "float32 or bfloat16"),
        ({"checkpoint": "base", "merge": False}, "merge=false has no effect"),
        ({"checkpoint": "base", "base": "base"}, "base has no effect"),
    ],
)
def test_what_is_refused(model, tmp_path, monkeypatch, changes, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=says):
        export.export(asked(**{"checkpoint": "model", "output": "out"} | changes))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}


def test_a_converter_that_fails_leaves_nothing(model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        export, "_converter", lambda: ["sh", "-c", "echo no such model >&2; exit 1"]
    )
    with pytest.raises(UserError, match="does not write this model: no such model"):
        export.export(
            asked(checkpoint=str(model), output=str(tmp_path / "out.gguf"), format="gguf")
        )
    assert {path.name for path in tmp_path.iterdir()} == {"base", "model"}
