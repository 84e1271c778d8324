"""Every loss against its definition in plain Python: values, and autograd against its differences.

``pytest -n 0 -s tests/losses/test_agreement.py`` prints the table: the largest absolute difference
over 200 draws, and what leaves a loss as it is.
"""

import pytest
import torch
from pairs import random_lengths, random_sums
from sources import BATCH, KEYS, PAIR, YAMLS, of_sums, rewritten, value
from test_properties import moves

DRAWS, BATCH_SIZE, STEP = 200, 8, 1e-5


def draws(count, seed):
    """Lengths, and sums of policy and reference that differ by some nats: [count, 2] each."""
    lengths = random_lengths(count, seed)
    reference = random_sums(lengths, seed + 1)
    moved = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed + 2)) * 3
    policy = (reference + moved.double()).clamp(max=-0.01)
    margins = (torch.rand(count, generator=torch.Generator().manual_seed(seed)) + 0.1).tolist()
    return lengths, policy, reference, margins


def differences(name):
    """Largest absolute difference of values and of gradients over all draws."""
    worst = [0.0, 0.0]
    for start in range(0, DRAWS, BATCH_SIZE):
        for place, off in enumerate(batch_differences(name, draws(BATCH_SIZE, seed=start))):
            worst[place] = max(worst[place], off.abs().max().item())
    return worst


def batch_differences(name, drawn):
    """Of one batch: of values, and of gradients; of numbers above 1 as a share of them."""
    lengths, policy, reference, margins = drawn
    keys, sums = KEYS.get(name, {}), policy.clone().requires_grad_()
    found = value(name, of_sums(sums, lengths, margins), of_sums(reference, lengths), **keys)
    (along,) = torch.autograd.grad(found.sum(), sums)
    keys = keys | {"held": policy.tolist()}

    def again(at):
        there = at.tolist(), reference.tolist(), lengths.tolist(), margins
        return torch.tensor(rewritten(name, *there, **keys), dtype=torch.float64)

    def slope(by):
        """Of the fourth order: at the odds of an almost certain answer the second order's own
        error is 6e-7."""
        near, far = (again(policy + n * by) - again(policy - n * by) for n in (1, 2))
        return (8 * near - far) / (12 * STEP)

    slopes = torch.zeros_like(policy)
    # where no pair sees another, all of one side move at once
    every = torch.eye(len(policy)) if name in BATCH else torch.ones(1, len(policy))
    for rows in every.double():
        for side in range(2):
            by = STEP * torch.stack([rows * (side == 0), rows * (side == 1)], 1)
            moved = slope(by)
            slopes[:, side] += moved.sum() * rows if name in BATCH else moved
    return (
        (found - again(policy)) / found.abs().clamp(min=1),
        (along - slopes) / along.abs().clamp(min=1),
    )


@pytest.mark.parametrize("name", [name for name in YAMLS if name != "mixture"])  # a sum of others
def test_against_an_independent_rewrite(name):
    if name not in PAIR and name not in BATCH:
        pytest.skip(f"{name} has no definition of its own in tests/losses/sources.py yet")
    of_values, of_gradients = differences(name)
    print(f"| {name} | {of_values:.1e} | {of_gradients:.1e} | {', '.join(moves(name))} |")
    assert of_values < 1e-10 and of_gradients < 1e-8
