"""A run's directory and a command line in, the settings that it goes on with out, or a refusal."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from spo_lightning import __version__
from spo_lightning.errors import UserError
from spo_lightning.records.directory import MAY_DIFFER, PACE, REMOVED, choices_of

FOUND = ("data.layout",)  # null leaves it to be found, and config.yaml keeps what was


def resumed(
    cfg: DictConfig, directory: Path, touched: Sequence[str], choices: Mapping[str, str]
) -> tuple[DictConfig, dict[str, str]]:
    """The directory's config.yaml and choices, with what may differ taken from ``cfg``.

    ``touched``: keys that the command line names. One that differs otherwise is refused by name.
    """
    path = directory / "config.yaml"
    if not path.exists():
        return cfg, dict(choices)
    _refuse_another_version(directory)
    chosen = choices_of(path)
    named = {key.replace("/", "."): key for key in choices}
    for key in (named[key] for key in touched if key in named):
        if key.split("/")[0] in MAY_DIFFER:
            chosen[key] = choices[key]
        elif chosen and choices[key] != chosen.get(key):
            raise UserError(_differs(key, chosen.get(key), choices[key], path))
    return _going_on(cfg, path, touched), chosen


def refuse_another(cfg: DictConfig, path: Path, free: Sequence[str]) -> None:
    """A key that differs from what config.yaml at ``path`` holds is refused by name, but ``free``
    ones and those that change no number."""
    _refuse_another_version(path.parent)
    trees = (OmegaConf.load(path), cfg)
    before, now = (_leaves(OmegaConf.to_container(tree, resolve=True), "") for tree in trees)
    for key in sorted(before.keys() | now.keys()):
        name, idle = key.removeprefix("."), (*free, *MAY_DIFFER, "cache")
        differs = before.get(key) not in (now.get(key), REMOVED)
        if differs and name not in idle and name.split(".")[0] not in idle:
            raise UserError(_differs(name, before.get(key), now.get(key), path))


def _refuse_another_version(directory: Path) -> None:
    """Keys and what they name change with the minor version; a run goes on with its own."""
    try:
        theirs = json.loads((directory / "status.json").read_text(encoding="utf-8"))["version"]
    except (OSError, ValueError, KeyError):
        theirs = None
    same = theirs is None or theirs.split(".")[:2] == __version__.split(".")[:2]
    lost = _lost(OmegaConf.to_container(OmegaConf.load(directory / "config.yaml"))) if same else ""
    if same and not lost:
        return
    named = f"it names {lost}, which is not there any more; " if lost else ""
    raise UserError(
        f"{directory} is a run of spo_lightning {theirs or '(version unknown)'}, and this is "
        f"{__version__}: {named}go on with the version that began it, or start a new run in "
        "another hydra.run.dir"
    )


def _lost(tree: Any) -> str | None:
    """A ``_target_`` of ours in the tree that no longer exists."""
    if isinstance(tree, list):
        tree = dict(enumerate(tree))
    if not isinstance(tree, dict):
        return None
    name = tree.get("_target_")
    if isinstance(name, str) and name.startswith("spo_lightning."):
        from hydra.utils import get_object

        try:
            get_object(name)
        except Exception:
            return name
    return next(filter(None, map(_lost, tree.values())), None)


def _differs(name: str, before: Any, now: Any, path: Path) -> str:
    return (
        f"{name} is {before!r} in {path} and {now!r} here: a run goes on with its own settings; "
        "leave the override out or start a new run"
    )


def _going_on(cfg: DictConfig, path: Path, touched: Sequence[str]) -> DictConfig:
    saved = OmegaConf.load(path)
    assert isinstance(saved, DictConfig)
    asked = OmegaConf.to_container(cfg, resolve=True)
    flat = saved.optimizer.schedule == "constant" and saved.optimizer.warmup == 0
    may_grow = flat and saved.max_steps >= 0

    def free(key: str) -> bool:
        first, last = key.split(".")[0], key.split(".")[-1]
        paced = first == "judge" and last in PACE
        return paced or (key == "max_steps" and may_grow) or first in MAY_DIFFER

    for key in touched:
        if free(key) or _at(OmegaConf.to_container(saved), key) == REMOVED:
            OmegaConf.update(saved, key, OmegaConf.select(cfg, key), merge=False, force_add=True)
            continue
        before, now = (
            _leaves(_at(tree, key), key) for tree in (OmegaConf.to_container(saved), asked)
        )
        for name in sorted(before.keys() | now.keys()):
            found = name in FOUND and now.get(name) is None
            same = before.get(name) in (now.get(name), REMOVED)
            if not (same or found or free(name)):
                raise UserError(_differs(name, before.get(name), now.get(name), path))
    saved.ckpt_path = cfg.ckpt_path
    return saved


def _at(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree.get(part) if isinstance(tree, dict) else None
    return tree


def _leaves(tree: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v for name, sub in tree.items() for k, v in _leaves(sub, f"{prefix}.{name}").items()
    }
