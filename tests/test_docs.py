"""README.md and docs/: every command composes, the examples run, every link leads somewhere.

A block of commands is run, with words that make it small, unless the paragraph before it says how
long it takes; then it must compose. A block after a paragraph that ends with a file's name is that
file, and words in capitals stand for what the reader has.
"""

import os
import re
import runpy
import shlex
import sys
import tempfile
from argparse import ArgumentParser
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import pytest
from conftest import FORKS, environment
from hydra import compose, initialize_config_dir
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from omegaconf import OmegaConf, open_dict
from pairs import CONF
from tiny import policy

from spo_lightning.command import named
from spo_lightning.config import knobs
from spo_lightning.sweep.composing import yamls_before_schemas

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = (README, *sorted((ROOT / "docs").glob("*.md")))
ARGUMENTS = {
    **{name: f"spo_lightning.{name}.__main__" for name in ("report", "objectives")},
    "dashboard": "spo_lightning.dashboard",
    "preflight.afterwards": "spo_lightning.preflight.afterwards",
    "rounds.compare": "spo_lightning.rounds.compare",
}
OTHERS = ("pip", "pytest", "wandb")  # programs that are not ours
RUN = ("README.md", "extending.md")
FIRST = (*RUN, "your-data.md", "your-model.md", "sweeps.md")
RUN_SLOWLY = (
    *("capability.md", "judging.md", "reports.md", "reward-models.md", "sweeps.md"),
    *("your-data.md", "your-model.md"),
)
# what makes a command small, where it does not say otherwise itself
LOOK = ("eval.max_rows=4", "eval.max_new_tokens=4", "hardware.accelerator=cpu")
STEPS = ("max_steps=2", "batch_size=4", "micro_batch_size=2", "report.enabled=false")
DATA = ("data=slips", "data.sft_rows=32", "data.prompts=16", "data.eval_prompts=8")
BUILT = (
    *("model.config.hidden_size=32", "model.config.intermediate_size=48"),
    "model.config.num_hidden_layers=1",
)
TIMED = re.compile(r"\b(long|seconds|minutes|hours)\b", re.IGNORECASE)
FILE = re.compile(r"`([\w./-]+)`:$")
# what the examples of a page add to metrics.csv
LOGGED = {"extending.md": ("train/solver/conflict", "train/solver/lower", "train/length")}
# by commands, and so with lines of any length
WRITTEN = ("paper_table.md", "models.md", "objectives.md", "objectives-checked.md")
LINK = re.compile(r"\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block, and the paragraph before it."""

    page: str
    line: int
    language: str
    text: str
    before: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    @property
    def timed(self) -> bool:
        """Whether the paragraph says how long it takes."""
        return bool(TIMED.search(self.before))

    @property
    def file(self) -> str | None:
        """The name of the file that the block is."""
        found = FILE.search(self.before)
        return found and found[1]

    @property
    def commands(self) -> list[list[str]]:
        """Its commands, as words."""
        found: list[list[str]] = []
        for line in self.text.replace("\\\n", " ").splitlines():
            found.append([])
            for word in shlex.split(line, comments=True):
                found.append([]) if word == "&&" else found[-1].append(word)
        return [words for words in found if words]


def blocks(path: Path) -> list[Block]:
    found: list[Block] = []
    paragraph: list[str] = []
    above, fence, start = "", None, 0
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        if line.startswith("```") and fence is None:
            fence, start, inside = line.removeprefix("```"), number, []
        elif line.startswith("```"):
            before = " ".join(paragraph)
            found.append(Block(path.name, start, fence or "", "\n".join(inside), before))
            fence, paragraph, above = None, [], ""
        elif fence is not None:
            inside.append(line)
        else:
            if line.strip():
                paragraph = [*paragraph, line] if above.strip() else [line]
            above = line
    assert fence is None, f"{path.name}: the block of line {start} has no end"
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.language == "bash"]


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """The command of the package and its words; None for another program."""
    if "-m" not in words or words[0] not in ("python", "torchrun"):
        assert words[0] in OTHERS, words
        return None
    at = words.index("-m") + 1
    package, _, name = words[at].partition(".")
    assert package == "spo_lightning", words
    return name, words[at + 1 :]


