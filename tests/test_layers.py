"""Imports point one way, the commands start light, files and functions stay short."""

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import hydra.utils
import pytest
import yaml

import spo_lightning
from spo_lightning.command import CONF
from spo_lightning.sweep import PLUGINS

PACKAGE = Path(spo_lightning.__file__).parent
# a room may import from the rooms before it, and from itself
ROOMS = (
    *("errors", "world", "config", "records", "data", "models", "losses", "solvers", "cache"),
    *(
        "diffusion",
        "evaluation",
        "judges",
        "capability",
        "training",
        "sampling",
        "studies",
        "design",
        "mixture",
    ),
    *("run", "sweep", "report", "command", "bench", "objectives", "preflight", "plan", "rounds"),
    "prompting",
    *("train", "eval", "inspect", "sample", "iterate", "prompt_search", "export", "dashboard"),
)
# what the rooms that know least may import besides themselves
NARROW = {
    "errors": set(),
    "world": set(),
    "config": {"errors"},
    "records": {"errors", "world"},
    "data": {"errors"},
    "models": {"errors", "world", "records", "data"},
    "losses": {"models"},
    "solvers": {"errors", "world"},
    "report": {"errors", "records"},  # it reads files, not objects
}
COMMANDS = (
    *(
        "train",
        "eval",
        "inspect",
        "sample",
        "iterate",
        "prompt_search",
        "export",
        "bench.__main__",
        "command",
        "config.knobs",
        "report.__main__",
        "objectives.__main__",
        "preflight.__main__",
        "preflight.afterwards",
        "rounds.compare",
        "plan.__main__",
        "dashboard",
    ),
)
HEAVY = {"torch", "lightning", "transformers", "datasets"}
MAX_FILE, MAX_FUNCTION = 350, 60  # lines


def module_of(path: Path) -> str:
    """The name behind `spo_lightning.`; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports(tree: ast.AST) -> set[str]:
    """Modules of ours that a file imports, anywhere in it, as names behind `spo_lightning.`."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"relative import in line {node.lineno}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    ours = {name.partition(".")[2] for name in found if name.split(".")[0] == "spo_lightning"}
    return {name if name in FILES else name.rpartition(".")[0] for name in ours}


IMPORTS = {name: imports(ast.parse(path.read_text("utf-8"))) for name, path in FILES.items()}


def room_of(module: str) -> str:
    return module.split(".")[0]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_back_to_earlier_rooms(module):
    if not module:
        assert not IMPORTS[module]
        return
    room = room_of(module)
    assert room in ROOMS, f"{module} has no place in ROOMS"
    for other in map(room_of, IMPORTS[module]):
        if other in ("", room):
            continue
        assert ROOMS.index(other) < ROOMS.index(room), f"{module} imports {other}"
        assert other in NARROW.get(room, ROOMS), f"{module} imports {other}"


def test_imports_have_no_cycle():
    assert len(list(TopologicalSorter(IMPORTS).static_order())) >= len(FILES)


def test_the_parser_sees_every_kind_of_import():
    text = """
import spo_lightning.models.scorer
from spo_lightning import losses, __version__
def late():
    from spo_lightning.data.rows import Row
"""
    assert imports(ast.parse(text)) == {"models.scorer", "losses", "", "data.rows"}


@pytest.mark.parametrize("module", COMMANDS)
def test_commands_import_nothing_heavy(module):
    """--help answers at once."""
    code = f"import sys, spo_lightning.{module}; print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(ran.stdout.split())


@pytest.mark.parametrize("module", FILES)
def test_files_and_functions_are_short(module):
    text = FILES[module].read_text("utf-8")
    assert len(text.splitlines()) <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            lines = node.end_lineno - node.lineno + 1
            assert lines <= MAX_FUNCTION, f"{module}.{node.name} has {lines} lines"


def targets(node) -> set[str]:
    """Every `_target_` at any depth of a config file."""
    if isinstance(node, list):
        return {name for part in node for name in targets(part)}
    if not isinstance(node, dict):
        return set()
    mine = {node["_target_"]} if "_target_" in node else set()
    return mine | {name for part in node.values() for name in targets(part)}


CONFIGS = sorted(Path(CONF).rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.relative_to(CONF).as_posix())
def test_targets_resolve(path, monkeypatch):
    monkeypatch.syspath_prepend(PLUGINS)
    for name in targets(yaml.safe_load(path.read_text("utf-8"))):
        assert callable(hydra.utils.get_object(name))


def test_targets_are_found():
    found = {name for path in CONFIGS for name in targets(yaml.safe_load(path.read_text("utf-8")))}
    assert {"spo_lightning.losses.dpo", "spo_lightning.solvers.penalty.Penalty"} <= found
