"""Preference data from any causal LM and any judge: ``python -m spo_lightning.sample``."""

from functools import partial
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs
from spo_lightning.errors import UserError


def main() -> None:
    command.run("sample", work, together=True)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> dict[str, int]:
    """Draw answers, score them, write the pairs; counts of prompts, samples and pairs."""
    _name_checkpoint(cfg, line)
    knobs.check(cfg, line)
    if "model" in line.touched and "base_url" in cfg.engine:
        raise UserError("model has no effect: an endpoint answers, engine.model; leave it out")
    from spo_lightning.run import processes, sampling

    return processes.together(partial(sampling.sample, cfg), cfg.hardware)


def _name_checkpoint(cfg: Any, line: knobs.Given) -> None:
    """``checkpoint`` and ``base`` are short for the keys of the model."""
    if cfg.checkpoint is None:
        if cfg.base is not None:
            raise UserError("base has no effect: checkpoint is null; name it model.base")
        return
    for key in ("model.pretrained", "model.base", "model.config"):
        if any(word == key or word.startswith(f"{key}.") for word in line.touched):
            raise UserError(f"{key} does not go with checkpoint={cfg.checkpoint}: leave it out")
    cfg.model.pretrained, cfg.model.base, cfg.model.config = cfg.checkpoint, cfg.base, {}


if __name__ == "__main__":
    main()