FOUND = {  # a command that stands on several pages is composed once
    shlex.join(words): (found, block)
    for block in SHELL
    if block.timed or block.page not in RUN  # what is run has been composed
    for words in block.commands
    if (found := ours(words)) is not None
}
# a page that is not read first is composed with the slow tests
COMMANDS = [
    pytest.param(
        *found,
        id=f"{block} {words[:60]}",
        marks=[] if block.page in FIRST else [pytest.mark.slow],
    )
    for words, (found, block) in FOUND.items()
]


@pytest.fixture(autouse=True)
def as_in_a_command():
    """What Hydra has found before it composes, and nothing of it afterwards."""
    OmegaConf.register_new_resolver("run_id", lambda: "0", use_cache=True, replace=True)
    Plugins.instance()
    yamls_before_schemas()
    yield
    HydraConfig.instance().cfg = None


def jobs(overrides: list[str]) -> list[list[str]]:
    """The words of a sweep's first job and of its last, or of the one run."""
    parsed = OverridesParser.create(GlobalHydra.instance().config_loader())
    parsed = parsed.parse_overrides(overrides)
    split = BasicSweeper.split_arguments(parsed, None)[0]
    return [list(split[0]), *([list(split[-1])] if len(split) > 1 else [])]


def checked(config: str, overrides: list[str]) -> None:
    """Compose one job as Hydra does, and refuse what the command would refuse."""
    cfg = compose(config, overrides, return_hydra_config=True)
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    knobs.check(cfg, knobs.given())


