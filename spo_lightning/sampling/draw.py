"""Prompts, a policy and a judge in, a record of answers and their scores out; pairs of it.

Every answer is kept as it is drawn, so that a run that was stopped goes on (``record``).
"""

import hashlib
import json
import logging
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from spo_lightning.data import rows as data
from spo_lightning.data.chat import as_asked, in_turns
from spo_lightning.data.reading import read
from spo_lightning.errors import UserError
from spo_lightning.judges.local import Judge
from spo_lightning.models.generate import Decoding, Engine, answers
from spo_lightning.models.policy import Policy
from spo_lightning.records.directory import write_text
from spo_lightning.records.progress import Stages, Within
from spo_lightning.sampling.record import Record, record_of
from spo_lightning.training import sft
from spo_lightning.world import ALONE

log = logging.getLogger(__name__)

FOLLOWED = ("instruction_id_list", "kwargs")  # columns that judge=instructions goes by
FIRST_SEED = 1_000_003  # of parts: seed * this + number


def prompts(cfg: Any, task: Any) -> list[dict]:
    """Rows that are answered: of ``prompts.path``, or the data's own training rows."""
    if task.chunks is not None:
        raise UserError("data.stream=true reads a part of the prompts: leave it out")
    if cfg.prompts.path is None:
        found = task.train
    else:
        place: Any = OmegaConf.to_object(cfg.prompts)
        found = read(place["path"], split=place["split"], where="prompts.path")
        for at, row in enumerate(found):
            if not isinstance(row.get("prompt"), (str, list)) or not row["prompt"]:
                raise UserError(f"{found.named(at)}: no 'prompt': add one")
        found = [in_turns(row, chat=cfg.data.chat, system=cfg.data.system) for row in found]
    kept = ("prompt", *data.KEPT, *FOLLOWED)
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


def draw(
    cfg: Any,
    policy: Policy,
    engine: Engine | None,
    rows: Sequence[dict],
    judge: Judge,
    stages: Stages,
) -> Record:
    """Answer and score every prompt that the record does not hold yet. ``engine``: who answers in
    the policy's place. A row's answers of another policy, ``beside``, are scored with its own.

    A part is what one seed draws, so that parts may be dealt over processes; the first keeps them.
    """
    world, each = stages.world, cfg.samples
    parts = parts_of(rows, max(1, cfg.eval.batch_size // each))
    record = Record(record_of(Path(cfg.output)), settings(cfg, policy, engine, rows), parts)
    done = world.once(record.begin)
    held = sum(map(len, parts[:done]))
    if held:
        log.info("%s: %d of %d prompts were drawn before", record.path, held, len(rows))
    how = replace(Decoding.of(cfg, cfg.temperature), top_p=cfg.top_p, engine=engine)
    began, drawn = time.monotonic(), 0
    with stages.stage("sampling", each * len(rows), done=each * held) as advance:
        for turn in world.deal([*enumerate(parts)][done:]):
            number, part = turn.item
            asked = [rows[place] for place in part for _ in range(each)]
            seeded = replace(how, seed=cfg.seed * FIRST_SEED + number)
            texts = answers(policy, asked, seeded, Within(stages, ALONE), "samples")
            samples = [
                [*texts[n * each : (n + 1) * each], *rows[place].get("beside", ())]
                for n, place in enumerate(part)
            ]
            judged = [rows[place] for place, some in zip(part, samples) for _ in some]
            scores = iter(judge(judged, [text for some in samples for text in some]))
            mine = [
                {
                    "number": place,
                    "row": rows[place],
                    "samples": some,
                    "scores": [*islice(scores, len(some))],
                }
                for place, some in zip(part, samples)
            ]
            for some in world.gather(mine if turn.mine else []):
                if some and world.first:
                    record.append(some)
            now = each * sum(len(part) for _, part in turn.together)
            drawn += now
            advance(now, f"{drawn / max(1e-9, time.monotonic() - began):.0f} samples/s")
    return record


def settings(
    cfg: Any, policy: Policy, engine: Engine | None, rows: Sequence[dict]
) -> dict[str, Any]:
    """What the record must agree in to be gone on with."""
    asked = json.dumps(list(rows), sort_keys=True, ensure_ascii=False).encode()
    if engine is None:
        answering = {"weights": sft.key(policy, (), {})}
    else:
        answering = {"engine": OmegaConf.to_container(cfg.engine, resolve=True)}
    return {
        **provenance(cfg),
        **answering,
        "prompts": hashlib.sha256(asked).hexdigest()[:16],
        "judge": OmegaConf.to_container(cfg.judge, resolve=True),
        "data": OmegaConf.to_container(cfg.data, resolve=True),
        "batch_size": cfg.eval.batch_size,
        "max_length": cfg.max_length,
        "precision": cfg.hardware.precision,
    }


def provenance(cfg: Any) -> dict[str, Any]:
    """What a pair says of where it comes from."""
    built = f"built from its config, {cfg.model.config.get('model_type')}"
    return {
        "model": cfg.engine.get("model") or cfg.model.pretrained or built,
        "revision": cfg.model.revision,
        "sampling": {
            **{key: cfg[key] for key in ("samples", "temperature", "top_p", "seed")},
            "max_new_tokens": cfg.eval.max_new_tokens,
            "stop": list(cfg.eval.stop),
        },
    }


def written(cfg: Any, record: Any, count: int, strategy: Any) -> dict[str, int]:
    """The pairs that the strategy chooses, in the prompts' order, as one file."""
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

    Without the answer, which stands for the whole text in pairs that are given as a file. Answers
    past the policy's own are another's: ``reference_side`` says which of the two is.
    """
    source, own = provenance(cfg), cfg.samples
    for one in drawn:
        texts, scores = one["samples"], one["scores"]
        chance = random.Random(f"{cfg.seed}/{one['number']}")
        for best, worst in strategy(texts, scores, chance):
            asked = one["row"]["prompt"]
            others = [name for name, at in (("chosen", best), ("rejected", worst)) if at >= own]
            yield {
                **{key: v for key, v in one["row"].items() if key not in ("answer", "beside")},
                **({"reference_side": others[0]} if len(others) == 1 else {}),
                "chosen": as_asked(asked, texts[best]),
                "rejected": as_asked(asked, texts[worst]),
                "chosen_score": scores[best],
                "rejected_score": scores[worst],
                "prompt_number": one["number"],
                **source,
            }
