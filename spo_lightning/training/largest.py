"""Microbatches to try in, the most tokens that one may have so that memory suffices out.

Nothing of a trial stays: numbers depend on what is found by rounding alone.
"""

import gc
import logging
import math
import os
from collections.abc import Callable

import torch

from spo_lightning.data.batch import Microbatches
from spo_lightning.errors import is_out_of_memory
from spo_lightning.models import memory
from spo_lightning.records.progress import hushed
from spo_lightning.training.module import Preference
from spo_lightning.world import World

log = logging.getLogger(__name__)

TAKEN = 0.8  # share of the free memory; the rest is for what trials do not show
FURTHER = 1.1  # how much larger another trial is at least
SAMPLE = 2**16  # weights of the parameter that shows what an optimizer keeps
MIB = 2**20


def largest(
    module: Preference,
    world: World,
    trial: Callable[[int], Microbatches],
    least: int,
    whole: int,
) -> int:
    """The most that fit in every process; between one row and the process's whole share."""
    device, peaks = module.device, {}
    gc.collect()
    before, here = memory.in_use(device), 1
    if device.type != "cuda" and world.size > 1:
        here = int(os.environ["LOCAL_WORLD_SIZE"])  # they take of the same
    free = min(world.gather(memory.free(device))) / here  # all look before the first tries
    room = TAKEN * free - _to_come(module)

    def weigh(tokens: int) -> float:
        peaks[tokens] = _peak(module, trial(tokens), before)
        return peaks[tokens]

    found = most(weigh, least, whole, room)
    agreed = min(world.gather(found))
    log.info(
        "data.tokens_per_batch=auto: %d tokens a forward, %s: %d trials, %.0f of %.0f MiB free",
        *(agreed, "all of an outer step" if agreed >= whole else "the most that fit"),
        *(len(peaks), peaks[found] / MIB, free / MIB),
    )
    return agreed


def most(weigh: Callable[[int], float], least: int, whole: int, room: float) -> int:
    """The most tokens, up to ``whole``, that the room holds; ``least`` where none do.

    Every trial is as far ahead as those before it let hope, at most twice, so that none takes more
    than there is. ``weigh``: tokens to bytes, infinite where they were not to be had.
    """
    good, ceiling, known = least, whole, {least: weigh(least)}
    while known[least] <= room and good < whole:
        more = int(min(2 * good, ceiling, _hoped(known, room)))
        if more <= good or more < min(whole, FURTHER * good):
            break
        known[more] = weigh(more)
        good = more if known[more] <= room else good
        failed = [tokens for tokens, taken in known.items() if taken > room]
        ceiling = (good + min(failed)) // 2 if failed else whole
    return good


def _hoped(known: dict[int, float], room: float) -> float:
    """Tokens that would fill the room, on the line through the last two trials, or through one
    and nothing."""
    finite = sorted((tokens, taken) for tokens, taken in known.items() if taken < math.inf)
    (less, light), (more, heavy) = [(0, 0.0), (0, 0.0), *finite][-2:]
    if heavy <= light:
        return math.inf
    return more + (room - heavy) * (more - less) / (heavy - light)


def _peak(module: Preference, batch: Microbatches, before: int) -> float:
    """Bytes at the peak of an outer step's passes over these, above ``before``."""
    device, lost = module.device, False
    gpus = [device] if device.type == "cuda" else []
    memory.forget(device)
    try:
        with torch.random.fork_rng(gpus), module.trainer.precision_plugin.train_step_context():
            module.rehearse(batch.to(device))
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        lost = True
    taken = memory.peak(device) - before
    for parameter in module.trainable().values():
        parameter.grad = None
    gc.collect()
    if gpus:
        torch.cuda.empty_cache()
    return math.inf if lost else taken


def _to_come(module: Preference) -> float:
    """Bytes that the optimizer will take at its first step, from what it takes of a small one."""
    theta = list(module.trainable().values())
    sample = torch.nn.Parameter(torch.zeros(SAMPLE, dtype=theta[0].dtype, device=module.device))
    with hushed():
        optimizer = module.make_optimizer([sample])
    before = _bytes(optimizer.state_dict())
    sample.grad = torch.zeros_like(sample)
    optimizer.step()
    each = (_bytes(optimizer.state_dict()) - before) / SAMPLE
    return each * sum(p.numel() for p in theta)


def _bytes(tree: object) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.nbytes
    if isinstance(tree, dict):
        tree = list(tree.values())
    return sum(map(_bytes, tree)) if isinstance(tree, (list, tuple)) else 0
