"""One cell's files in; what takes its outer steps out: ours, the floor and TRL.

Each starts from the same weights, takes the same pairs in the same order, and leaves the weights
as they were. One more contestant is a class here and its line in ``CONTESTANTS``.
"""

import gc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from spo_lightning.bench import peer
from spo_lightning.bench.cell import Cell, as_text, drawn
from spo_lightning.bench.ours import Ours, Watch, device_of, unmoved
from spo_lightning.data.batch import Pair
from spo_lightning.models import adapters
from spo_lightning.models.device import precision_of
from spo_lightning.models.policy import DTYPES
from spo_lightning.models.quantized import Bits
from spo_lightning.records.progress import quiet
from spo_lightning.training.fit import optimizer_of

AGAIN = 4  # steps after which the pairs come again, so that losses fall


class Contestant(Protocol):
    def run(self, steps: int, watch: Watch) -> list[float]:
        """Take so many steps; the loss of each, where it has one."""
        ...


@dataclass(frozen=True)
class Race:
    """What every contestant of a cell is made from; ``cfg`` is one of the training command."""

    cfg: DictConfig
    pairs: Sequence[Pair]  # as they are stored
    order: Sequence[int] = ()  # of the pairs, as our run draws them; empty until that is known

    @property
    def device(self) -> torch.device:
        return device_of(self.cfg.hardware)

    @property
    def drawn(self) -> list[Pair]:
        return [self.pairs[place] for place in self.order]

    def opened(self) -> Any:
        """The model as transformers opens it, with peft's adapters where such train."""
        from transformers import AutoModelForCausalLM

        model, dtype = self.cfg.model, DTYPES[self.cfg.model.dtype]
        place = self.device.index or 0 if self.device.type == "cuda" else self.device.type
        how: dict[str, Any] = {"dtype": dtype, "attn_implementation": "sdpa"}
        bits = Bits.of(model)
        if bits is not None:
            settings = bits.settings()
            settings.bnb_4bit_compute_dtype = dtype  # float32 by default, and slow on a GPU
            how |= {"quantization_config": settings, "device_map": {"": place}}
        lm: Any = AutoModelForCausalLM.from_pretrained(model.pretrained, **how)
        lm = lm if bits is not None else lm.to(self.device)
        if model.lora.rank:
            keys = ("rank", "alpha", "targets", "dora", "rslora")
            lm = adapters.fresh(lm, **{key: model.lora[key] for key in keys}, seed=self.cfg.seed)
        return lm.train()


def race_of(cfg: DictConfig, mine: DictConfig, cell: Cell, room: Path) -> Race:
    """One cell of the bench's ``cfg`` under a configuration ``mine`` of the training command, with
    the model that ``save_model`` leaves in the room."""
    own = {
        "model": {"pretrained": str(room / "model")},
        "max_length": cell.longest,
        "cache": {"dir": str(room / "cache")},
    }
    # resolved and made anew: what goes to another process must not refer to Hydra's whole
    whole: Any = OmegaConf.to_container(OmegaConf.merge(mine, own), resolve=True)
    flat: Any = OmegaConf.create(whole)
    return Race(flat, drawn(cell, AGAIN * cfg.batch_size, cfg.seed))


