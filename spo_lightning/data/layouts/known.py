"""The yamls of ``conf/data/layout`` in, layouts out: each says which columns it goes by.

A yaml names a function of one row and the roles that it reads, each with its column's words by the
kind of their values. ``response_{0,1}`` names two columns at once, whose role is then a mapping of
the marks in the braces to the values; of ``post|article`` every row has the one or the other.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from spo_lightning.data.layouts.columns import WORDS, takes, value_at
from spo_lightning.data.rows import Row
from spo_lightning.errors import UserError

PACKAGE = Path(__file__).parents[2]
# the wheel's copy first: beside an installed package a stranger's conf may lie
CONF = next(p for p in (PACKAGE / "conf", PACKAGE.parent / "conf") if p.is_dir())
BRACES = re.compile(r"\{(.+)\}")
PAIRS, LABELLED, TEXTS = "pairs", "labelled", "texts"  # what a layout's rows become
KEYS = {"_target_", "gives", "needs", "one_of", "may", "aside", "alike", "never", "gathered"}

Kinds = Mapping[str, str]  # of a row's values, by path
Groups = Sequence[tuple[Kinds, int, int]]  # such, how many rows have them, and the first's place
Words = Mapping[str, list[str]]  # column words, by the kind of value they are taken with


@dataclass(frozen=True)
class Column:
    """Where a role's value stands. ``marks``: of several columns that are one role."""

    word: str
    paths: tuple[str, ...]
    kinds: tuple[str, ...]
    marks: tuple[str, ...] = ()
    exact: bool = True  # whether the values are of the very kind that the layout asks for

    def value(self, row: Row) -> Any:
        # a null may be arrow's or a NaN
        values = [
            None if kind == "null" else value_at(row, path)
            for path, kind in zip(self.paths, self.kinds)
        ]
        return dict(zip(self.marks, values)) if self.marks else values[0]


Found = dict[str, Column]  # by role


@dataclass(frozen=True)
class Layout:
    """One way in which preference sets are published."""

    name: str
    target: str
    gives: str
    needs: Mapping[str, Words]
    one_of: Mapping[str, Words]
    may: Mapping[str, Words]
    aside: Mapping[str, Words]  # columns that it knows and does not read
    alike: tuple[str, ...]  # roles that are all text, or none of them
    never: tuple[str, ...]  # columns of files that are of another layout
    gathered: tuple[str, ...]  # roles of which rows that are alike but for them make one list
    own: Mapping[str, Any]  # keys of its function

    @functools.cached_property
    def function(self) -> Callable[..., list[Row]]:
        import hydra.utils

        function = hydra.utils.get_method(self.target)
        return functools.partial(function, **self.own)

    def asks(self, key: str) -> bool:
        """Whether its function reads a key of the source."""
        return key in inspect.signature(self.function).parameters

    @property
    def roles(self) -> dict[str, Words]:
        return {**self.one_of, **self.needs, **self.may, **self.aside}

    def passed_over(self, groups: Groups) -> list[str]:
        """Columns of a file that say more than the layout reads."""
        none = ("", "null", "empty")
        return [
            name
            for name in self.never
            if any(kinds.get(name, "") not in none for kinds, _, _ in groups)
        ]

    def settled(self, groups: Groups, named: Iterable[str]) -> "Layout":
        """With one word for each role, which most rows have; of ``one_of`` with one role.

        ``named``: roles that stand in columns of their own name, by the user's word.
        """
        chosen: dict[str, Words] = {}
        rows: dict[str, int] = {}
        for role, words in self.roles.items():
            if role in named:
                words = {kind: [role] for kind in words}
            counts: dict[str, int] = {}
            for kinds, count, _ in groups:
                for word in {column.word for column in _columns(kinds, words)}:
                    counts[word] = counts.get(word, 0) + count
            order = [name for names in words.values() for name in names]
            word = max(order, key=lambda name: counts.get(name, 0))
            rows[role] = counts.get(word, 0)
            chosen[role] = {kind: [word] for kind, names in words.items() if word in names}
        parts = {p: {r: chosen[r] for r in getattr(self, p)} for p in ("needs", "may", "aside")}
        if self.one_of:
            one = max(self.one_of, key=lambda role: (role in named, rows[role]))
            parts["one_of"] = {one: chosen[one]}
        return replace(self, **parts)

    def found(self, kinds: Kinds) -> tuple[Found, list[str]]:
        """Its roles among the columns of a row, and what the row lacks of them."""
        columns: Found = {}
        free = dict(kinds)  # a column is read by one role
        for role, words in self.roles.items():
            column = next(_columns(free, words), None)
            if column is not None:
                columns[role] = column
                for path in column.paths:
                    free.pop(path, None)
        lacks = [role for role in (*self.one_of, *self.needs) if role not in columns]
        texts = {_is_text(columns[role]) for role in self.alike if role in columns}
        if not lacks and len(texts) > 1:
            told = (f"{role} is {WORDS[columns[role].kinds[0]]}" for role in self.alike)
            lacks = [", ".join(told) + ": make all text or all messages"]
        return columns, lacks


