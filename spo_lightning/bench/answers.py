"""How fast a model answers: ``python -m spo_lightning.bench what=answers [model=option]``.

``engine=hf`` (prompts of a like length together, padded on the left) beside itself with one prompt
at a time, and beside transformers' ``generate`` on padded batches in the order of the file, with
its growing cache and with its static one. All must give the same greedy texts.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from spo_lightning.bench import asked, output
from spo_lightning.bench.measuring import now
from spo_lightning.bench.ours import device_of
from spo_lightning.config import knobs
from spo_lightning.errors import Diverged
from spo_lightning.models.generate import Decoding, Stops, answered
from spo_lightning.models.policy import Policy, of_config
from spo_lightning.records.progress import Stages, Within

WORDS = ("the", "a", "man", "woman", "child", "dog", "river", "house", "old", "went", "saw", "and")
OURS = "engine=hf"


def measure(cfg: DictConfig, run_dir: Path, line: knobs.Given) -> dict[str, Any]:
    """Write config.yaml, bench.json and table.md; returns bench.json."""
    least = {key: 1 for key in ("repetitions", "answers", "batch_size", "max_new_tokens")}
    asked.refuse(cfg, replace(line, touched=()), least)  # a model that is there is welcome
    prompts = drawn(cfg.answers, *asked.span(cfg.words, "words"), cfg.seed)
    stages = asked.begin(cfg, run_dir)
    policy = of_config(cfg, device_of(cfg.hardware))
    policy.lm.eval()
    calls = contestants(policy, prompts, cfg.batch_size, cfg.max_new_tokens, stages)
    seconds, tokens = timed(calls, cfg.repetitions, stages)
    kept = ("answers", "words", "batch_size", "max_new_tokens")
    model = cfg.model.pretrained or f"{sum(p.numel() for p in policy.lm.parameters()):,} built"
    setting = asked.setting(cfg, *kept, model=model, tokens=tokens)
    return output.written(found := {"setting": setting, "seconds": seconds}, table(found), run_dir)


def drawn(count: int, least: int, most: int, seed: int) -> list[str]:
    """Texts of so many words."""
    chance = random.Random(seed)
    return [" ".join(chance.choices(WORDS, k=chance.randint(least, most))) for _ in range(count)]


def contestants(
    policy: Policy, prompts: list[str], size: int, room: int, stages: Stages
) -> dict[str, Callable[[], tuple[list[str], int]]]:
    """Each gives the texts and how many tokens they have."""
    from transformers import GenerationConfig

    rows = [{"prompt": prompt} for prompt in prompts]

    def ours(size: int) -> tuple[list[str], int]:
        found = answered(policy, rows, Decoding(room, size, ()), Within(stages), "")
        return [one.text for one in found], sum(one.tokens for one in found)

    def theirs(**cache: str) -> tuple[list[str], int]:
        tokenizer, texts = policy.tokenizer, []
        how = GenerationConfig(
            max_new_tokens=room,
            do_sample=False,
            eos_token_id=sorted(Stops.of(policy, ()).ids),
            pad_token_id=tokenizer.pad_token_id,
            **cache,
        )
        for start in range(0, len(prompts), size):
            some = prompts[start : start + size]
            batch = tokenizer(some, padding=True, padding_side="left", return_tensors="pt")
            read = {
                key: batch[key].to(policy.lm.device) for key in ("input_ids", "attention_mask")
            }
            out = policy.lm.generate(**read, generation_config=how)
            new = out[:, read["input_ids"].shape[1] :]
            texts += tokenizer.batch_decode(new, skip_special_tokens=True)
        return texts, 0

    return {
        OURS: partial(ours, size),
        "one by one": partial(ours, 1),
        "transformers": theirs,
        "transformers, static cache": partial(theirs, cache_implementation="static"),
    }


def timed(
    calls: Mapping[str, Callable[[], tuple[list[str], int]]], repetitions: int, stages: Stages
) -> tuple[dict[str, list[float]], int]:
    """Seconds of every round, after one that is not timed, in which the texts are compared; the
    tokens of all answers."""
    names = list(calls)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    with stages.stage("answers", (1 + repetitions) * len(names)) as advance:
        texts, tokens = calls[OURS]()
        advance(1)
        for name in names[1:]:
            others, _ = calls[name]()
            for number, (mine, theirs) in enumerate(zip(texts, others, strict=True), 1):
                if mine != theirs:
                    raise Diverged(
                        f"{name}: the answer to prompt {number} is {theirs[:60]!r}, and "
                        f"{mine[:60]!r} by {OURS}: near ties round apart, try model.dtype=float64"
                    )
            advance(1)
        for number in range(repetitions):
            turn = number % len(names)
            for name in names[turn:] + names[:turn]:
                began = now()
                calls[name]()
                seconds[name].append(now() - began)
                advance(1, f"{name} {tokens / seconds[name][-1]:.0f} tokens/s")
    return seconds, tokens


def table(numbers: Mapping[str, Any]) -> str:
    """Markdown: a row per contestant."""
    at, seconds = numbers["setting"], numbers["seconds"]
    rows = []
    for name, mine in seconds.items():
        speed = output.extremes([at["tokens"] / each for each in mine])
        beside = output.spread(output.ratio(mine, seconds[OURS]))
        rows.append({"": name, "tokens/s": f"{speed['median']:.0f}", f"time / {OURS}'s": beside})
    shape = f"{at['answers']} prompts of {at['words'][0]} to {at['words'][1]} words"
    said = [
        f"{shape}, {at['batch_size']} at once, at most {at['max_new_tokens']} tokens each: "
        f"{at['tokens']} in all, the same texts by all",
        f"model: {at['model']}; {at['device']}, {at['threads']} threads; median of "
        f"{len(seconds[OURS])} rounds and extremes",
    ]
    return f"# Tokens per second of answers\n\n{output.table(rows)}\n\n{output.bullets(said)}\n"
