"""Preference data from any causal LM and any judge: ``python -m spo_lightning.sample``."""

import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs
from spo_lightning.config.build import built

log = logging.getLogger(__name__)

FIRST_SEED = 1_000_003  # of parts: seed * this + number


def main() -> None:
    command.run("sample", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> dict[str, int]:
    """Draw answers, score them, write the pairs; counts of prompts, samples and pairs."""
    knobs.check(cfg, line)
    refuse_output(cfg)
    strategy = called(cfg.strategy, "strategy")
    judging = called(cfg.judge, "judge")
    from spo_lightning.data.load import load
    from spo_lightning.judges.local import Asked
    from spo_lightning.records import progress
    from spo_lightning.records.progress import Stages, Stop
    from spo_lightning.run import prepare

    prepare.set_threads(cfg.hardware)
    prepare.check_checkpoints(cfg.model)
    progress.quiet()
    stages = Stages(lambda *_: None, Stop(), "Run the same command to go on.")
    stages.stop.install()
    task = load(cfg.data)
    rows = prompts(cfg, task)
    device = prepare.device_of(cfg.hardware)
    policy = prepare.base_policy(cfg, task, device, stages)
    asked = Asked(
        task,
        policy,
        lambda where: prepare.opened_checkpoint(where, cfg.model, device),
        prepare.precision_of(cfg.hardware, device),
        stages,
        cfg.eval.batch_size,
        cfg.max_length,
    )
    record = draw(cfg, policy, rows, judging(asked), stages)
    return written(cfg, record, len(rows), strategy)


def refuse_output(cfg: Any) -> None:
    """Only pairs of an earlier try of this command are ever written over."""
    from spo_lightning.errors import UserError

    output = Path(cfg.output) if cfg.output else Path(".")
    if output.is_dir():
        raise UserError(f"output={cfg.output}: name a file, as in output=pairs.jsonl")
    if output.exists() and not record_of(output).exists():
        raise UserError(f"output={output}: there is a file, and not of this command: name another")


def record_of(output: Path) -> Path:
    return output.with_suffix(".samples.jsonl")


def called(node: Any, where: str) -> Any:
    """A judge or strategy, its keys checked before anything slow."""
    import inspect

    from spo_lightning.errors import UserError

    made = built(node)
    try:
        inspect.signature(made.func).bind_partial(**made.keywords)
    except TypeError as error:
        raise UserError(f"{where}: {error}; see conf/{where} for its keys") from error
    return made


def prompts(cfg: Any, task: Any) -> list[dict]:
    """Rows that are answered: of ``prompts.path``, or the data's own training rows."""
    from spo_lightning.data import rows as data
    from spo_lightning.errors import UserError

    if task.chunks is not None:
        raise UserError("data.stream=true reads a part of the prompts: leave it out")
    if cfg.prompts.path is None:
        found = task.train
    else:
        found = data.read(cfg.prompts.path, split=cfg.prompts.split, where="prompts.path")
    kept = ("prompt", *data.KEPT)
    for number, row in enumerate(found, 1):
        if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
            raise UserError(f"{cfg.prompts.path}, row {number}: no 'prompt': add one")
    distinct: dict[str, dict] = {}
    for row in found:
        plain = {key: row[key] for key in kept if row.get(key) is not None}
        distinct.setdefault(data.prompt_key(row["prompt"]), plain)
    if len(distinct) < len(found):
        log.info("%d prompts, each once, in %d rows", len(distinct), len(found))
    return list(distinct.values())[: cfg.prompts.max_rows]


def parts_of(rows: Sequence[dict], size: int) -> list[list[int]]:
    """Places of prompts in parts of ``size``, likes with likes so that little is padded."""
    order = sorted(range(len(rows)), key=lambda place: (len(str(rows[place]["prompt"])), place))
    return [order[start : start + size] for start in range(0, len(order), size)]


def draw(cfg: Any, policy: Any, rows: Sequence[dict], judge: Any, stages: Any) -> Any:
    """Answer and score every prompt that the record does not hold yet."""
    from dataclasses import replace

    from spo_lightning.models.generate import answers
    from spo_lightning.records.progress import Within
    from spo_lightning.sampling.pairing import decoding
    from spo_lightning.sampling.record import Record

    output, each = Path(cfg.output), cfg.samples
    parts = parts_of(rows, max(1, cfg.eval.batch_size // each))
    record = Record(record_of(output), settings(cfg, policy, rows), parts)
    done = record.begin()
    held = sum(map(len, parts[:done]))
    if held:
        log.info("%s: %d of %d prompts were drawn before", record.path, held, len(rows))
    how = replace(decoding(cfg, cfg.temperature), top_p=cfg.top_p)
    began = time.monotonic()
    with stages.stage("sampling", each * len(rows), done=each * held) as advance:
        for number, part in enumerate(parts[done:], done):
            asked = [rows[place] for place in part for _ in range(each)]
            drawn = replace(how, seed=cfg.seed * FIRST_SEED + number)
            texts = answers(policy, asked, drawn, Within(stages), "samples")
            scores = judge(asked, texts)
            record.append(
                [
                    {
                        "number": place,
                        "row": rows[place],
                        "samples": texts[n * each : (n + 1) * each],
                        "scores": scores[n * each : (n + 1) * each],
                    }
                    for n, place in enumerate(part)
                ]
            )
            held += len(part)
            drawn_now = each * (held - sum(map(len, parts[:done])))
            speed = drawn_now / max(1e-9, time.monotonic() - began)
            advance(each * len(part), f"{speed:.0f} samples/s")
    return record


def settings(cfg: Any, policy: Any, rows: Sequence[dict]) -> dict[str, Any]:
    """What the record must agree in to be gone on with."""
    import hashlib

    from omegaconf import OmegaConf

    from spo_lightning.training import sft

    asked = json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()
    return {
        **provenance(cfg),
        "weights": sft.key(policy, (), {}),
        "prompts": hashlib.sha256(asked).hexdigest()[:16],
        "judge": OmegaConf.to_container(cfg.judge, resolve=True),
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "batch_size": cfg.eval.batch_size,
        "max_length": cfg.max_length,
        "precision": cfg.hardware.precision,
    }


def provenance(cfg: Any) -> dict[str, Any]:
    """What a pair says of where it comes from."""
    return {
        "model": cfg.model.pretrained or f"built from its config, {cfg.model.config.model_type}",
        "revision": cfg.model.revision,
        "sampling": {
            **{key: cfg[key] for key in ("samples", "temperature", "top_p", "seed")},
            "max_new_tokens": cfg.eval.max_new_tokens,
            "stop": list(cfg.eval.stop),
        },
    }


def written(cfg: Any, record: Any, count: int, strategy: Any) -> dict[str, int]:
    """The pairs that the strategy chooses, in the prompts' order, as one file."""
    from spo_lightning.records.directory import write_text

    drawn = sorted(record.read(), key=lambda one: one["number"])
    pairs = list(chosen(cfg, drawn, strategy))
    output = Path(cfg.output)
    write_text(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in pairs))
    counts = {"prompts": count, "samples": cfg.samples * count, "pairs": len(pairs)}
    without = count - len({row["prompt_number"] for row in pairs})
    log.info("%d pairs of %d prompts (%d gave none): %s", len(pairs), count, without, output)
    log.info("All answers and their scores: %s", record.path)
    return counts


def chosen(cfg: Any, drawn: Sequence[dict], strategy: Any) -> Iterator[dict[str, Any]]:
    """Rows of the standard format, with their scores and where they come from.

    Without the answer, which stands for the whole text in pairs that are given as a file.
    """
    source = provenance(cfg)
    for one in drawn:
        texts, scores = one["samples"], one["scores"]
        chance = random.Random(f"{cfg.seed}/{one['number']}")
        for best, worst in strategy(texts, scores, chance):
            asked = one["row"]["prompt"]
            yield {
                **{key: value for key, value in one["row"].items() if key != "answer"},
                "chosen": as_asked(asked, texts[best]),
                "rejected": as_asked(asked, texts[worst]),
                "chosen_score": scores[best],
                "rejected_score": scores[worst],
                "prompt_number": one["number"],
                **source,
            }


def as_asked(prompt: Any, text: str) -> Any:
    """An answer as text, or as a turn where the prompt is made of turns."""
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


if __name__ == "__main__":
    main()
