"""The commands as a user types them: help, sweeps, console scripts, directories, secrets."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import SMALL, command, environment, forked

from spo_lightning.command import CONF

KEY = "hf_AbCdEfGhIjKlMnOpQrStUvWxYz123456"
HYDRA = ("train", "eval", "inspect", "sample", "iterate", "export", "bench")


def module(name: str) -> tuple[str, str]:
    return "-m", f"spo_lightning.{name}"


@pytest.fixture(scope="module")
def ran(tmp_path_factory, cache):
    """A small run from an empty directory, with a secret in the environment and in the config."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    words = ("max_steps=2", "loss=dpo", "logger=wandb", f"logger.wandb.tags=[{KEY},plain]")
    done = command(cwd, *SMALL, cache, *words, "hydra.run.dir=run", HF_TOKEN=KEY)
    assert done.code == 0, done.err  # wandb itself warns on stderr
    return cwd, done


@pytest.mark.parametrize("name", HYDRA)
def test_help_loads_nothing_heavy(tmp_path, name):
    # hence under two seconds, which `bench what=start` measures
    done = command(tmp_path, "--help", module=("-X", "importtime", *module(name)))
    assert done.code == 0 and "Hydra" in done.out
    told = done.err.splitlines()
    assert all(line.startswith("import time:") for line in told)
    loaded = {line.split("|")[-1].strip() for line in told}
    assert "spo_lightning.command" in loaded
    assert not {"torch", "transformers", "lightning", "datasets", "wandb"} & loaded
    assert not list(tmp_path.iterdir())


def test_a_group_lists_its_options_and_no_more(tmp_path):
    told = command(tmp_path, "--help").out
    for group in ("data", "model", "hardware"):
        options = sorted(path.stem for path in (Path(CONF) / group).glob("*.yaml"))
        assert f"\n{group}: {', '.join(options)}\n" in told
        done = command(tmp_path, f"{group}=nope")
        assert done.err.endswith(f"Available options in '{group}': {', '.join(options)}\n")
    assert "_common" not in told


@pytest.mark.parametrize("name", HYDRA)
def test_the_configuration_alone_loads_nothing_heavy(tmp_path, name):
    code = f"import sys, spo_lightning.{name}; print(*sys.modules)"
    done = command(tmp_path, code, module=("-c",))
    assert done.code == 0
    assert not {"torch", "transformers", "lightning", "datasets"} & set(done.out.split())


@pytest.mark.parametrize("name", [*HYDRA, "report"])
def test_console_script(tmp_path, name):
    script = Path(sys.executable).with_name(f"spo-{name}")
    if not script.exists():
        pytest.skip("the package is not installed")
    done = subprocess.run(
        [script, "--help"], cwd=tmp_path, env=environment(), capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


@pytest.mark.parametrize(
    "name, words, says",
    [
        ("eval", (), "checkpoint has no default"),
        ("eval", ("checkpoint=./absent",), "no such checkpoint: absent"),
        ("eval", ("checkpoint=.", "beta=1"), "beta"),
        ("eval", ("checkpoint=.", "hardware.precision=bf16-true"), "set dtype=bfloat16 too"),
        ("inspect", ("data=pairs",), "data.path is not set"),
        ("inspect", ("data=pairs", "data.path=absent.jsonl"), "absent.jsonl: no such file"),
        ("inspect", ("max_length=0",), "max_length=0: it must be at least 2"),
    ],
)
def test_one_line_from_the_other_commands(tmp_path, name, words, says):
    done = forked(tmp_path, *words, module=module(name))
    assert done.code == 2
    assert done.err.startswith("error: ") and done.err.count("\n") == 1 and says in done.err
    assert not list(tmp_path.iterdir())


def test_a_run_from_another_directory(ran):
    cwd, done = ran
    left = {path.name for path in (cwd / "run").iterdir()}
    assert left >= {
        "config.yaml",
        "metrics.csv",
        "metrics.json",
        "samples.jsonl",
        "status.json",
        "checkpoints",
        "model",
        "train.log",
    }
    assert {path.name for path in cwd.iterdir()} == {"run"}
    first = json.loads((cwd / "run/samples.jsonl").read_text().splitlines()[0])
    assert first["chosen"] and first["rejected"] and first["chosen"] != first["rejected"]
    status = json.loads((cwd / "run/status.json").read_text())
    assert (status["state"], status["step"], status["error"]) == ("finished", 2, None)
    assert "Model: " in done.out


def test_secrets_stay_out_of_the_files(ran):
    cwd, done = ran
    saved = yaml.safe_load((cwd / "run/config.yaml").read_text())
    assert saved["logger"]["wandb"]["tags"] == ["<removed>", "plain"]
    ours = [path for path in (cwd / "run").rglob("*") if "wandb" not in path.parts]
    assert not [path for path in ours if path.is_file() and KEY.encode() in path.read_bytes()]
    assert KEY not in done.out


def test_multirun(tmp_path, cache):
    words = ("loss.beta=0.1,0.2", "loss=dpo", "max_steps=1", "hydra.sweep.dir=sweep")
    done = forked(tmp_path, "-m", *SMALL, cache, *words)
    assert (done.code, done.err) == (0, "")
    for job, beta in enumerate((0.1, 0.2)):
        place = tmp_path / f"sweep/{job}"
        assert yaml.safe_load((place / "config.yaml").read_text())["loss"]["beta"] == beta
        assert json.loads((place / "metrics.json").read_text())["final"]


def test_the_sweeps_own_file_holds_no_secret(tmp_path):
    words = ("-m", "seed=-1,-2", "logger=wandb", f"logger.wandb.tags=[{KEY}]")
    done = forked(tmp_path, *words, "hydra.sweep.dir=sweep", HF_TOKEN=KEY)
    assert done.code == 3 and KEY not in done.err and "(seed=-1)" in done.err
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if KEY in path.read_text()]


def test_a_bug_shows_its_traceback(tmp_path):
    code = "from spo_lightning import command\ndef work(*_): return 1 // 0\n"
    code += "import sys; command.run('inspect', work)"
    done = command(tmp_path, code, module=("-c",))
    assert done.code == 1
    assert "Traceback" in done.err and done.err.endswith("integer division or modulo by zero\n")


@pytest.mark.slow
def test_exit_code_of_a_diverged_run(tmp_path, cache):
    words = ("loss=dpo", "max_steps=6", "optimizer=sgd", "optimizer.lr=1e38", "clip_norm=null")
    done = command(tmp_path, *SMALL, cache, *words, "hydra.run.dir=run")
    assert done.code == 1 and done.err.count("\n") == 1
    assert "is not finite" in done.err
    assert json.loads((tmp_path / "run/status.json").read_text())["state"] == "failed"
