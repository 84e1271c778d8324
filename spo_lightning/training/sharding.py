"""How Lightning trains on several processes, and how checkpoints hold what is spread over them.

The module comes as it is trained (``models/sharded.py``). To a checkpoint every process writes its
parts (``records/parts.py``); it is read as whole tensors, of which each takes what is its own, so
that a run goes on from it on any number of processes, spread or not.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DoublePrecision
from lightning.pytorch.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor

from spo_lightning.models.scorer import Scorer
from spo_lightning.records.checkpoints import write_parts
from spo_lightning.world import World, spread_like

Tree = Any  # of dicts, lists and tuples


def processes(world: World, scorer: Scorer, precision: Any) -> dict[str, Any]:
    """What Lightning's Trainer is told of the processes, which have begun before."""
    if world.size == 1:
        return {"devices": 1, "precision": precision}
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    here = int(os.environ["LOCAL_WORLD_SIZE"])
    told = {"devices": here, "num_nodes": world.size // here, "precision": precision}
    plugins: list[Any] = [TorchElasticEnvironment()]  # it reads what run/processes.py has set
    if scorer.spread is None:
        return {**told, "strategy": "ddp", "plugins": plugins}
    if precision == "64-true":  # told its name, the strategy refuses it
        told["precision"] = None
        plugins.append(DoublePrecision())
    return {**told, "strategy": Sharded(world.size), "plugins": plugins}


class Sharded(ModelParallelStrategy):
    """Saves parts and deals what is read; ``size``: processes."""

    def __init__(self, size: int):
        super().__init__(size, 1, save_distributed_checkpoint=False)

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return dict(self._named())

    def optimizer_state(self, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        write_parts(checkpoint, Path(filepath), first=self.is_global_zero)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> Any:
        return self.checkpoint_io.load_checkpoint(checkpoint_path, weights_only=weights_only)

    @torch.no_grad()
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        named = self._named()
        for name, value in checkpoint["state_dict"].items():
            named[name].copy_(spread_like(value, named[name]))

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        theta = list(self._named().values())
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"]):
            optimizer.load_state_dict(dealt(state, theta))

    def _named(self) -> dict[str, Tensor]:
        module: Any = self.lightning_module
        return {f"scorer.{name}": p for name, p in module.trainable().items()}


def dealt(tree: Tree, theta: Sequence[Tensor]) -> Tree:
    """The tree in which what stands for each of ``theta`` is spread as it is: lists and tuples of
    as many tensors, and dicts by their number, of which an optimizer's state is one."""
    if isinstance(tree, dict):
        if tree and all(isinstance(key, int) for key in tree):
            return {k: _mapped(v, partial(_as, like=theta[k])) for k, v in tree.items()}
        return {key: dealt(value, theta) for key, value in tree.items()}
    if not isinstance(tree, (list, tuple)):
        return tree
    one_each = len(tree) == len(theta) and all(isinstance(v, Tensor) for v in tree)
    if one_each and all(v.shape == t.shape for v, t in zip(tree, theta)):
        return type(tree)(spread_like(v, t) for v, t in zip(tree, theta))
    return type(tree)(dealt(value, theta) for value in tree)


def _as(value: Tensor, like: Tensor) -> Tensor:
    """An optimizer counts its steps beside its moments."""
    return spread_like(value, like) if value.shape == like.shape else value


def _mapped(tree: Tree, of: Callable[[Tensor], Tensor]) -> Tree:
    if isinstance(tree, Tensor):
        return of(tree)
    if isinstance(tree, dict):
        return {key: _mapped(value, of) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_mapped(value, of) for value in tree)
    return tree
