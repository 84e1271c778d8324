"""Yamls of losses and their functions in, what there is to say of each out."""

import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from spo_lightning.errors import UserError

PAPER = re.compile(r"\b\d{4}\.\d{4,5}\b")
AROUND = ("ld_alpha", "wpo")  # said once for all losses


@dataclass(frozen=True)
class Key:
    """One of a loss's own settings."""

    name: str
    default: Any
    meaning: str


@dataclass(frozen=True)
class Objective:
    """A loss, as its yaml and its docstring describe it."""

    name: str
    head: list[str]  # the comment at the top of the yaml
    node: dict[str, Any]
    keys: list[Key]
    function: Callable[..., Tensor]

    @property
    def title(self) -> str:
        return " ".join(line for line in self.head if not line.startswith("Survey:"))

    @property
    def survey(self) -> str:
        """Its place in the survey's taxonomy."""
        told = [line.removeprefix("Survey: ") for line in self.head if line.startswith("Survey:")]
        return " ".join(told) or "not said."

    @property
    def about(self) -> list[str]:
        """The paragraphs of the docstring, the formula last where there is one."""
        return (inspect.getdoc(self.function) or "").split("\n\n")

    @property
    def formula(self) -> str | None:
        return next((text for text in self.about if text.startswith("$")), None)

    @property
    def papers(self) -> list[str]:
        """As the yaml names them, or else the docstring."""
        places = (PAPER.findall(self.title), PAPER.findall(" ".join(self.about)))
        return next((list(dict.fromkeys(found)) for found in places if found), [])

    @property
    def asks(self) -> set[str]:
        return {*inspect.signature(self.function).parameters}

    @property
    def divergences(self) -> bool:
        chosen = (entry for entry in self.node.get("defaults", ()) if isinstance(entry, dict))
        return any("divergence" in entry for entry in chosen)

    def loss(self) -> partial:
        """The function with the keys that its yaml gives it."""
        keys = {key.name: key.default for key in self.keys}
        # what another key decides is a seed
        return partial(
            self.function, **{k: 0 if str(v)[:1] == "$" else v for k, v in keys.items()}
        )


def objectives(rooms: list[Path]) -> list[Objective]:
    """All losses of the directories ``conf`` and others like it, by name."""
    files = {path.stem: path for room in rooms for path in (room / "loss").glob("*.yaml")}
    found = [_objective(name, path) for name, path in sorted(files.items())]
    return [one for one in found if one is not None]


def _objective(name: str, path: Path) -> Objective | None:
    text = path.read_text("utf-8")
    node = yaml.safe_load(text)
    if "_target_" not in node:  # a shorthand for another, like spo
        return None
    import hydra.utils

    try:
        function = hydra.utils.get_object(node["_target_"])
    except Exception as error:
        raise UserError(f"{path}: {node['_target_']} is not there: {error}") from error
    lines = text.splitlines()
    top = next(number for number, line in enumerate(lines) if not line.startswith("#"))
    own = inspect.signature(function).parameters
    keys = [
        Key(key, node[key], meaning)
        for key, meaning in _meanings(lines[top:])
        if key in own and key not in AROUND
    ]
    return Objective(name, [line.lstrip("# ") for line in lines[:top]], node, keys, function)


def _meanings(lines: list[str]) -> Iterator[tuple[str, str]]:
    """Keys at the top of a yaml, with the comment behind each or above it."""
    above: list[str] = []
    for line in lines:
        if line.startswith("#"):
            above.append(line.lstrip("# "))
            continue
        key, colon, rest = line.partition(":")
        if colon and key.isidentifier():
            behind = rest.partition("#")[2].strip()
            yield key, " ".join([*above, behind] if behind else above)
        above = []
