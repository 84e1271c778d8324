"""What tests of the commands share: a small run, and a command run in a process of its own."""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest

# Tests share the cores, a process each: read when torch is imported, which is after this file.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

MODULE = ("-m", "spo_lightning.train")
# one narrow layer, few rows: a run of seconds
SMALL = (
    "data=slips",
    "data.operations=1",
    "data.digits=1",
    "data.sft_rows=32",
    "data.prompts=40",
    "data.eval_prompts=8",
    "model.config.hidden_size=32",
    "model.config.intermediate_size=48",
    "model.config.num_hidden_layers=1",
    "hardware=cpu",
    "hardware.threads=1",
    "batch_size=4",
    "micro_batch_size=2",
    "sft.max_steps=20",
    "sft.batch_size=8",
    "eval.max_new_tokens=4",
    "log.every_n_steps=1",
)


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


def environment(**more: str) -> dict[str, str]:
    """Offline, one thread, nobody's keys."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "WANDB_", "HYDRA_"))}
    return {**kept, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", **more}


def start(cwd: Path, *words: object, module=MODULE, **env: str) -> subprocess.Popen:
    """A command of the package, begun in ``cwd``."""
    return subprocess.Popen(
        [sys.executable, *module, *map(str, words)],
        cwd=cwd,
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen, timeout: float = 120) -> Ended:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Ended(process.returncode, out, err)


def command(cwd: Path, *words: object, module=MODULE, timeout: float = 120, **env: str) -> Ended:
    """A command of the package, run to its end."""
    return end(start(cwd, *words, module=module, **env), timeout)


FORKS = multiprocessing.get_context("forkserver")
# what a run imports on its way, but for its yamls' own
FORKS.set_forkserver_preload(
    [
        *("datasets", "evaluate", "lightning", "transformers"),
        *("spo_lightning.report.build", "spo_lightning.run.training"),
        *("spo_lightning.sampling.pairing", "spo_lightning.sweep.launcher"),
        *("spo_lightning.evaluation.text_metrics", "spo_lightning.training.sft"),
    ]
)


@dataclass(frozen=True)
class Fork:
    """A command of the package, begun in a fork of a process that has imported the libraries.

    For what a command does; what a process of its own does (signals, imports) is for ``start``.
    Forks are begun and ended by one thread: to begin one, multiprocessing asks after all others,
    and of two threads that ask after the same one, one gets its exit code and the other 255.
    """

    process: multiprocessing.process.BaseProcess
    place: tempfile.TemporaryDirectory

    @classmethod
    def begin(cls, cwd: Path, *words: object, module=MODULE, **env: str) -> "Fork":
        place = tempfile.TemporaryDirectory()
        files = [Path(place.name, name) for name in ("out", "err")]
        for file in files:
            file.touch()
        line = [module[-1], *map(str, words)]
        fork = cls(FORKS.Process(target=_run, args=(cwd, line, environment(**env), *files)), place)
        fork.process.start()
        return fork

    def end(self, timeout: float = 120) -> Ended:
        self.process.join(timeout)
        self.process.kill()
        self.process.join()
        with self.place as place:
            said = (Path(place, name).read_text() for name in ("out", "err"))
            return Ended(self.process.exitcode, *said)


def forked(cwd: Path, *words: object, module=MODULE, timeout: float = 120, **env: str) -> Ended:
    """A command of the package, run to its end in a fork."""
    return Fork.begin(cwd, *words, module=module, **env).end(timeout)


def _run(cwd: Path, line: list[str], env: dict[str, str], out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = line
    runpy.run_module(line[0], run_name="__main__", alter_sys=True)


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> str:
    """The warm start is trained once for all tests."""
    return f"cache.dir={tmp_path_factory.mktemp('cache')}"


@pytest.fixture
def group_of_one(tmp_path):
    """A process of torch's that is all there are: its parts are wholes, and what gathers runs."""
    import torch

    from spo_lightning.world import World

    store = f"file://{tmp_path / 'store'}"
    torch.distributed.init_process_group("gloo", store, rank=0, world_size=1)
    yield World(place=lambda: torch.device("cpu"))
    torch.distributed.destroy_process_group()
