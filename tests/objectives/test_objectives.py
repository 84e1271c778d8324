"""The page of all objectives is what the code says; a loss of one's own stands on it too."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest
from pairs import CONF

from spo_lightning.errors import UserError
from spo_lightning.objectives.__main__ import objectives_of
from spo_lightning.objectives.found import objectives
from spo_lightning.objectives.page import page, written
from spo_lightning.objectives.picture import pushes

DOCS = Path(__file__).resolve().parents[2] / "docs"
FOUND = {one.name: one for one in objectives([CONF])}


def test_the_page_in_docs_is_what_the_command_writes(tmp_path):
    """Pictures to a pixel, as their numbers are rounded."""
    files = written([*FOUND.values()], tmp_path)
    stale = "python -m spo_lightning.objectives --output docs writes it anew"
    assert (DOCS / "objectives.md").read_text("utf-8") == files[0].read_text("utf-8"), stale
    assert {path.name for path in files[1:]} == {p.name for p in DOCS.glob("objectives/*.svg")}
    for path in files[1:]:
        here, there = (points(path), points(DOCS / "objectives" / path.name))
        assert here == pytest.approx(there, abs=0.2), path.name


def points(path):
    curves = ElementTree.parse(path).findall("{*}polyline")
    assert len(curves) == 2
    return [float(it) for one in curves for it in re.split("[ ,]", one.attrib["points"])]


def test_every_loss_is_told_whole():
    for name, one in FOUND.items():
        assert one.formula and one.survey != "not said.", name
        assert one.papers or name in ("sft", "sigmoid_norm", "ipo_norm", "two_sided", "mixture")
        assert all(key.meaning for key in one.keys), name
        assert one.node["unit"] in ("sequence", "token")


def test_whom_a_loss_pushes():
    dpo, hinge, sft = (pushes(FOUND[name].loss()) for name in ("dpo", "hinge", "sft"))
    assert dpo.chosen[40].item() == pytest.approx(0.05)  # beta / 2 at the margin 0
    assert dpo.rejected[40].item() == pytest.approx(-0.05)
    assert dpo.over_from is None and hinge.over_from == pytest.approx(10.0)  # 1 / beta
    assert sft.rejected.abs().max() == 0 and sft.chosen[0].item() == pytest.approx(1 / 20)


OWN = r'''
def own(policy, *, beta):
    r"""Mine.

    $-\beta z$
    """
    return -beta * policy.gap
'''
OWN_YAML = """# Own.
_target_: mine_of_page.own
_partial_: true
unit: sequence  # a fact
beta: 0.5  # much
"""


def test_a_loss_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "mine_of_page.py").write_text(OWN)
    (tmp_path / "mine" / "loss").mkdir(parents=True)
    (tmp_path / "mine" / "loss" / "own.yaml").write_text(OWN_YAML)
    monkeypatch.syspath_prepend(tmp_path)
    found = {one.name: one for one in objectives([CONF, tmp_path / "mine"])}
    assert found.keys() - FOUND.keys() == {"own"}
    told = page([found["own"]])
    assert "| [own](#own) |  | no | sequence |  |  |" in told and "$-\\beta z$" in told
    assert "- `beta: 0.5` much" in told


def test_what_is_no_loss_is_refused(tmp_path):
    with pytest.raises(UserError, match="nope: no such loss; there are alpha_dpo"):
        objectives_of(["nope"], None, None)
    with pytest.raises(UserError, match="no directory loss/"):
        objectives_of([], tmp_path, None)
