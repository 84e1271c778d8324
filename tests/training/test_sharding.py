"""A checkpoint holds what is spread in parts, and it is dealt out again as it was."""

import shutil

import pytest
import torch
from tiny import policy

from spo_lightning.errors import UserError
from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding
from spo_lightning.records import checkpoints, parts
from spo_lightning.training.sharding import dealt


def stepped(optimizer, theta):
    for p in theta:
        p.grad = torch.ones_like(p)
    optimizer.step()


@pytest.fixture
def trained(group_of_one):
    """An optimizer that has taken a step, its parameters, and what a checkpoint holds of both."""
    made, how = policy(), {"trains": True, "unpaired": False}
    _, scorer = Sharding(True, 1, False)(made, lambda it: Scorer(it.lm, True), group_of_one, **how)
    theta = list(scorer.spread.values())
    optimizer = torch.optim.AdamW(theta, lr=0.1)
    stepped(optimizer, theta)
    tree = {"optimizer": optimizer.state_dict(), "solver": {"shadow": tuple(theta), "step": 3}}
    return optimizer, theta, {**tree, "spo_lightning": {"outer_step": 3}}


def kept(tree, path):
    checkpoints.put(path, lambda beside: checkpoints.write_parts(tree, beside, first=True),
                    keep_former=True, first=True)  # fmt: skip


def test_what_is_kept_in_parts_is_dealt_out_as_it_was(trained, tmp_path):
    optimizer, theta, tree = trained
    kept(tree, tmp_path / "last.ckpt")
    assert (tmp_path / "last.ckpt").is_dir()
    found = checkpoints.read(tmp_path / "last.ckpt")
    flat = [*found["solver"]["shadow"], found["optimizer"]["state"][0]["exp_avg"]]
    assert not any(hasattr(value, "full_tensor") for value in flat)
    assert type(found["solver"]["shadow"]) is tuple
    found = dealt(found, theta)
    assert found["solver"]["step"] == 3
    for mine, p in zip(found["solver"]["shadow"], theta, strict=True):
        assert mine.placements == p.placements and mine.to_local().equal(p.to_local())
    again = torch.optim.AdamW(theta, lr=0.1)
    again.load_state_dict(found["optimizer"])
    for number in range(len(theta)):
        mine, theirs = again.state[theta[number]], optimizer.state[theta[number]]
        assert mine.keys() == theirs.keys()
        assert mine["exp_avg"].to_local().equal(theirs["exp_avg"].to_local())
    before = [p.to_local().clone() for p in theta]
    stepped(again, theta)
    assert not any(p.to_local().equal(old) for p, old in zip(theta, before))


def test_directories_take_one_anothers_place_as_files_do(trained, tmp_path):
    _, _, tree = trained
    last, best = tmp_path / "last.ckpt", tmp_path / "best.ckpt"
    last.write_text("a file, of a run in one process")
    (tmp_path / "last.ckpt.tmp").write_text("and the half of the next, where it was killed")
    for step in (1, 2, 3):
        kept({**tree, "spo_lightning": {"outer_step": step}}, last)
    path, found = checkpoints.newest(last, best)
    assert (path, found["spo_lightning"]["outer_step"]) == (last, 3)
    assert {p.name for p in tmp_path.iterdir()} >= {"last.ckpt", "previous.ckpt"}
    assert not list(tmp_path.glob("*.tmp"))
    (last / parts.REST).unlink()
    path, found = checkpoints.newest(last, best)
    assert (path, found["spo_lightning"]["outer_step"]) == (last, 2)

    def save(beside):
        checkpoints.write_parts(tree, beside, first=True)

    for _ in range(2):
        checkpoints.put(best, save, keep_former=False, first=True)
    assert checkpoints.read(best)["spo_lightning"]["outer_step"] == 3


def test_what_was_killed_in_mid_write_is_written_anew(trained, tmp_path):
    _, _, tree = trained
    kept(tree, tmp_path / "last.ckpt")
    shutil.copytree(tmp_path / "last.ckpt", tmp_path / "last.ckpt.tmp")
    stale = tmp_path / "last.ckpt.tmp/shard-00007-model-00001-of-00001.safetensors"
    stale.write_bytes(b"of a run on more processes")
    kept(tree, tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt" / stale.name).exists()
    assert checkpoints.read(tmp_path / "last.ckpt")["solver"]["step"] == 3


@pytest.mark.parametrize("harm", ["cut", "gone", "rest"])
def test_parts_that_are_not_all_there_are_told_of_in_one_line(trained, tmp_path, harm):
    _, _, tree = trained
    kept(tree, tmp_path / "last.ckpt")
    (part,) = (tmp_path / "last.ckpt").glob("*.safetensors")
    if harm == "cut":
        part.write_bytes(part.read_bytes()[:-8])
    if harm == "gone":
        part.unlink()
    if harm == "rest":
        rest = tmp_path / "last.ckpt" / parts.REST
        rest.write_bytes(rest.read_bytes()[:-8])
    with pytest.raises(UserError, match="last.ckpt: no whole checkpoint of ours") as told:
        checkpoints.read(tmp_path / "last.ckpt")
    assert "\n" not in str(told.value)


def test_what_is_whole_stays_what_it_is():
    theta = [torch.ones(2, 3), torch.zeros(3)]
    tree = {"shadow": [*theta], "numbers": (1.0, 2), "state": {0: {"step": torch.ones(())}}}
    found = dealt(tree, theta)
    assert found["shadow"][0] is theta[0] and found["numbers"] == (1.0, 2)
    assert found["state"][0]["step"].shape == ()
