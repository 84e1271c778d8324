"""What the data becomes: ``python -m spo_lightning.inspect data=... model=...``."""

from pathlib import Path
from typing import Any

from spo_lightning import command
from spo_lightning.config import knobs


def main() -> None:
    command.run("inspect", work)


def work(cfg: Any, run_dir: Path, line: knobs.Given) -> str:
    """Print counts, length histograms and one rendered pair; returns the page."""
    knobs.check(cfg, line)
    from spo_lightning.data.load import load
    from spo_lightning.data.page import page
    from spo_lightning.models import policy as policies
    from spo_lightning.records import progress, terminal
    from spo_lightning.records.progress import silent
    from spo_lightning.run import prepare
    from spo_lightning.sampling import pairing

    progress.quiet()
    task = load(cfg.data)
    held = task.held_out[: cfg.eval.max_rows]
    if task.samples:  # the pairs are the policy's own samples
        stages = silent()
        policy = prepare.base_policy(cfg, task, prepare.device_of(cfg.hardware), stages)
        task, _ = pairing.with_pairs(cfg, task, policy, stages)
        tokenizer, held = policy.tokenizer, task.held_out
    else:
        tokenizer = policies.tokenizer_of(
            cfg.model.pretrained, cfg.model.revision, cfg.model.trust_remote_code
        )
    train = pairing.encoded(cfg, tokenizer, task.train, "train")
    text = page(train, pairing.encoded(cfg, tokenizer, held, "held-out"), tokenizer, task)
    print(text)
    terminal.check()  # it has no other product
    return text


if __name__ == "__main__":
    main()
