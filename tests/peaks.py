"""Words of the command line in, the peak of a whole run out, in MiB.

A process trains a model of nothing before, which loads the code; what is in use then is the floor.
``python tests/peaks.py`` prints the table of docs/plan.md.
"""

import ctypes
import gc
import json
import multiprocessing
import os
import random
import socket
import sys
import tempfile
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from hydra import compose, initialize_config_dir

from spo_lightning.command import CONF

MIB = 2**20
PROMPT, COMPLETION, VOCABULARY = 32, 17, 8192  # the last token of an answer is its end
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
# the same of processes that share a model, and of one process with as many pairs at once
RANKS, EACH = 4, 4
SPREAD = ("hardware=fsdp", "hardware.accelerator=cpu", f"hardware.devices={RANKS}")
SPREAD = (*SPREAD, f"batch_size={RANKS * EACH}", "eval.batch_size=4", "eval.max_new_tokens=2")
PARTS = "hardware.sharding.gather_for_answers=false"
CASES |= {f"one process of {size}": (size, EACH, ()) for size in SIZES}
CASES |= {f"{RANKS} processes of {size}": (size, EACH, (*SPREAD, PARTS)) for size in SIZES}
CASES |= {f"{RANKS} processes of 60M, answers by a copy": ("60M", EACH, SPREAD)}


def words_of(title: str, at: Path) -> list[str]:
    size, pairs, more = CASES[title]
    return [
        *("data=pairs", f"data.path={at}/train.jsonl", f"data.eval_path={at}/held.jsonl"),
        *("model=pretrained", f"model.pretrained={at}/{size}", "loss=dpo", "hardware=cpu"),
        "hardware.threads=1",
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
    for name, rows in (("train", 16), ("held", 4)):
        with (at / f"{name}.jsonl").open("w") as file:
            for _ in range(rows):
                sides = zip(("prompt", "chosen", "rejected"), (PROMPT, *2 * [COMPLETION - 1]))
                row = {side: "".join(drawn.choices("abcdef", k=n)) for side, n in sides}
                file.write(json.dumps(row) + "\n")


def begin(at: Path) -> None:
    """What a process does before its first run: freed memory goes back at once (glibc), and a
    model of nothing trains, which loads the code."""
    from spo_lightning.bench import measuring

    warnings.simplefilter("ignore")
    ctypes.CDLL(None).mallopt(measuring.M_MMAP_THRESHOLD, measuring.SMALL)
    for title in ("float32", "adapters on nf4"):
        words = words_of(title, at)
        trained([word.replace(f"{at}/{CASES[title][0]}", f"{at}/nothing") for word in words])


def trained(words: list[str]) -> None:
    from spo_lightning.train import train

    with tempfile.TemporaryDirectory() as run:
        train(composed("train", words), Path(run) / "run")
    gc.collect()


def peak(title: str, at: Path) -> float:
    """MiB of one run, above what the process holds before it: a fork's pages of the libraries are
    its own once it has touched them, and the same run of nothing does."""
    from spo_lightning.bench import measuring

    trained(
        [word.replace(f"{at}/{CASES[title][0]}", f"{at}/nothing") for word in words_of(title, at)]
    )
    gc.collect()
    assert measuring.forget_peak()
    before = measuring.highest_resident()
    trained(words_of(title, at))
    return (measuring.highest_resident() - before) / MIB


def forked(title: str, at: Path) -> float:
    """The same in a process of its own, so that nothing is left of another run."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("fork")) as process:
        return process.submit(peak, title, at).result()


def free_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def each_peak(title: str, at: Path) -> list[float]:
    """The same of every process of a run that shares its model."""
    context, ports = multiprocessing.get_context("spawn"), [free_port() for _ in range(2)]
    with ProcessPoolExecutor(RANKS, mp_context=context) as processes:
        asked = [processes.submit(_of_rank, rank, ports, title, at) for rank in range(RANKS)]
        return [it.result() for it in asked]


def _of_rank(rank: int, ports: list[str], title: str, at: Path) -> float:
    """A model of nothing before, in the same processes, loads the code."""
    from spo_lightning.bench import measuring
    from spo_lightning.run.processes import follow

    warnings.simplefilter("ignore")
    ctypes.CDLL(None).mallopt(measuring.M_MMAP_THRESHOLD, measuring.SMALL)
    place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    place |= {"WORLD_SIZE": RANKS, "LOCAL_WORLD_SIZE": RANKS}
    os.environ.update({name: str(value) for name, value in place.items()})
    held, words, size = 0.0, words_of(title, at), CASES[title][0]
    for model, port in zip(("nothing", size), ports, strict=True):
        os.environ["MASTER_PORT"] = port
        gc.collect()
        assert measuring.forget_peak()
        held = measuring.highest_resident()
        if rank:
            assert follow() == 0
        else:
            trained([word.replace(f"{at}/{size}", f"{at}/{model}") for word in words])
    return (measuring.highest_resident() - held) / MIB


def predicted(title: str, at: Path):
    from spo_lightning.plan.sums import planned, run_of

    words = words_of(title, at)
    lengths = (f"plan.prompt={PROMPT}", f"plan.completion={COMPLETION}", "plan.pairs=16")
    return planned(run_of(composed("plan", [*words, *lengths])))


def measured(title: str, at: Path) -> list[float]:
    return each_peak(title, at) if SPREAD[0] in words_of(title, at) else [forked(title, at)]


def main() -> None:
    chosen = sys.argv[1:] or list(CASES)
    with tempfile.TemporaryDirectory() as directory:
        at = Path(directory)
        texts(at)
        for size in (*SIZES, "nothing"):
            written(at, size)
        begin(at)
        for title in chosen:
            plan, found = predicted(title, at), measured(title, at)
            said, size, most = plan.peak / MIB, CASES[title][0], max(found)
            told = ", ".join(f"{it:.0f}" for it in found)
            row = (title, size, f"{said:.0f}", told, f"{said / most:.2f}", plan.fullest)
            print("| " + " | ".join(row) + " |", flush=True)
            print({k: round(v / MIB) for k, v in plan.device.items()}, flush=True)


if __name__ == "__main__":
    main()
