"""The wheel works from another directory, offline, with its own copy of conf/."""

import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import spo_lightning

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
LEFT_BEHIND = (
    *("config.yaml", "metrics.csv", "metrics.json", "samples.jsonl", "status.json", "train.log"),
    *("checkpoints/last.ckpt", "model/config.json", "model/model.safetensors"),
    "model/tokenizer.json",
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def run(*command, cwd: Path) -> str:
    """What a command prints; it must exit 0. Offline, and blind to the checkout."""
    gone = ("PYTHONPATH", "PYTHONHOME", "WANDB_MODE")
    env = {name: value for name, value in os.environ.items() if name not in gone}
    env |= {"HF_HUB_OFFLINE": "1", "HF_EVALUATE_OFFLINE": "1"}
    ran = subprocess.run([*map(str, command)], cwd=cwd, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, f"{command}\n{ran.stdout}\n{ran.stderr}"
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    build = ("-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT)
    run(sys.executable, *build, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """bin/ of an environment with the wheel, and beside it this environment's other packages."""
    home = tmp_path_factory.mktemp("env")
    venv.create(home)
    python = home / "bin" / "python"
    pip = ("-m", "pip", "--python", python, "install", "--no-deps", "--no-index", wheel)
    run(sys.executable, *pip, cwd=home)
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", ask, cwd=home).strip())
    # a folder named in a .pth file joins sys.path, but its own .pth files, such as that of an
    # editable install, are not read
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site / "others.pth").write_text("\n".join(sorted(others)), encoding="utf-8")
    # a stranger's conf where a wheel's neighbours lie
    (site / "conf").mkdir()
    (site / "conf" / "train.yaml").write_text("not: ours\n", encoding="utf-8")
    return home / "bin"


@pytest.fixture
def elsewhere(tmp_path) -> Path:
    """An empty directory but for a stranger's conf."""
    (tmp_path / "conf").mkdir()
    (tmp_path / "conf" / "train.yaml").write_text("not: ours\n", encoding="utf-8")
    return tmp_path


def test_wheel_holds_the_whole_conf_and_no_tests(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    head = "spo_lightning/conf/"
    ours = {path.relative_to(ROOT / "conf").as_posix() for path in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix(head) for name in names if name.startswith(head)} == ours
    assert {name.split("/")[0] for name in names} == {
        "spo_lightning",
        f"spo_lightning-{spo_lightning.__version__}.dist-info",
    }
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_reads_its_own_conf(installed, elsewhere):
    code = """
from importlib.metadata import version
from spo_lightning import __version__
from spo_lightning import command
assert version("spo-lightning") == __version__
print(command.CONF)
"""
    conf = Path(run(installed / "python", "-c", code, cwd=elsewhere).strip())
    assert conf.parts[-3:] == ("site-packages", "spo_lightning", "conf")
    assert conf.is_relative_to(installed.parent)


def test_every_console_script_helps(installed, elsewhere):
    for name in SCRIPTS:
        told = run(installed / name, "--help", cwd=elsewhere)
        assert "Configuration groups" in told or "usage: spo-" in told


def test_wheel_trains_and_reports(installed, elsewhere):
    train = ("-m", "spo_lightning.train", "experiment=debug", "hydra.run.dir=one")
    run(installed / "python", *train, cwd=elsewhere)
    left = elsewhere / "one"
    assert [name for name in LEFT_BEHIND if not (left / name).is_file()] == []
    assert json.loads((left / "status.json").read_text("utf-8"))["state"] == "finished"
    assert json.loads((left / "metrics.json").read_text("utf-8"))["steps"] == 2
    assert "nll/chosen" in run(installed / "spo-report", "one", cwd=elsewhere)


def test_wheel_knows_the_questions_by_name(installed, elsewhere):
    asked = ("--config-name", "beta_by_weight", "--cfg", "hydra", "-p", "hydra.sweep.dir")
    told = run(installed / "spo-train", *asked, cwd=elsewhere)
    assert told.strip() == "outputs/beta_by_weight"


def test_wheel_inspects(installed, elsewhere):
    shown = run(installed / "spo-inspect", "data=slips", cwd=elsewhere)
    assert "chosen" in shown
    assert "rejected" in shown
