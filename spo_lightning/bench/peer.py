"""TRL's DPOTrainer at its best settings on this machine; the only file that knows TRL.

``python -m spo_lightning.bench.peer '{"model": ..., "rows": ..., "settings": {...}}'`` is one run
of it, from files to a saved model.
"""

import json
import os
import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
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


NEEDS = {"trl": ("trl",), "liger": ("trl", "liger_kernel")}  # packages


def installed(name: str = "trl") -> bool:
    """Whether a contestant's packages are here; one that needs none always is."""
    return all(find_spec(package) is not None for package in NEEDS.get(name, ()))


def quiet() -> None:
    """No bars, and no warning of TRL's own use of transformers."""
    os.environ["TQDM_DISABLE"] = "1"
    warnings.filterwarnings("ignore", category=FutureWarning)
    import datasets

    datasets.disable_progress_bars()


def trainer_of(
    lm: Any, rows: Sequence[dict[str, str]], tokenizer: Path, settings: dict[str, Any]
) -> tuple[Any, Any, list[Any]]:
    """The trainer, its hooks (``watch`` is called around every step) and the losses of a run."""
    quiet()
    import datasets
    from transformers import AutoTokenizer, PrinterCallback, TrainerCallback

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
    trainer = Recording(
        model=lm,
        args=trl.DPOConfig(**BEST, **settings),
        train_dataset=datasets.Dataset.from_list(list(rows)),
        processing_class=AutoTokenizer.from_pretrained(tokenizer),
        callbacks=[hooks],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer, hooks, losses


def main(words: Mapping[str, Any]) -> None:
    """One run, as a script of TRL's documentation does it."""
    quiet()
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    trl: Any = import_module("trl")
    if words["threads"]:
        torch.set_num_threads(words["threads"])
    trainer = trl.DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(words["model"], dtype=words["dtype"]),
        args=trl.DPOConfig(**BEST, **words["settings"]),
        train_dataset=load_dataset("json", data_files=words["rows"], split="train"),
        processing_class=AutoTokenizer.from_pretrained(words["model"]),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
