"""TRL's DPOTrainer at its best settings on this machine; the only file that knows TRL.

``python -m spo_lightning.bench.peer '{"model": ..., "rows": ..., "settings": {...}}'`` is one run
of it, from files to a saved model.
"""

import json
import os
import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from typing import Any

BEST = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": False,
    "lr_scheduler_type": "constant",
    "warmup_steps": 0,
    "train_sampling_strategy": "sequential",  # the rows come in the order of our run
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": [],
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "remove_unused_columns": True,
}


def settings(cfg: Any, **more: Any) -> dict[str, Any]:
    """What a configuration of ours, of training or of the bench, is called there."""
    return {
        "per_device_train_batch_size": cfg.batch_size,
        "max_grad_norm": cfg.clip_norm,
        "bf16": cfg.hardware.precision.startswith("bf16"),
        "seed": cfg.seed,
        "torch_compile": cfg.hardware.compile,
        **more,
    }


def trainer_of(
    kind: Any, lm: Any, rows: Any, model: str, settings: dict[str, Any], **more: Any
) -> Any:
    """``DPOTrainer`` or one made from it, on rows of text."""
    trl: Any = import_module("trl")
    from transformers import AutoTokenizer

    return kind(
        model=lm,
        args=trl.DPOConfig(**BEST, **settings),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(model),
        **more,
    )


def quiet() -> None:
    """No bars, and no warning of TRL's own use of transformers."""
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets

    datasets.disable_progress_bars()


def watched(
    lm: Any, rows: Sequence[dict[str, str]], model: str, settings: dict[str, Any]
) -> tuple[Any, Any, list[Any]]:
    """The trainer, its hooks (``watch`` is called around every step) and the losses of a run."""
    quiet()
    import datasets
    from transformers import PrinterCallback, TrainerCallback

    trl: Any = import_module("trl")
    losses: list[Any] = []

    class Hooks(TrainerCallback):
        watch: Any = None

        def on_train_begin(self, *args: Any, **more: Any) -> None:
            self.watch.begin()

        def on_step_begin(self, *args: Any, **more: Any) -> None:
            self.watch.start()

        def on_step_end(self, *args: Any, **more: Any) -> None:
            self.watch.stop()

    class Recording(trl.DPOTrainer):
        def training_step(self, *args: Any, **more: Any) -> Any:
            losses.append(super().training_step(*args, **more))
            return losses[-1]

    hooks = Hooks()
    given = datasets.Dataset.from_list(list(rows))
    trainer = trainer_of(Recording, lm, given, model, settings, callbacks=[hooks])
    trainer.remove_callback(PrinterCallback)
    return trainer, hooks, losses


def main(model: str, rows: str, dtype: str, threads: int | None, settings: dict[str, Any]) -> None:
    """One run, as a script of TRL's documentation does it."""
    quiet()
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    if threads:
        torch.set_num_threads(threads)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=dtype)
    given = load_dataset("json", data_files=rows, split="train")
    trainer = trainer_of(import_module("trl").DPOTrainer, lm, given, model, settings)
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(**json.loads(sys.argv[1]))
