"""Names of tasks in, lm-evaluation-harness's own numbers of the policy in memory out.

Its standard errors stand beside them, and what each item adds where a number is the items' mean.
"""

import difflib
import hashlib
import importlib.metadata
import json
import logging
import os
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, redirect_stdout
from functools import cache
from pathlib import Path
from typing import Any, cast

from spo_lightning.cache.reference import weights_name
from spo_lightning.cache.shards import cache_of
from spo_lightning.capability.choices import Choices
from spo_lightning.capability.prompted import text_of
from spo_lightning.config.build import one_line
from spo_lightning.errors import UserError
from spo_lightning.evaluation.shares import Items
from spo_lightning.judges.verifier import steady
from spo_lightning.models.policy import Policy
from spo_lightning.records.directory import write_text
from spo_lightning.records.progress import Stages

log = logging.getLogger(__name__)


@cache
def index(path: Path | None, own: bool) -> Any:
    """The tasks of a directory, and the harness's ``own``: looked through once in a process."""
    try:
        from lm_eval.tasks import TaskManager  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise UserError(
            f"eval.tasks needs lm-eval ({error.name} is missing): pip install "
            "'spo-lightning[lm-eval]'"
        ) from error
    return TaskManager(include_path=path, include_defaults=own)


def manager(names: Sequence[str], path: str | None) -> Any:
    """Who knows the tasks: the harness's own are looked through only where ``path`` lacks one, as
    there are fifteen thousand of them."""
    known, place = None, None if path is None else Path(path).resolve()
    if place is not None:
        if not place.is_dir():
            raise UserError(f"eval.tasks_path={path}: no such directory")
        known = index(place, False)
        if not known.all_tasks:
            raise UserError(f"eval.tasks_path={path}: no task in it: add a .yaml with task: NAME")
    # a group or a tag may name tasks of the harness
    if known is None or not {*names} <= {*known.all_subtasks}:
        known = index(place, True)
    for name in names:
        if name not in known.all_tasks:
            near = difflib.get_close_matches(name, known.all_tasks, 1)
            meant = f"did you mean {near[0]}?" if near else "name one, or its eval.tasks_path"
            raise UserError(f"eval.tasks: there is no task {name!r}: {meant}")
    return known


def check(cfg: Any) -> None:
    """Refuse tasks that are not there, or whose data cannot be had, before anything slow."""
    names = list(cfg.eval.get("tasks") or ())
    if names:
        _check_prompt(cfg)
        index.cache_clear()  # a file may have been added since the last run of this process
        with _quietly():
            known = manager(names, cfg.eval.tasks_path)
            for name in names:
                _loaded(known, name)


def _check_prompt(cfg: Any) -> None:
    """A system prompt reaches the tasks in one way alone."""
    if text_of(cfg) is None:
        return
    if cfg.system_turn != cfg.eval.tasks_chat:
        raise UserError(
            f"system_turn={cfg.system_turn} does not go with eval.tasks_chat="
            f"{cfg.eval.tasks_chat}: a task is asked as a chat, or as a text, like all else: set "
            "both alike"
        )
    if cfg.examples.path is not None:
        raise UserError("examples.path does not go with eval.tasks, which bring their own")


def results(
    cfg: Any, policy: Policy, stages: Stages, start: bool = False
) -> tuple[dict[str, float], Items]:
    """The numbers of all tasks, in one process for all; nothing where none is named. Those of a
    ``start`` are taken once for all runs that share a cache."""
    names = list(cfg.eval.get("tasks") or ())
    if not names:
        return {}, {}
    numbers: dict[str, float] = {}
    each: Items = {}
    mine = policy.gathered(policy.device if stages.world.first else None) or policy
    with stages.stage("eval.tasks", len(names)) as advance:
        for name in names:
            found = stages.world.once(lambda name=name: _run(cfg, mine, name, start))
            numbers |= found[0]
            each |= found[1]
            advance()
    return numbers, each


