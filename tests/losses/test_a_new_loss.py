"""The example loss of docs/extending.md, put into the package as two files and nothing else.

Tests, page, command line and sweep have it.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAME = "squared_hinge"
FILES = ("spo_lightning", "conf", "sweeps", "docs", "tests", "pyproject.toml", "README.md")
# what finds every yaml by itself, and what knows them all
FOUND = ("tests/losses/test_properties.py", "tests/losses/test_agreement.py")
ALL = (
    *("tests/objectives/test_objectives.py", "tests/sweep/test_sweep.py"),
    *FOUND,
)


def example() -> tuple[str, str]:
    """The function and the yaml as the page has them."""
    text = (ROOT / "docs/extending.md").read_text("utf-8")
    code, node = re.findall(r"^```(?:python|yaml)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)[:2]
    assert f"def {NAME}" in code and "my_losses" in node
    return code[code.index("def ") :], node.replace("my_losses", "spo_lightning.losses")


@pytest.fixture(scope="module")
def pasted(tmp_path_factory):
    home = tmp_path_factory.mktemp("pasted")
    for name in FILES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, home / name)
    function, node = example()
    with (home / "spo_lightning/losses/reference_free.py").open("a") as file:
        file.write(f"\n\n{function}")
    (home / f"conf/loss/{NAME}.yaml").write_text(node)
    return home


def ran(home: Path, *words: str) -> str:
    """In a process of its own, which finds the copy."""
    there = os.environ | {"PYTHONPATH": str(home)}
    how = {"cwd": home, "env": there, "capture_output": True, "text": True}
    done = subprocess.run([sys.executable, "-m", *words], **how)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_two_files_are_a_loss(pasted):
    printed = ran(pasted, "spo_lightning.objectives", NAME)
    assert f"## {NAME}" in printed and r"$\max(0, \delta - \beta z)^2$" in printed
    assert "- `delta: 1.0` margin asked for" in printed
    assert f"{NAME}.svg" in ran(pasted, "spo_lightning.objectives", "--output", "docs")
    assert f"| [{NAME}](#{NAME}) |" in (pasted / "docs/objectives.md").read_text("utf-8")
    words = ("experiment=debug", "data=slips", "hardware=cpu", "hydra.run.dir=run")
    ran(pasted, "spo_lightning.train", f"loss={NAME}", "solver=penalty", *words)
    plain = ("-n", "0", "-q", "-o", "addopts=", "-p", "no:cacheprovider")
    told = ran(pasted, "pytest", *plain, "-rs", *FOUND, "-k", NAME)
    assert "passed" in told and f"{NAME} has no definition of its own" in told
    names = "squared_hinge or objectives or another or earlier or whole or sweep_of_losses"
    told = ran(pasted, "pytest", *plain, *ALL, "-k", names)
    assert "passed" in told and "failed" not in told
