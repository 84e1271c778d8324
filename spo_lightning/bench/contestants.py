"""One cell's files in; what takes its outer steps out: ours, the floor and TRL.

Each starts from the same weights, takes the same pairs in the same order, and leaves the weights
as they were. One more contestant is a class here and its name in ``CONTESTANTS``.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import hydra.utils
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from spo_lightning.bench.cell import as_text, hushed
from spo_lightning.bench.costs import Entry, Start, take
from spo_lightning.data.batch import Pair
from spo_lightning.data.rows import Task
from spo_lightning.models.policy import DTYPES
from spo_lightning.records.progress import silent
from spo_lightning.run import prepare
from spo_lightning.training.fit import module_of


class Watch(Protocol):
    """Looks at a run: before its first step, and around every step."""

    def begin(self) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...


class Contestant(Protocol):
    def run(self, steps: int, watch: Watch) -> list[float]:
        """Take so many steps; the loss of each, where it has one."""
        ...


@dataclass(frozen=True)
class Race:
    """What every contestant of a cell is made from. ``cfg`` is one of the training command."""

    cfg: DictConfig
    model: Path  # directory of the initial weights and the tokenizer
    pairs: Sequence[Pair]  # as they are stored
    order: Sequence[int]  # of the pairs, as our run draws them; empty until that is known
    device: torch.device

    @property
    def drawn(self) -> list[Pair]:
        return [self.pairs[place] for place in self.order]

    def opened(self) -> Any:
        """The model as transformers opens it."""
        from transformers import AutoModelForCausalLM

        lm: Any = AutoModelForCausalLM.from_pretrained(
            self.model, dtype=DTYPES[self.cfg.model.dtype], attn_implementation="sdpa"
        )
        return lm.to(self.device).train()


class Kept:
    """The weights as they were, to be put back."""

    def __init__(self, module: nn.Module):
        self.parameters = list(module.parameters())
        self.before = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def put_back(self) -> None:
        for p, before in zip(self.parameters, self.before):
            p.copy_(before)
            p.grad = None


class Ours:
    """The training command's own path: ``Preference`` under Lightning on ``OuterSteps``."""

    def __init__(self, race: Race):
        cfg, device = race.cfg, race.device
        task = Task(train=as_text(race.pairs), held_out=[])
        precision = prepare.precision_of(cfg.hardware, device)
        with hushed():
            given = prepare.prepare(cfg, task, device, precision, silent())
        self.start = Start(given.scorer, given.train, given.lower)
        node: Any = OmegaConf.to_container(cfg.loss, resolve=True)
        node.pop("unit")
        loss, solver = hydra.utils.instantiate(node), hydra.utils.instantiate(cfg.solver)
        self.entry = Entry(cfg, loss, solver)
        self.rows: list[int] = []  # of the last run, as drawn

    def run(self, steps: int, watch: Watch) -> list[float]:
        losses = []
        self.rows = []

        def before(trainer: Any, module: Any, batch: Any, number: int) -> None:
            self.rows += [row for part in batch for row in part.rows.tolist()]
            watch.start()

        def after(trainer: Any, module: Any, *_: Any) -> None:
            watch.stop()
            losses.append(module.numbers.get("train/loss", float("nan")))

        look = LambdaCallback(
            on_train_start=lambda *_: watch.begin(),
            on_train_batch_start=before,
            on_train_batch_end=after,
        )
        take(self.entry, self.start, steps, look)
        return losses

    def twin(self, cfg: Any, start: Start) -> "Ours":
        """The same with another configuration or start."""
        made = object.__new__(Ours)
        made.entry, made.start, made.rows = self.entry._replace(cfg=cfg), start, []
        return made

    def logging(self) -> "Ours":
        """The same, and the numbers of every step are computed."""
        return self.twin(
            OmegaConf.merge(self.entry.cfg, {"log": {"every_n_steps": 1}}), self.start
        )