def _columns(kinds: Kinds, words: Words) -> Iterator[Column]:
    """The words that are columns of the kind that they are taken with, in order."""
    for kind, names in words.items():
        for name in names:
            for one in name.split("|"):
                marks, paths = _spelled(one)
                has = tuple(kinds.get(path, "") for path in paths)
                if all(has) and all(takes(kind, of) for of in has):
                    yield Column(name, paths, has, marks, all(of == kind for of in has))
                    break


def _spelled(name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The marks in the braces of a column word, and the columns that it names."""
    braces = BRACES.search(name)
    marks = tuple(braces[1].split(",")) if braces else ()
    return marks, tuple(BRACES.sub(mark, name) for mark in marks) or (name,)


def paths_of(names: Iterable[str]) -> list[str]:
    """All columns that column words name."""
    return [path for name in names for one in name.split("|") for path in _spelled(one)[1]]


def _is_text(column: Column) -> bool:
    return takes("text", column.kinds[0])


_folders: list[Path] = [CONF / "data/layout"]


def folders() -> list[Path]:
    """Where layouts are looked for: the package's, and those of the user's ``--config-dir``."""
    from hydra.core.global_hydra import GlobalHydra

    found = list(_folders)
    if GlobalHydra.instance().is_initialized():
        for element in GlobalHydra.instance().config_loader().get_search_path().get_path():
            scheme, _, place = element.path.partition("://")
            folder = Path(place) / "data/layout"
            if scheme == "file" and folder.is_dir() and folder not in found:
                found.append(folder)
    return found


def look_in(places: list[Path]) -> None:
    """Where another process, which has the command line, looks for layouts."""
    _folders[:] = places


def layouts() -> dict[str, Layout]:
    """All layouts by name; a later folder's yaml takes the place of an earlier one's."""
    paths = {path.stem: path for place in folders() for path in sorted(place.glob("*.yaml"))}
    return {name: _read(path, path.stat().st_mtime_ns) for name, path in sorted(paths.items())}


@functools.cache
def _read(path: Path, written: int) -> Layout:
    try:
        node = yaml.safe_load(path.read_text("utf-8"))
        parts = {part: node.get(part, {}) for part in ("needs", "one_of", "may", "aside")}
        words = [words for part in parts.values() for words in part.values()]
        whole = all(isinstance(names, list) for kinds in words for names in kinds.values())
        if node["gives"] not in (PAIRS, LABELLED, TEXTS) or not whole:
            raise KeyError
        own = {key: value for key, value in node.items() if key not in KEYS}
        parts |= {part: tuple(node.get(part, ())) for part in ("alike", "never", "gathered")}
        return Layout(path.stem, node["_target_"], node["gives"], **parts, own=own)
    except (yaml.YAMLError, KeyError, AttributeError, TypeError):
        raise UserError(
            f"{path}: no layout: it needs _target_, gives (pairs, labelled or texts), and under "
            "needs the roles, each with a list of column words by kind"
        ) from None
