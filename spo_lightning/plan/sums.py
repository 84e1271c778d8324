"""A config in; bytes of each kind on a device, of the disk, and the work of a step out."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils._pytree import tree_leaves

from spo_lightning.config.build import built
from spo_lightning.losses import asks
from spo_lightning.models import head
from spo_lightning.models.attention import SHORT
from spo_lightning.models.policy import DTYPES
from spo_lightning.models.scorer import FLOATS
from spo_lightning.plan.memory import Peaks, Rows, of_look, of_step
from spo_lightning.plan.shape import BLOCKS, Shape, shape_of
from spo_lightning.plan.theta import Copies, copies_of
from spo_lightning.run.job import loss_of
from spo_lightning.training import bf16
from spo_lightning.training.fit import optimizer_of

FEW = (1, 4)  # pairs that are counted; more take as much each
PROBE = 2**16  # parameters of which an optimizer's memory is measured

Bytes = dict[str, float]


@dataclass(frozen=True)
class Planned:
    """What a run takes: on a device by stage and by what holds it, on the disk, and of work."""

    stages: dict[str, Bytes]
    disk: Bytes
    products: float  # floating-point operations of matrices in an outer step
    attended: float  # of attention
    moved: float  # bytes that the optimizer reads and writes

    @property
    def fullest(self) -> str:
        return max(self.stages, key=lambda name: sum(self.stages[name].values()))

    @property
    def device(self) -> Bytes:
        """At the peak."""
        return self.stages[self.fullest]

    @property
    def peak(self) -> float:
        return sum(self.device.values())


@dataclass(frozen=True)
class Run:
    """A run's config, and what is found of it once."""

    cfg: DictConfig
    shape: Shape
    copies: Copies
    kept: float  # bytes of a trained weight that the optimizer keeps

    @property
    def shards(self) -> int:
        """Devices that share weights, gradients and moments."""
        return self.cfg.hardware.devices if self.cfg.hardware.strategy == "fsdp" else 1

    @property
    def device(self) -> str:
        return "cpu" if self.cfg.hardware.accelerator == "cpu" else "cuda"

    @property
    def rounds(self) -> bool:
        """Whether autocast makes copies of weights in bfloat16."""
        return self.cfg.hardware.precision == "bf16-mixed" and self.shape.itemsize == 4

    @property
    def own(self) -> int:
        """Pairs of an outer step on a device."""
        return max(1, self.cfg.batch_size // self.cfg.hardware.devices)

    @property
    def micro(self) -> int:
        """Pairs of a microbatch."""
        limit = self.cfg.data.get("tokens_per_batch")
        limit = 1 if limit == "auto" else limit  # the least that it may come to
        each = self.cfg.plan.prompt + self.rows(1).answers * self.cfg.plan.completion
        micro = limit // each if limit else self.cfg.micro_batch_size
        return max(1, min(self.own, micro))

    def rows(self, pairs: int) -> Rows:
        answers = 1 if self.cfg.loss.get("unpaired") else 2
        prompt, completion = self.cfg.plan.prompt, self.cfg.plan.completion
        short = prompt + completion - 1 <= SHORT
        half = self.rounds or self.shape.itemsize == 2
        wide = short and half and self.device == "cpu"
        return Rows(pairs, prompt, completion, answers, wide)

    @property
    def trained(self) -> float:
        """Bytes of a gradient."""
        return self.shape.size.trained * self.shape.each

    @property
    def end(self) -> float:
        """Bytes of the gradient of the head's matrix, or of the embedding's."""
        return 0 if self.cfg.model.lora.rank else self.shape.each * self.shape.ends

    @property
    def ends(self) -> int:
        """How many of them there are."""
        return 1 if self.shape.tied else 2

    @property
    def apart(self) -> bool:
        """Whether devices that share weights gather embedding and head each by itself."""
        return self.shards > 1 and not self.shape.tied


def run_of(cfg: DictConfig) -> Run:
    shape = shape_of(cfg)
    dtype = torch.float32 if cfg.model.lora.rank else DTYPES[cfg.model.dtype]
    return Run(cfg, shape, copies_of(built(cfg.solver)), of_optimizer(cfg, dtype))


def planned(run: Run) -> Planned:
    """All of a run that is known before it."""
    cfg, shape, copies = run.cfg, run.shape, run.copies
    part = run.trained / run.shards
    looks = min(cfg.eval.batch_size, cfg.eval.max_rows or cfg.plan.pairs)
    stays: Bytes = {"weights": _weights(run), "reference": _reference(run)}
    moments = {"optimizer": shape.size.trained * run.kept / run.shards}
    held = stays | moments | {"gradients": part, "copy for answers": 0.0}
    stages = {
        "training": held | {"solver": copies.during * part, "activations": _active(run)},
        "optimizer": held | {"solver": copies.outside * part, "activations": _widened(run)},
        "held-out": held | {"solver": copies.kept * part, "activations": _look(run, looks)},
    }
    key = "hardware.sharding.gather_for_answers"
    if run.shards > 1 and OmegaConf.select(cfg, key, default=True):
        copy = {"copy for answers": shape.size.bytes, "activations": 0.0}
        stages["answers"] = held | {"solver": copies.kept * part} | copy
    return Planned(stages, _disk(run), *_work(run))


# -- weights


def _weights(run: Run) -> float:
    """Of a device; a block's and the ends whole while they compute, where the rest is shared."""
    size, block, end = run.shape.size, run.shape.block.bytes, run.shape.ends * run.shape.itemsize
    if run.shards == 1:
        return size.bytes
    if not OmegaConf.select(run.cfg, "hardware.sharding.reshard_after_forward", default=True):
        return size.bytes + size.bytes / run.shards
    return size.bytes / run.shards + (max(block, end) if run.apart else block + end)


def _reference(run: Run) -> float:
    """A copy that stays what the policy was: adapters and rows scored before need none."""
    cfg, size = run.cfg, run.shape.size
    stays = cfg.data.get("stream") or asks(loss_of(cfg), "divergences")
    whole = cfg.model.reference is not None or (stays and not cfg.model.lora.rank)
    moves = run.trained if cfg.model.get("reference_sync") else 0
    return (size.bytes * bool(whole) + moves) / run.shards


# -- activations


def _active(run: Run) -> float:
    """Beside gradients, at the peak of a microbatch."""
    again = run.own > run.micro
    peaks = _peaks(run, run.micro, again)
    logits = _logits(run, run.rows(run.micro).scored, learns=True)
    before = again * run.ends * run.end  # gradients of an earlier microbatch
    # the head's, for the embedding's; or as the only one
    waits = run.shape.tied or not (again or run.apart)
    # a device has its share of the gradients of all blocks but the one that is computed, and of
    # what an earlier microbatch has left; those of the ends it has whole until the end, or as they
    # are computed and as they are summed
    whole = run.ends * run.end
    shared = (run.trained - whole) * (1 - 1 / run.shards)
    block = run.shape.block.trained * run.shape.each * (run.shards > 1)
    earlier = again * (shared + whole * (1 - 1 / run.shards))
    peak = max(
        peaks.forward + before - earlier,
        peaks.left + before + run.end + max(logits, run.apart * run.end) - earlier,  # or summed
        peaks.top + before + waits * run.end - earlier,
        peaks.bottom + (2 + (again or run.apart) / run.shards) * run.end - shared + block,
    )
    return peak - run.trained / run.shards + _beside(run)


def _beside(run: Run) -> float:
    """Copies of weights in another precision: autocast's, and of a quantised matrix that is full
    while it multiplies."""
    rounded = run.rounds * 2 * run.shape.size.matrices * (not run.cfg.model.lora.rank)
    full = run.shape.block.largest * _half(run) if run.cfg.model.get("quantize") else 0
    return rounded + full


def _look(run: Run, pairs: int) -> float:
    """A forward that keeps nothing, and its logits."""
    peaks = _peaks(run, pairs, None)
    rows = run.rows(pairs)
    logits = _logits(run, rows.scored, learns=False)
    # entropy and mass of the likeliest: logits and probabilities of some tokens, whole
    vocabulary = run.shape.vocabulary
    some = min(rows.scored // 2, max(1, run.cfg.hardware.logits_mib * FLOATS // vocabulary))
    top = some * vocabulary * (4 + 4 + (0 if _half(run) == 4 else 2))
    return max(peaks.forward, peaks.left + max(logits, top)) + _beside(run)


def _peaks(run: Run, pairs: int, again: bool | None) -> Peaks:
    """Of all blocks and pairs; ``again`` is None without gradients."""
    found = {some: _counted(run.shape, run.rows(some), again) for some in {*FEW} if some < pairs}
    if len(found) < len(FEW):
        return _counted(run.shape, run.rows(pairs), again)
    (few, less), (more, much) = sorted(found.items())
    return less.plus(much, (pairs - few) / (more - few))


@cache
def _counted(shape: Shape, rows: Rows, again: bool | None) -> Peaks:
    """Of all blocks."""
    two, three = (
        of_look(shape.small(some), rows)
        if again is None
        else of_step(shape.small(some), rows, again)
        for some in BLOCKS
    )
    return two.plus(three, shape.blocks - BLOCKS[0])


def _half(run: Run) -> int:
    """Bytes of a number that the head multiplies."""
    return 2 if run.rounds else run.shape.itemsize


def _logits(run: Run, scored: int, learns: bool) -> float:
    """What ``models/head.py`` holds at once."""
    most, each = run.cfg.hardware.logits_mib * FLOATS, _half(run)
    whole = scored * run.shape.vocabulary
    block = min(most, head.BLOCK[run.device], whole)
    kept = whole * each if learns and whole <= most else 0
    # of a block: the product, in float32, exponentials; of the states the slope, in float32
    found = kept + block * (each + 8) + learns * scored * run.shape.width * 4
    return found + run.rounds * run.shape.ends * each * (1 + learns)


def _widened(run: Run) -> float:
    """Copies in float32 that live for a step on weights in bfloat16."""
    cfg = run.cfg
    if run.shape.each != 2 or cfg.optimizer.get("bf16", "plain") == "plain":
        return 0
    largest = max(run.shape.block.largest, run.shape.ends) / run.shards
    most = max(bf16.BLOCK[run.device], largest)
    return min(most, run.shape.size.trained / run.shards) * (4 + 4)


def of_optimizer(cfg: DictConfig, dtype: torch.dtype) -> float:
    """Bytes that the optimizer keeps of a parameter, from a step on a small real one."""
    p = nn.Parameter(torch.zeros(PROBE, dtype=dtype))
    optimizer: Any = optimizer_of(cfg)([p])
    p.grad = torch.ones_like(p)
    optimizer.step()
    inner = getattr(optimizer, "inner", optimizer)  # of weights in bfloat16
    kept = [t for t in tree_leaves([*inner.state.values()]) if isinstance(t, torch.Tensor)]
    kept += getattr(optimizer, "wide", [])
    return sum(t.numel() * t.element_size() for t in kept if t.numel() > 1) / PROBE


# -- disk and time


def _disk(run: Run) -> Bytes:
    cfg, asked = run.cfg, run.cfg.plan
    whole = run.shape.size.weights * run.shape.itemsize
    written = run.trained if cfg.model.lora.rank and not cfg.model.lora.merge else whole
    files = 2 if cfg.checkpoint.monitor is None else 3  # the last, the one before it, the best
    moments = run.shape.size.trained * run.kept
    tokens = asked.pairs * (asked.prompt + 2 * asked.completion)
    return {
        "checkpoints": files * (run.trained + moments),
        "model": written,
        # a float of every scored token, an id of every token
        "cache": 4.0 * (2 * asked.pairs * asked.completion + tokens),
    }


def _work(run: Run) -> tuple[float, float, float]:
    """Operations of matrices and of attention in an outer step, and bytes the optimizer moves."""
    cfg, shape, rows = run.cfg, run.shape, run.rows(run.own)
    p, c = rows.prompt, rows.completion
    forward = 2 * (shape.size.matrices * rows.tokens + shape.ends * rows.scored)
    attended = p * (p + 1) / 2 + rows.answers * (c * p + c * (c + 1) / 2)  # pairs of tokens
    attended *= 4 * shape.blocks * shape.heads * run.own
    # backward: by inputs, and by weights where they train; a checkpointed layer is done again
    times = (2 if cfg.model.lora.rank else 3) + cfg.hardware.activation_checkpointing
    times *= run.copies.passes
    moved = (2 * shape.size.trained * run.kept + 3 * run.trained) / run.shards
    return times * forward, times * attended, moved


def seconds(found: Planned, rates: Mapping[str, float]) -> float:
    """Of an outer step, by measured rates."""
    return (
        found.products / rates["matrices"]
        + found.attended / rates["attention"]
        + found.moved / rates["optimizer"]
    )