class Floor:
    """The lower bound: a bare forward and backward over as many unique tokens, no more.

    The transformers model itself on dense rows, one per pair, unique tokens // pairs wide: no
    padding, no mask (plain causal attention), no Lightning. The head sees exactly as many
    positions as are scored, gathered before it, and torch's cross-entropy takes all its logits at
    once. Then clipping and the optimizer's step, as ours. Tokens: prompt once, both responses.
    """

    def __init__(self, race: Race):
        cfg, size = race.cfg, race.cfg.batch_size
        self.lm, self.clip = race.opened(), cfg.clip_norm
        self.kept = Kept(self.lm)
        self.optimizer = module_of(cfg, nn.Module(), None, None, 1).make_optimizer  # type: ignore
        self.precision = prepare.precision_of(cfg.hardware, race.device)
        drawn = race.drawn
        starts = range(0, len(drawn) - size + 1, size)
        self.batches = [dense(drawn[s : s + size], race.device) for s in starts]

    def run(self, steps: int, watch: Watch) -> list[float]:
        optimizer = self.optimizer(list(self.lm.parameters()))
        watch.begin()
        for ids, rows, columns, targets in self.batches[:steps]:
            watch.start()
            with self.precision():
                hidden = self.lm.base_model(input_ids=ids, use_cache=False).last_hidden_state
                logits = self.lm.get_output_embeddings()(hidden[rows, columns])
                loss = F.cross_entropy(logits.float(), targets)
            loss.backward()
            del hidden, logits, loss
            clip_grad_norm_(self.lm.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            watch.stop()
        self.kept.put_back()
        return []


def dense(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, T] ids, then row, column and target of each scored position: the last of every row."""
    count = len(pairs)
    ids = [token for pair in pairs for token in (*pair.prompt, *pair.chosen, *pair.rejected)]
    scored = sum(len(pair.chosen) + len(pair.rejected) for pair in pairs)
    width = len(ids) // count
    whole = torch.tensor(ids[: count * width]).view(count, width)
    places = [
        (row, width - 1 - back)
        for row in range(count)
        for back in range(scored // count + (row < scored % count))
    ]
    rows, columns = torch.tensor(places).T
    targets = whole[rows, (columns + 1) % width]
    return whole.to(device), rows.to(device), columns.to(device), targets.to(device)


class Trl:
    """TRL's DPOTrainer, reference log-probabilities precomputed, nothing logged or saved."""

    def __init__(self, race: Race, *, liger: bool):
        from spo_lightning.bench.peer import trainer_of

        cfg, place = race.cfg, race.model / "trl"
        lm = race.opened()
        self.trainer, self.hooks, self.losses = trainer_of(
            lm,
            as_text(race.drawn),
            race.model,
            {
                "output_dir": str(place),
                "beta": cfg.loss.beta,
                "max_length": cfg.max_length,
                "per_device_train_batch_size": cfg.batch_size,
                "learning_rate": cfg.optimizer.lr,
                "weight_decay": cfg.optimizer.weight_decay,
                "adam_beta1": cfg.optimizer.betas[0],
                "adam_beta2": cfg.optimizer.betas[1],
                "adam_epsilon": cfg.optimizer.eps,
                "max_grad_norm": cfg.clip_norm,
                "bf16": cfg.hardware.precision.startswith("bf16"),
                "use_cpu": race.device.type == "cpu",
                "seed": cfg.seed,
                "use_liger_kernel": liger,
            },
        )
        self.kept = Kept(lm)

    def run(self, steps: int, watch: Watch) -> list[float]:
        trainer = self.trainer
        trainer.args.max_steps = steps
        self.losses.clear()
        self.hooks.watch = watch
        trainer.train()
        trainer.optimizer = trainer.lr_scheduler = None  # a run has its own
        trainer.accelerator.free_memory()
        trainer.model_wrapped = trainer.model
        self.kept.put_back()
        gc.collect()
        return [float(loss) for loss in self.losses]


CONTESTANTS: Mapping[str, Callable[[Race], Contestant]] = {
    "ours": Ours,
    "floor": Floor,
    "trl": partial(Trl, liger=False),
    "liger": partial(Trl, liger=True),
}
