"""Held-out numbers of a causal LM: ``python -m spo_lightning.eval checkpoint=DIR data=...``."""

import json
import logging
from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs

log = logging.getLogger(__name__)


def main() -> None:
    command.run("eval", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> dict[str, float]:
    """Measure what metrics.json of a run holds under ``final``; writes and returns it.

    Rewards, displacement and win_rate compare with ``reference``, and so do pairs that the data
    samples from a policy: without one they are left out.
    """
    knobs.check(cfg, line)
    from dataclasses import replace

    from spo_lightning.data.load import load_to_look
    from spo_lightning.errors import UserError
    from spo_lightning.models import policy as policies
    from spo_lightning.records import progress
    from spo_lightning.records.directory import write_text
    from spo_lightning.records.progress import Stages, Stop

    for where in (cfg.checkpoint, cfg.reference):
        if where is not None and Path(where).exists():
            policies.check_directory(Path(where))
    progress.quiet()
    stages = Stages(lambda *_: None, Stop(), "Run the command again.")
    stages.stop.install()
    task = load_to_look(cfg.data)
    task = replace(task, held_out=task.held_out[: cfg.eval.max_rows])
    if not task.held_out:
        raise UserError("no held-out rows: raise data.eval_fraction or set data.eval_path")
    numbers = measure(cfg, task, stages)
    write_text(Path(cfg.output), json.dumps(numbers, indent=1) + "\n")
    for name, value in numbers.items():
        log.info("%-28s%12.4f", name, value)
    log.info("Written to %s", Path(cfg.output).absolute())
    return numbers


def measure(cfg: Any, task: Any, stages: Any) -> dict[str, float]:
    """The held-out numbers of ``checkpoint``, against ``reference`` where there is one."""
    from spo_lightning.evaluation import held_out as evals
    from spo_lightning.models.scorer import score
    from spo_lightning.models.sharing import as_read_by
    from spo_lightning.run import prepare
    from spo_lightning.sampling import pairing

    device = prepare.device_of(cfg.hardware)
    precision = prepare.precision_of(cfg.hardware, device)
    how = pairing.decoding(cfg, seed=cfg.seed)
    policy = prepare.opened_checkpoint(cfg.checkpoint, cfg, device)
    judge = rivals = None
    if cfg.reference is not None:
        judge = prepare.opened_checkpoint(cfg.reference, cfg, device)
        prepare.check_same_tokens(policy.tokenizer, judge.tokenizer, cfg.reference)
        if task.judge is not None:
            rivals = evals.samples(judge, task.held_out, task, how, evals.RIVALS, stages)
    pairs = held_pairs(cfg, task, judge, policy.tokenizer, stages)
    logits = cfg.hardware.logits_mib * prepare.FLOATS
    scorer = prepare.scorer_of(policy, prepare.longest_of(pairs.pairs), share=True, logits=logits)
    shared: Any = {"precision": precision, "stages": stages}
    if judge is not None:
        theirs = as_read_by(scorer, judge.lm)
        pairs = score(theirs, pairs, batch_size=how.batch_size, title="reference", **shared)
    return evals.held_out(
        policy,
        scorer,
        task,
        task.held_out,
        pairs,
        beta=cfg.loss.beta,
        how=how,
        rivals=rivals,
        **shared,
    ).numbers


def held_pairs(cfg: Any, task: Any, reference: Any, tokenizer: Any, stages: Any) -> Any:
    """The held-out pairs; where the data samples them, from the reference, or none without one."""
    from spo_lightning.data.sets import Pairs
    from spo_lightning.sampling import pairing

    rows = task.held_out
    if task.samples:
        rows = []
        if reference is not None:
            rows, _, _ = pairing.sampled(cfg, task, task.held_out, reference, stages)
    found = pairing.encoded(cfg, tokenizer, rows, "held-out").pairs if rows else []
    return Pairs(found, None, tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