@pytest.mark.parametrize("name, words", COMMANDS)
def test_every_command_composes(name, words, monkeypatch):
    if name in ARGUMENTS:
        return parsed(name, words, monkeypatch)
    args = get_args_parser().parse_args(words)
    config, given = args.config_name or name, named(args.overrides)
    if any(word.startswith("sweep.resume=") for word in given):
        return None  # it becomes the words of another command before Hydra sees it
    if config == "search_spo":
        return None  # tests/sweep/test_engines.py runs it, where Optuna is
    with initialize_config_dir(str(CONF), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        path = loader.get_search_path()
        path.append("questions", f"file://{ROOT / 'sweeps'}", anchor="main")
        loader.repository.initialize_sources(path)  # else read before it was longer
        if args.multirun or config != name:
            given.append("hydra.mode=MULTIRUN")
        if config != name:
            whole = [word for word in given if word.startswith("hydra.")]
            swept = compose(config, whole, return_hydra_config=True).hydra.sweeper.params
            given = [*(f"{key}={value}" for key, value in swept.items()), *given]
        for job in jobs(given):
            checked(config, job)
    return None


def parsed(name: str, words: list[str], monkeypatch) -> None:
    """Its argument parser takes the words."""

    class Enough(Exception):
        pass

    def parse(parser, *_):
        take(parser, words)
        raise Enough

    take = ArgumentParser.parse_args
    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    with pytest.raises(Enough):
        import_module(ARGUMENTS[name]).main()


def small(name: str, words: list[str], built: bool) -> list[str]:
    """The words, and those that make them a matter of a second."""
    keys = {word.partition("=")[0] for word in words}
    words = [re.sub(r"(?<=sync.every_n_steps=)\d+", "1", word) for word in words]  # within STEPS
    more = [*LOOK, *{"train": STEPS, "sample": ("samples=2",)}.get(name, ())]
    if name != "eval" and "data" not in keys:
        more += DATA
    if built:
        more += BUILT
        more += [] if "data=pairs" in words else ["sft.max_steps=5", "sft.batch_size=8"]
    return [*words, *(word for word in more if word.partition("=")[0] not in keys)]


def begun(module: str, words: list[str], cwd: Path, out: Path, env: dict[str, str]) -> None:
    """In a process of its own, as ``python -m module words`` in ``cwd``."""
    for descriptor in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path.insert(0, str(cwd))
    sys.argv = [module, *words]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def ran(name: str, words: list[str], cwd: Path) -> str:
    """What a command printed; it must end well. Forked from a process with the libraries."""
    with tempfile.TemporaryDirectory() as place:
        out = Path(place, "out")
        how = (f"spo_lightning.{name}", words, cwd, out, environment())
        process = FORKS.Process(target=begun, args=how)
        process.start()
        process.join(120)
        process.kill()
        process.join()
        printed = out.read_text("utf-8")
    assert process.exitcode == 0, f"{name} {shlex.join(words)}\n{printed}"
    return printed


def walked(page: str, cwd: Path) -> list[str]:
    """Write the page's files and run its commands, in order; what they printed."""
    model = cwd / "model"
    made = policy("llama", dtype="float32", num_hidden_layers=1)
    for part in (made.lm, made.tokenizer):
        part.save_pretrained(model)
    printed = []
    for block in (block for block in BLOCKS if block.page == page):
        if block.file is not None:
            path = cwd / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n", "utf-8")
        if block.language == "bash" and not block.timed:
            for name, words in filter(None, map(ours, block.commands)):
                printed.append(ran(name, meant(name, words, cwd), cwd))
    return printed


def meant(name: str, words: list[str], cwd: Path) -> list[str]:
    """The words with what the reader has in the place of capitals, and small."""
    runs = sorted(cwd.glob("outputs/*/*/status.json"), key=lambda path: path.stat().st_mtime)
    stands = {"DIR_OR_HUB_ID": cwd / "model", "outputs/DAY/RUN": runs[-1].parent if runs else ""}
    for capitals, real in stands.items():
        words = [word.replace(capitals, str(real)) for word in words]
    if name in (*ARGUMENTS, "export"):
        return words
    text = " ".join(words)
    return small(name, words, "pretrained=" not in text and "checkpoint=" not in text)


@pytest.mark.parametrize(
    "page",
    ["README.md", *(pytest.param(p, marks=pytest.mark.slow) for p in (*RUN[1:], *RUN_SLOWLY))],
)
def test_the_page_runs(page, tmp_path):
    assert walked(page, tmp_path)
    tables = [path.read_text("utf-8") for path in tmp_path.glob("outputs/**/metrics.csv")]
    logged = {name for table in tables for name in table.splitlines()[0].split(",")}
    assert set(LOGGED.get(page, ())) <= logged


def test_what_is_not_run_says_how_long_it_takes():
    run = (*RUN, *RUN_SLOWLY)
    silent = [str(block) for block in SHELL if not block.timed and block.page not in run]
    assert silent == []


def test_the_readme_is_short_and_names_the_test_command():
    lines = README.read_text("utf-8").splitlines()
    assert len(lines) <= 160
    (tests,) = [block.text for block in SHELL if block.text.endswith("pytest")]
    assert f"check '{tests}'" in (ROOT / ".ci/run").read_text("utf-8")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere_and_lines_are_short(page):
    text = page.read_text("utf-8")
    if page.name not in WRITTEN:
        assert [line for line in text.splitlines() if len(line) > 120] == []
    for link in LINK.findall(text):
        place, _, anchor = link.partition("#")
        if place.startswith("https:"):
            continue
        there = page.parent / place if place else page
        assert there.exists(), link
        assert not anchor or anchor in anchors(there), link


def anchors(page: Path) -> set[str]:
    """What the page's headings are called in links."""
    found = re.findall(r"^#+ (.*)$", page.read_text("utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", text).lower().replace(" ", "-") for text in found}
