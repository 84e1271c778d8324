"""Words of the command line in, the peak of a whole run in a process of its own out, in MiB.

The process first trains a model of nothing, which loads the code; what is in use then is the
floor. ``python tests/plan/measured.py`` prints the table of docs/plan.md.
"""

import ctypes
import gc
import json
import multiprocessing
import random
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hydra import compose, initialize_config_dir

from spo_lightning.command import CONF

MIB = 2**20
PROMPT, COMPLETION, VOCABULARY = 96, 33, 8192  # the last token of an answer is its end
# width, width of the MLP, blocks, heads
SIZES = {
    "8M": (256, 688, 8, 4),
    "25M": (448, 1184, 9, 7),
    "60M": (640, 1712, 11, 10),
}
LORA = ("model.lora.rank=16",)
# title: size, pairs at once, words
CASES = {
    "float32": ("25M", 8, ()),
    "float32, smaller": ("8M", 16, ()),
    "float32, larger": ("60M", 4, ()),
    "microbatches of 4": ("25M", 16, ("micro_batch_size=4",)),
    "blocks computed again": ("25M", 16, ("hardware.activation_checkpointing=true",)),
    "bf16-mixed": ("25M", 16, ("hardware.precision=bf16-mixed",)),
    "bfloat16": ("60M", 8, ("model.dtype=bfloat16", "hardware.precision=bf16-true")),
    "penalty": ("25M", 8, ("solver=penalty",)),
    "penalty, V from inner": ("25M", 4, ("solver=penalty", "solver/value=inner")),
    "unrolled": ("25M", 8, ("solver=unrolled", "solver.lower_lr=1e-3")),
    "unrolled, 3 steps": ("8M", 8, ("solver=unrolled", "solver.steps=3", "solver.lower_lr=1e-3")),
    "adapters": ("60M", 8, LORA),
    "adapters, bf16-mixed": ("60M", 8, (*LORA, "hardware.precision=bf16-mixed")),
    "adapters on nf4": ("60M", 8, (*LORA, "model.quantize=nf4")),
}


def words_of(title: str, at: Path) -> list[str]:
    size, pairs, more = CASES[title]
    return [
        *("data=pairs", f"data.path={at}/train.jsonl", f"data.eval_path={at}/held.jsonl"),
        *("model=pretrained", f"model.pretrained={at}/{size}", "loss=dpo", "hardware=cpu"),
        *(f"batch_size={pairs}", f"micro_batch_size={pairs}", f"eval.batch_size={pairs}"),
        *("max_steps=2", "log.every_n_steps=1", "cache.enabled=false", "report.enabled=false"),
        *more,
    ]


def composed(name: str, words: list[str]):
    with initialize_config_dir(CONF, version_base="1.3"):
        return compose(name, words)


def written(at: Path, size: str) -> None:
    """A Llama of this size and a byte-level tokenizer, as a checkpoint."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from spo_lightning.models.policy import byte_tokenizer

    width, inside, blocks, heads = SIZES.get(size, (16, 16, 1, 1))
    shape = {"hidden_size": width, "intermediate_size": inside, "num_hidden_layers": blocks}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": heads}
    shape |= {"vocab_size": VOCABULARY, "tie_word_embeddings": size != "60M"}
    tokenizer = byte_tokenizer()
    shape |= {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    LlamaForCausalLM(LlamaConfig(**shape)).save_pretrained(at / size)
    tokenizer.save_pretrained(at / size)


def texts(at: Path) -> None:
    drawn = random.Random(0)
    for name, rows in (("train", 64), ("held", 8)):
        with (at / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                sides = zip(("prompt", "chosen", "rejected"), (PROMPT, *2 * [COMPLETION - 1]))
                row = {side: "".join(drawn.choices("abcdef", k=n)) for side, n in sides}
                file.write(json.dumps(row) + "\n")


def peak(title: str, at: Path) -> float:
    """MiB of one run, in its process."""
    from spo_lightning.bench import measuring
    from spo_lightning.train import train

    warnings.simplefilter("ignore")
    # glibc's: freed memory goes back at once
    ctypes.CDLL(None).mallopt(measuring.M_MMAP_THRESHOLD, measuring.SMALL)
    words = words_of(title, at)
    size = CASES[title][0]
    nothing = [word.replace(f"{at}/{size}", f"{at}/nothing") for word in words]
    with tempfile.TemporaryDirectory() as runs:
        train(composed("train", nothing), Path(runs) / "nothing")
        gc.collect()
        assert measuring.forget_peak()
        before = measuring.highest_resident()
        train(composed("train", words), Path(runs) / "run")
    return (measuring.highest_resident() - before) / MIB


def alone(title: str, at: Path) -> float:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["measured", "spo_lightning.train", "spo_lightning.training.fit"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as process:
        return process.submit(peak, title, at).result()


def predicted(title: str, at: Path):
    from spo_lightning.plan.sums import planned, run_of

    words = words_of(title, at)
    lengths = (f"plan.prompt={PROMPT}", f"plan.completion={COMPLETION}", "plan.pairs=64")
    return planned(run_of(composed("plan", [*words, *lengths])))


def main() -> None:
    chosen = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        texts(at)
        for size in (*SIZES, "nothing"):
            written(at, size)
        for title in chosen:
            plan, found = predicted(title, at), alone(title, at)
            said, size = plan.peak / MIB, CASES[title][0]
            row = (title, size, f"{said:.0f}", f"{found:.0f}", f"{said / found:.2f}", plan.fullest)
            print("| " + " | ".join(row) + " |", flush=True)
            print({k: round(v / MIB) for k, v in plan.device.items()}, flush=True)


if __name__ == "__main__":
    main()
