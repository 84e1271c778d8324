"""Data and a tokenizer in, what the rows become out; sampled pairs are sampled first."""

from typing import Any

from spo_lightning.records.progress import quiet, silent
from spo_lightning.run.record import Begun
from spo_lightning.run.stages import data, pairs, policy, warm_start
from spo_lightning.world import World


def inspect(cfg: Any) -> str:
    """The page that the command prints."""
    quiet()

    def place() -> Any:
        from spo_lightning.models.device import device_of

        return device_of(cfg.hardware)

    at: Any = data(Begun(cfg, World(place=place), silent(), {}))

    from spo_lightning.cache.tokens import encoded
    from spo_lightning.data.page import page
    from spo_lightning.models.policy import tokenizer_of

    task, held = at.task, at.task.held_out[: cfg.eval.max_rows]
    if task.samples:  # the pairs are the policy's own samples
        for stage in (policy, warm_start, pairs):
            at = stage(at)
        task, tokenizer, held = at.task, at.policy.tokenizer, at.task.held_out
    else:
        tokenizer = tokenizer_of(cfg.model.pretrained, cfg.model)
    train = encoded(cfg, tokenizer, task.train, "train")
    return page(train, encoded(cfg, tokenizer, held, "held-out"), tokenizer, task)