def _run(cfg: Any, policy: Policy, name: str, start: bool) -> tuple[dict[str, float], Items]:
    """One task, or every one of a group and the group itself."""
    was_training = policy.lm.training
    home = cache_of(cfg) if start else None
    with _quietly(), _randomness_kept(policy.lm.device):
        import lm_eval  # type: ignore[import-not-found]
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

        steady()
        # their decorators hide from a type checker what they take
        loads, evaluates = cast(Any, HFLM), cast(Any, lm_eval.simple_evaluate)
        known = manager([name], cfg.eval.tasks_path)
        tasks = _loaded(known, name)["tasks"]
        place = None if home is None else home / "tasks" / f"{_key(cfg, policy, tasks)}.json"
        if place is not None and place.is_file():
            log.info("eval.tasks: %s of the start, from %s", name, place)
            numbers, each = json.loads(place.read_text("utf-8"))
            return numbers, each
        checks = [task.config.process_results for task in tasks.values()]
        random.seed(0)  # as the harness does, but for one thing that its command line draws after
        # what IFEval's checks import brings rich, which draws once as it comes; where a prompt
        # names no letter to count they draw one, and it must be the same
        if any("instructions_registry" in getattr(one, "__globals__", ()) for one in checks):
            random.getrandbits(24)
        size = cfg.eval.tasks_batch_size
        lm: Any = policy.lm
        try:
            model = loads(pretrained=lm, tokenizer=policy.tokenizer, batch_size=size)
            model._loglikelihood_tokens = Choices(model)
            found: Any = evaluates(
                model=model,
                tasks=[name],
                task_manager=known,
                limit=cfg.eval.tasks_limit,
                batch_size=size,
                apply_chat_template=cfg.eval.tasks_chat,
                system_instruction=text_of(cfg),
                random_seed=None,
            )
        except (LookupError, TypeError, ValueError, OSError) as error:
            raise UserError(f"eval.tasks: {name}: {one_line(error)}") from error
        finally:
            policy.lm.train(was_training)
    numbers: dict[str, float] = {}
    each: Items = {}
    for task, of in found["results"].items():
        add(task, of, found["samples"].get(task, []), numbers, each)
    if place is not None:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_text(place, json.dumps((numbers, each)))
    return numbers, each


def _key(cfg: Any, policy: Policy, tasks: dict[str, Any]) -> str:
    """The name of a start's numbers: weights, questions, how they are asked and counted."""
    how = [cfg.eval[key] for key in ("tasks_limit", "tasks_batch_size", "tasks_chat")]
    parts = [weights_name(policy, nullcontext), importlib.metadata.version("lm-eval"), *how]
    parts += [text_of(cfg), policy.tokenizer.chat_template if cfg.eval.tasks_chat else None]
    for task in tasks.values():
        parts += [task.dump_config(), [*task.eval_docs]]
    if cfg.eval.tasks_path is not None:
        own = sorted(Path(cfg.eval.tasks_path).rglob("*.py"))
        parts += [path.read_text("utf-8") for path in own]
    return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:32]


def add(
    task: str, found: dict, samples: Sequence[dict], numbers: dict[str, float], each: Items
) -> None:
    """A task's results under our names: ``tasks/NAME/METRIC``, ``tasks/NAME/METRIC_stderr``."""
    for key, value in found.items():
        metric, comma, kept = key.partition(",")
        if not comma or not isinstance(value, int | float):  # N/A: it has no standard error
            continue
        name = f"tasks/{task}/{metric}" + ("" if kept == "none" else f",{kept}")
        numbers[name] = float(value)
        of = [row.get(metric) for row in samples if row.get("filter") == kept]
        values = [float(one) for one in of if isinstance(one, (bool, int, float))]
        # what is no mean of its items, such as a perplexity, is not compared by them
        if values and len(values) == len(of) and abs(sum(values) / len(of) - value) < 1e-9:
            each[name] = values


def _loaded(known: Any, name: str) -> Any:
    """The task with its data, or why it cannot be had."""
    try:
        return known.load([name])
    except Exception as error:  # whatever a task's own file or its data's library raises
        raise UserError(f"eval.tasks: {name}: {one_line(error)}") from error


@contextmanager
def _quietly() -> Iterator[None]:
    """Without the harness's notes and bars, and what the git that it asks says of a directory that
    is no repository."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


@contextmanager
def _randomness_kept(device: Any) -> Iterator[None]:
    """The harness seeds every generator there is; training goes on as if nobody had looked."""
    import numpy as np
    import torch

    before, others = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(before)
            np.random.set_state(others)