def flops(race: Race, pairs: Sequence[Pair]) -> float:
    """Of the model, forward and backward (three forwards), over unique tokens.

    Two per weight of the body and token, two per weight of the head and scored token, and four
    per layer, width and attended position; nothing for recomputation, padding or masked ones.
    Frozen weights have no gradient of their own: two forwards, and nothing for adapters.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(race.cfg.model.pretrained)
    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(config)
    head = lm.get_output_embeddings().weight.numel()
    embedding = lm.get_input_embeddings().weight
    tied = lm.get_output_embeddings().weight is embedding
    body = sum(p.numel() for p in lm.parameters()) - embedding.numel() - (0 if tied else head)
    total = 0.0
    for pair in pairs:
        p, sides = len(pair.prompt), (len(pair.chosen), len(pair.rejected))
        attended = p * (p + 1) / 2 + sum(r * p + r * (r + 1) / 2 for r in sides)
        total += 2 * body * len(pair) + 2 * head * sum(sides)
        total += 4 * config.num_hidden_layers * config.hidden_size * attended
    return (2 if race.cfg.model.lora.rank else 3) * total


class Floor:
    """The lower bound: a bare forward and backward over as many unique tokens, no more."""

    def __init__(self, race: Race):
        cfg, size, drawn = race.cfg, race.cfg.batch_size, race.drawn
        self.lm, self.clip = race.opened(), cfg.clip_norm
        self.optimizer = optimizer_of(cfg)
        self.precision = precision_of(cfg.hardware, race.device)
        starts = range(0, len(drawn) - size + 1, size)
        self.batches = [dense(drawn[s : s + size], race.device) for s in starts]

    def run(self, steps: int, watch: Watch) -> list[float]:
        with unmoved(self.lm):
            optimizer = self.optimizer([p for p in self.lm.parameters() if p.requires_grad])
            bare = getattr(self.lm, "get_base_model", lambda: self.lm)()  # of peft's wrapper
            watch.begin()
            for ids, rows, columns, targets in self.batches[:steps]:
                watch.start()
                with self.precision():
                    hidden = bare.base_model(input_ids=ids, use_cache=False).last_hidden_state
                    logits = bare.get_output_embeddings()(hidden[rows, columns])
                    loss = F.cross_entropy(logits.float(), targets)
                loss.backward()
                del hidden, logits, loss
                clip_grad_norm_(self.lm.parameters(), self.clip)
                optimizer.step()
                optimizer.zero_grad()
                watch.stop()
        return []


def dense(pairs: Sequence[Pair], device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """[B, T] ids, then row, column and target of each scored position: the last of every row.

    One row per pair, unique tokens // pairs wide, so that nothing is padded or masked.
    """
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
        cfg, optimizer = race.cfg, race.cfg.optimizer
        settings = peer.settings(
            cfg,
            output_dir=f"{cfg.model.pretrained}/trl",
            beta=cfg.loss.beta,
            learning_rate=optimizer.lr,
            max_length=cfg.max_length,
            use_cpu=race.device.type == "cpu",
            weight_decay=optimizer.weight_decay,
            adam_beta1=optimizer.betas[0],
            adam_beta2=optimizer.betas[1],
            adam_epsilon=optimizer.eps,
            use_liger_kernel=liger,
        )
        self.lm = race.opened()
        self.trainer, self.hooks, self.losses = peer.watched(
            self.lm, as_text(race.drawn), cfg.model.pretrained, settings
        )
        quiet()  # what was imported since

    def run(self, steps: int, watch: Watch) -> list[float]:
        trainer = self.trainer
        trainer.args.max_steps = steps
        self.losses.clear()
        self.hooks.watch = watch
        with unmoved(self.lm):
            trainer.train()
            trainer.optimizer = trainer.lr_scheduler = None  # a run has its own
            trainer.accelerator.free_memory()
            trainer.model_wrapped = trainer.model
        gc.collect()
        return [float(loss) for loss in self.losses]


class Kind(NamedTuple):
    """A contestant as tables name it, what makes it, and what a reader has to know of it."""

    title: str
    make: Callable[[Race], Contestant]
    needs: tuple[str, ...] = ()  # packages
    note: str = ""

    @property
    def installed(self) -> bool:
        return all(find_spec(package) is not None for package in self.needs)


CONTESTANTS: Mapping[str, Kind] = {
    "ours": Kind("ours", lambda race: Ours.on(race.cfg, race.pairs)),
    "floor": Kind(
        "floor",
        Floor,
        note="floor: a bare forward and backward of the same transformers model over as many "
        "unique tokens (prompt once, both responses), in dense rows without padding or mask "
        "(plain causal attention), the head on exactly as many positions as are scored and all "
        "their logits at once, then the same clipping and AdamW. No Lightning, no preference "
        "loss, nothing logged",
    ),
    "trl": Kind(
        "TRL",
        partial(Trl, liger=False),
        needs=("trl",),
        note="TRL: DPOTrainer with precomputed reference log-probabilities, no gradient "
        "checkpointing, no logging, no saving; padding_free is switched off in this version by "
        "TRL itself. It encodes the prompt once per response. On the CPU it scores every "
        "position, prompts included, and computes entropies with them; on CUDA completions only. "
        "With hardware.compile=true torch compiles it too (torch_compile)",
    ),
    "liger": Kind("TRL + Liger", partial(Trl, liger=True), needs=("trl", "liger_kernel")),
}


def twice(race: Race, name: str) -> tuple[Contestant, Contestant]:
    """The same for loading the code and for being measured."""
    made = CONTESTANTS[name].make(race)
    return made, made
