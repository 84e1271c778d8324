"""A checkpoint holds what is spread as whole tensors, and it is dealt out again as it was."""

import copy

import torch
from tiny import policy

from spo_lightning.models.scorer import Scorer
from spo_lightning.models.sharded import Sharding
from spo_lightning.training.sharding import dealt, gathered


def stepped(optimizer, theta):
    for p in theta:
        p.grad = torch.ones_like(p)
    optimizer.step()


def test_what_is_gathered_is_dealt_out_as_it_was(group_of_one):
    made = policy()
    how = {"trains": True, "unpaired": False}
    _, scorer = Sharding(True, 1, False)(made, lambda it: Scorer(it.lm, True), group_of_one, **how)
    theta = list(scorer.spread.values())
    optimizer = torch.optim.AdamW(theta, lr=0.1)
    stepped(optimizer, theta)
    tree = {"optimizer": optimizer.state_dict(), "solver": {"shadow": tuple(theta), "step": 3}}
    kept = gathered(tree, first=True)
    flat = [*kept["solver"]["shadow"], kept["optimizer"]["state"][0]["exp_avg"]]
    assert not any(hasattr(value, "full_tensor") for value in flat)
    kept = copy.deepcopy(kept)
    found = dealt(kept, theta)
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


def test_what_is_whole_stays_what_it_is():
    theta = [torch.ones(2, 3), torch.zeros(3)]
    tree = {"shadow": [*theta], "numbers": (1.0, 2), "state": {0: {"step": torch.ones(())}}}
    for found in (gathered(tree, first=False), dealt(tree, theta)):
        assert found["shadow"][0] is theta[0] and found["numbers"] == (1.0, 2)
        assert found["state"][0]["step"].shape == ()
